"""`weightport convert` and a `port-…` command for every family: an original checkpoint to a model directory.

The commands are made of what families declare: their options, their sources, their help.
"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightport.cli.display import Lines, echo, names_in
from weightport.cli.paths import ExistingPath
from weightport.cli.running import command_body, json_option, quiet_option, uncollected
from weightport.converters.options import CommandOption, ConversionOptions, declared_options
from weightport.families.registry import registry
from weightport.formatting import count, size
from weightport.hashing import BackgroundDigests

if TYPE_CHECKING:
    from weightport.converters.conversion import Conversion, Planned
    from weightport.converters.plan import Plan
    from weightport.families.declaration import Family

MOST_PARTS = 12
"""Parts of a model that a line names."""
DTYPES = ("keep", "float32", "float16", "bfloat16")


class ByteSize(click.ParamType):
    """5GB, 500MB, 200000000: bytes, in decimal units as transformers reads them."""

    name = "size"
    likely_bytes = 10**6
    """A smaller number without a unit was meant to have one."""
    _units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes as an integer; fails on anything else."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgGtT]?[bB]?)\s*", str(value))
        unit = found.group(2).upper() if found else ""
        unit = unit if unit in self._units else unit + "B"
        if not found or not float(found.group(1)):
            self.fail(f"{value!r} is not a size: write 5GB or 500MB.", param, ctx)
        nbytes = int(float(found.group(1)) * self._units[unit])
        if not found.group(2) and nbytes < self.likely_bytes:
            said = f"{value!r} has no unit, and would be {nbytes:,} bytes: write {value}GB, {value}MB or {value}B."
            self.fail(said, param, ctx)
        return nbytes


def common_options() -> list[Callable[..., Any]]:
    """The arguments and options that every conversion takes."""
    return [
        click.argument("source", type=ExistingPath()),
        click.argument("out", type=click.Path(path_type=Path)),
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            default="keep",
            show_default=True,
            help="Floating-point type of the output; keep: each tensor's own.",
        ),
        click.option(
            "--max-shard-size",
            type=ByteSize(),
            default="5GB",
            show_default=True,
            help="Largest weight file; a larger model is split, with an index.",
        ),
        click.option(
            "--drop",
            multiple=True,
            metavar="PATTERN",
            help="Leave out source tensors whose names match (* a number, ** anything, {a,b} either). Repeatable.",
        ),
        click.option("--dry-run", is_flag=True, help="Show what would be done, and which source gives what."),
        click.option("--overwrite", is_flag=True, help="Replace OUT if it exists."),
        click.option("--allow-nonfinite", is_flag=True, help="Keep NaN and infinity instead of refusing them."),
        quiet_option,
        json_option,
    ]


def family_options(families: Sequence[Family]) -> list[Callable[..., Any]]:
    """The options that the families declare, and their sources: once each, with the families' names where several
    commands are one."""
    made: dict[str, list[tuple[str, CommandOption, Any]]] = {}
    for family in families:
        for each, declared in declared_options(family.options):
            made.setdefault(each.name, []).append((family.title, declared, each.default))
    options = [_family_option(name, found, named=len(families) > 1) for name, found in made.items()]
    sources = {source.name: source for family in families for source in family.sources}
    return [
        *options,
        *(
            click.option(source.flag, f"source_{source.name}", metavar=source.metavar, help=source.help)
            for source in sources.values()
        ),
    ]


def _family_option(name: str, found: Sequence[tuple[str, CommandOption, Any]], *, named: bool) -> Callable[..., Any]:
    """One option; not given, it is None, so that an option that a family does not have is noticed."""
    _, declared, default = found[0]
    help_text = declared.help if not named else f"{declared.help} ({', '.join(title for title, *_ in found)}.)"
    if isinstance(default, bool):
        return click.option(declared.flag, name, is_flag=True, default=None, help=help_text)
    if declared.choices:
        choices = tuple(dict.fromkeys(choice for _, each, _ in found for choice in each.choices))
        kind: Any = click.Choice(choices)
    else:
        kind = {int: int, float: float}.get(type(default), str)
    # A number of 0 stands for one that is found out.
    shown = f"{help_text} [default: {default}]" if default not in (None, 0) and not named else help_text
    return click.option(declared.flag, name, type=kind, default=None, metavar=declared.metavar, help=shown)


def _command(name: str, help_text: str, options: Sequence[Callable[..., Any]], body: Callable[..., None]) -> Any:
    command: Any = command_body(body)
    for option in reversed(options):
        command = option(command)
    settings = {"help_option_names": ["-h", "--help"]}
    return click.command(name, context_settings=settings, help=help_text)(command)


def port_command(family: Family) -> Any:
    """The command `port-FAMILY`: the common options, and those that the family declares."""

    def body(**arguments: Any) -> None:
        run(family=family.name, **arguments)

    help_text = f"Convert {family.original}, SOURCE, into the model directory OUT."
    return _command(family.command, help_text, [*common_options(), *family_options([family])], body)


def convert_command() -> Any:
    """The command `convert`, with the options of every family."""
    families = list(registry())

    def body(family: str | None, **arguments: Any) -> None:
        run(family=family, **arguments)

    chosen = click.option(
        "--family", type=click.Choice([each.name for each in families]), help="Refuse SOURCE unless it is of this."
    )
    help_text = "Convert the checkpoint SOURCE, whose family is recognised, into the model directory OUT."
    return _command("convert", help_text, [chosen, *common_options(), *family_options(families)], body)


def run(family: str | None, source: Path, **arguments: Any) -> None:
    """Convert, showing what happens."""
    # A large file takes seconds to hash, and so do the imports: they may as well be done together.
    with BackgroundDigests((source,) if source.is_file() and not arguments["dry_run"] else ()) as digests:
        _run(digests, family, source, **arguments)


def _run(
    digests: BackgroundDigests,
    family: str | None,
    source: Path,
    out: Path,
    dtype: str,
    max_shard_size: int,
    drop: tuple[str, ...],
    dry_run: bool,
    overwrite: bool,
    allow_nonfinite: bool,
    quiet: bool,
    as_json: bool,
    **own: Any,
) -> None:
    with uncollected():
        import transformers.modeling_utils  # noqa: F401 - planning needs it, and it is most of all imports

        from weightport.api import convert, plan_conversion
        from weightport.checkpoints.dtypes import parse_dtype
        from weightport.converters import conversion  # noqa: F401 - used further on

    given = {name: value for name, value in own.items() if value is not None}
    beside = {name.removeprefix("source_"): value for name, value in given.items() if name.startswith("source_")}
    settings = {name: value for name, value in given.items() if not name.startswith("source_")}
    common = ConversionOptions(
        dtype=parse_dtype(dtype),
        drop=drop,
        allow_nonfinite=allow_nonfinite,
        overwrite=overwrite,
        max_shard_bytes=max_shard_size,
    )
    sources: Any = {"checkpoint": source, **beside} if beside else source
    lines = Lines(quiet=quiet or as_json)
    if dry_run:
        planned = plan_conversion(sources, family, common, **settings)
        _show_dry_run(lines, planned, as_json=as_json)
        return
    begun = time.monotonic()
    with lines.progress("write") as (start, advance):

        def announce(planned: Planned) -> None:
            _show_plan(lines, planned)
            start(planned.plan.nbytes)

        result = convert(sources, out, family, common, digests=digests, announce=announce, advance=advance, **settings)
    if as_json:
        echo(json.dumps(summary(result), ensure_ascii=False))
        return
    _show_result(lines, result, time.monotonic() - begun)


def _show_dry_run(lines: Lines, planned: Planned, *, as_json: bool) -> None:
    """What each source gives, without writing anything."""
    parts = {
        name: Counter(tensor.partition(".")[0] for tensor in planned.model.tensors_of(name))
        for name in planned.sources.checkpoints
    }
    given = {name: found.total() for name, found in parts.items()}
    if as_json:
        model = planned.model
        found = {
            "family": model.family, "title": model.title, "parameters": planned.plan.parameters,
            "bytes": planned.plan.nbytes, "sources": given, "parts": parts, "notes": list(model.notes),
        }  # fmt: skip
        echo(json.dumps(found, ensure_ascii=False))
        return
    _show_plan(lines, planned)
    for name, number in given.items():
        of_parts = ", ".join(f"{part} {count}" for part, count in parts[name].items())
        shown = f" ({of_parts})" if 0 < len(parts[name]) <= MOST_PARTS else ""
        lines.line("source", f"{name}: {planned.sources[name].path} gives {number} tensors{shown}")
    for reason, number in Counter(planned.model.unused.values()).items():
        lines.line("unused", f"{number} tensors: {reason}")
    lines.line("nothing", f"was written; OUT would hold {size(planned.plan.nbytes)} of weights")


def summary(result: Conversion) -> dict[str, Any]:
    """What --json prints: the record without its lists of tensors."""
    kept = (
        "family",
        "layout",
        "title",
        "sources",
        "options",
        "vocabulary",
        "dtype",
        "parameters",
        "files",
        "notes",
        "versions",
    )
    record = {key: result.record[key] for key in kept}
    # Without the list of every tensor.
    record["sources"] = {
        name: {key: value for key, value in source.items() if key != "tensors"}
        for name, source in record["sources"].items()
    }
    return {
        "directory": str(result.directory),
        **record,
        "tensors_written": sum(1 for _ in result.plan.targets),
        "tensors_dropped": len(result.plan.dropped),
    }


def _show_plan(lines: Lines, planned: Planned) -> None:
    from weightport.converters.plan import tensor_counts

    model, plan = planned.model, planned.plan
    unread = [f"{_SECTIONS.get(name, name)} {size(n)}" for name, n in model.unread.items() if n >= 10**5]
    lines.heading(
        f"{model.title} · {count(plan.parameters)} parameters · {str(plan.dtype).removeprefix('torch.')} · "
        f"{planned.sources.main.format}" + (f" ({', '.join(unread)}, not read)" if unread else "")
    )
    for note in model.notes:
        lines.line("note", note)
    if planned.vocabulary is not None:
        lines.line("vocab", planned.vocabulary.sentence)
        if planned.vocabulary.warning is not None:
            lines.line("warning", planned.vocabulary.warning)
    counts = tensor_counts(plan)
    became = [f"{counts[what]} {said}" for what, said in _BECAME.items() if counts[what]]
    read = counts["read"] + counts["dropped"]
    lines.line("plan", " · ".join([f"{read} tensors → {counts['written']}", *_dropped(plan), *became]))


def _dropped(plan: Plan) -> list[str]:
    """What is left out, in words: the recomputable together, everything else by its reason."""
    derived = sum(1 for item in plan.dropped if item.derived is not None)
    reasons = Counter(item.because for item in plan.dropped if item.derived is None)
    shown = [f"{derived} dropped (buffers, recomputed from the configuration)"] if derived else []
    return shown + [f"{number} dropped ({because})" for because, number in reasons.items()]


_BECAME = {
    "tied": "tied (the same matrix under a further name)",
    "merged": "fewer by merging",
    "split": "more by splitting",
    "filled": "computed, which the file does not hold",
}
"""What else changes the number of tensors, by its count."""

_SECTIONS = {"last_optimizer_state": "optimizer state", "extra_state": "training state"}


def _show_result(lines: Lines, result: Conversion, seconds: float) -> None:
    written = sum(file["size"] for file in result.record["files"])
    lines.line("written", f"{size(written)} in {seconds:.1f} s")
    lines.line(f"{result.directory}/", names_in(result.directory))
    made = shlex.quote(str(result.directory))
    tried = f" · weightport generate {made} IMAGE" if (result.directory / "processor_config.json").is_file() else ""
    lines.line("next", f"port-parity {made} --reference …{tried}")
