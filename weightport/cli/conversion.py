"""`port-ofa`, `port-florence2` and `weightport convert`: an original checkpoint to a model directory."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightport.checkpoints.hashing import BackgroundDigests
from weightport.cli.display import Lines, echo
from weightport.cli.running import command_body, json_option, quiet_option, uncollected
from weightport.formatting import count, size

if TYPE_CHECKING:
    from weightport.converters import Conversion, Planned
    from weightport.converters.plan import Plan

FAMILIES = ("ofa", "florence2")
DTYPES = ("keep", "float32", "float16", "bfloat16")


class ByteSize(click.ParamType):
    """5GB, 500MB, 200000000: bytes, in decimal units as transformers reads them."""

    name = "size"
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
        return int(float(found.group(1)) * self._units[unit])


def conversion_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments and options that every conversion takes."""
    decorators = (
        click.argument("source", type=click.Path(path_type=Path)),
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
            "--portable", is_flag=True, help="Write the model's code beside the weights, for trust_remote_code."
        ),
        click.option(
            "--drop",
            multiple=True,
            metavar="PATTERN",
            help="Leave out source tensors whose names match (* a number, ** anything, {a,b} either). Repeatable.",
        ),
        click.option("--overwrite", is_flag=True, help="Replace OUT if it exists."),
        click.option("--allow-nonfinite", is_flag=True, help="Keep NaN and infinity instead of refusing them."),
        quiet_option,
        json_option,
    )
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def vocabulary_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of families whose checkpoints come without a tokenizer."""
    decorators = (
        click.option(
            "--vocab",
            metavar="DIR|HUB_ID|none",
            help="The original's vocabulary: utils/BERT_CN_dict or utils/BPE of the OFA repository, or a Hub id "
            "such as bert-base-chinese. By default what stands beside SOURCE.",
        ),
        click.option("--ema", is_flag=True, help="Convert the averaged weights (EMA) of a training checkpoint."),
        click.option(
            "--parse-symbols",
            is_flag=True,
            help="Let the tokenizer read <bin_3>, <code_5> and <mask> in plain text (the original does not).",
        ),
    )
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


image_token_option = click.option(
    "--image-token",
    type=click.Choice(("reuse", "append")),
    default="reuse",
    show_default=True,
    help="The id that stands for an image. reuse: one that the original has and no text gives, so that no number "
    "changes; append: a new row (Florence-2).",
)


def florence2_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of Florence-2's checkpoints."""
    decorators = (
        click.option(
            "--vocab",
            metavar="DIR|HUB_ID|none",
            help="The tokenizer, where none stands beside SOURCE: a folder with tokenizer.json, or a Hub id such as "
            "microsoft/Florence-2-base; none: write the model without a processor.",
        ),
        click.option("--ema", is_flag=True, help="Convert the averaged weights (EMA) of a training checkpoint."),
        image_token_option,
    )
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


@click.command("port-ofa", context_settings={"help_option_names": ["-h", "--help"]})
@conversion_options
@vocabulary_options
@command_body
def port_ofa(**arguments: Any) -> None:
    """Convert an OFA or OFA-CN checkpoint SOURCE (fairseq .pt, or a directory of an existing port) into the model
    directory OUT."""
    run(family="ofa", **arguments)


@click.command("port-florence2", context_settings={"help_option_names": ["-h", "--help"]})
@conversion_options
@florence2_options
@command_body
def port_florence2(**arguments: Any) -> None:
    """Convert a Florence-2 checkpoint SOURCE written for the remote code (a released folder, a fine-tuned fork, a
    training loop's dump with config.json beside it) into the model directory OUT."""
    run(family="florence2", **arguments)


@click.command("convert")
@click.option("--family", type=click.Choice(FAMILIES), help="Refuse SOURCE unless it is of this family.")
@conversion_options
@vocabulary_options
@image_token_option
@command_body
def convert_command(family: str | None, **arguments: Any) -> None:
    """Convert the checkpoint SOURCE, whose family is recognised, into the model directory OUT."""
    run(family=family, **arguments)


def run(family: str | None, source: Path, **arguments: Any) -> None:
    """Convert, showing what happens."""
    # A large file takes seconds to hash, and so do the imports: they may as well be done together.
    with BackgroundDigests((source,) if source.is_file() else ()) as digests:
        _run(digests, family, source, **arguments)


def _run(
    digests: BackgroundDigests,
    family: str | None,
    source: Path,
    out: Path,
    dtype: str,
    max_shard_size: int,
    portable: bool,
    drop: tuple[str, ...],
    overwrite: bool,
    allow_nonfinite: bool,
    quiet: bool,
    as_json: bool,
    vocab: str | None,
    ema: bool,
    parse_symbols: bool = False,
    image_token: str = "reuse",
) -> None:
    with uncollected():
        import transformers.modeling_utils  # noqa: F401 - planning needs it, and it is most of all imports

        from weightport.converters import Options, convert, parse_dtype

    options = Options(
        dtype=parse_dtype(dtype),
        vocabulary=vocab,
        drop=drop,
        portable=portable,
        ema=ema,
        parse_symbols=parse_symbols,
        image_token=image_token,
        allow_nonfinite=allow_nonfinite,
        overwrite=overwrite,
        max_shard_bytes=max_shard_size,
    )
    lines = Lines(quiet=quiet or as_json)
    begun = time.monotonic()
    with lines.progress("write") as (start, advance):

        def announce(planned: Planned) -> None:
            _show_plan(lines, planned)
            start(planned.plan.nbytes)

        result = convert(source, out, family, options, digests=digests, announce=announce, advance=advance)
    if as_json:
        echo(json.dumps(summary(result), ensure_ascii=False))
        return
    _show_result(lines, result, time.monotonic() - begun)


def summary(result: Conversion) -> dict[str, Any]:
    """What --json prints: the record without its lists of tensors."""
    kept = ("family", "layout", "title", "source", "dtype", "parameters", "files", "notes", "versions")
    return {
        "directory": str(result.directory),
        **{key: result.record[key] for key in kept},
        "tensors_written": sum(1 for _ in result.plan.targets),
        "tensors_dropped": len(result.plan.dropped),
    }


def _show_plan(lines: Lines, planned: Planned) -> None:
    from weightport.converters.plan import main_dtype, tensor_counts

    model, plan = planned.model, planned.plan
    unread = [f"{_SECTIONS.get(name, name)} {size(n)}" for name, n in model.unread.items() if n >= 10**5]
    lines.heading(
        f"{model.title} · {count(plan.parameters)} parameters · {str(main_dtype(plan)).removeprefix('torch.')} · "
        f"{planned.checkpoint.format}" + (f" ({', '.join(unread)}, not read)" if unread else "")
    )
    for note in model.notes:
        lines.line("note", note)
    counts = tensor_counts(plan)
    lines.line(
        "plan", " · ".join([f"{counts['read'] + counts['dropped']} tensors → {counts['written']}", *_dropped(plan)])
    )


def _dropped(plan: Plan) -> list[str]:
    """What is left out, in words: the recomputable together, everything else by its reason."""
    derived = sum(1 for item in plan.dropped if item.derived is not None)
    reasons = Counter(item.because for item in plan.dropped if item.derived is None)
    shown = [f"{derived} dropped (buffers, recomputed from the configuration)"] if derived else []
    return shown + [f"{number} dropped ({because})" for because, number in reasons.items()]


_SECTIONS = {"last_optimizer_state": "optimizer state", "extra_state": "training state"}


def _show_result(lines: Lines, result: Conversion, seconds: float) -> None:
    written = sum(file["size"] for file in result.record["files"])
    lines.line("written", f"{size(written)} in {seconds:.1f} s")
    names = sorted(path.name for path in result.directory.iterdir())
    lines.line(f"{result.directory}/", " · ".join(names))
    made = shlex.quote(str(result.directory))
    lines.line("next", f"port-parity {made} --reference … · weightport generate {made} IMAGE")
