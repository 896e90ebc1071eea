"""`port-merge-lora` and `weightport extract-lora`: adapters into weights, and weights into adapters."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightport.cli.conversion import DTYPES
from weightport.cli.display import Lines, echo, names_in
from weightport.cli.paths import ExistingPath
from weightport.cli.running import command_body, json_option, quiet_option, uncollected
from weightport.families.registry import registry
from weightport.formatting import count, size
from weightport.hashing import BackgroundDigests, likely_weights

if TYPE_CHECKING:
    from weightport.adapters.merging.merge import Written
    from weightport.adapters.merging.merge_plan import MergePlan
    from weightport.adapters.merging.weights_check import WeightsCheck

COMBINATIONS = ("cat", "linear", "svd", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd")
OTHERS = ("refuse", "save", "leave")
RANDOM = ("dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd")


class WeightedAdapter(click.ParamType):
    """FOLDER or FOLDER=0.7: an adapter and its weight."""

    name = "adapter"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Path, float]:
        """(folder, weight); the weight is 1 when none is given."""
        if isinstance(value, tuple):
            return value
        folder, equals, weight = str(value).rpartition("=")
        if not equals or Path(str(value)).exists():
            return ExistingPath().convert(value, param, ctx), 1.0
        try:
            return ExistingPath().convert(folder, param, ctx), float(weight)
        except ValueError:
            self.fail(f"{value!r} should be a folder, or a folder and its weight: adapter=0.7.", param, ctx)


@click.command("port-merge-lora", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("base", type=ExistingPath())
@click.argument("adapters", metavar="ADAPTER[=WEIGHT]...", nargs=-1, required=True, type=WeightedAdapter())
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="keep",
    show_default=True,
    help="Floating-point type of the output; keep: each tensor's own.",
)
@click.option(
    "--combination",
    type=click.Choice((*COMBINATIONS, *RANDOM)),
    default="cat",
    show_default=True,
    help="How several adapters are combined. cat: the exact weighted sum of their changes; the others: what peft's "
    "add_weighted_adapter makes under the same name.",
)
@click.option("--density", type=float, help="Share of values that ties and magnitude_prune keep (0 to 1).")
@click.option("--svd-rank", type=click.IntRange(min=1), help="Rank that svd keeps; by default the adapters' largest.")
@click.option(
    "--majority-sign",
    type=click.Choice(("total", "frequency")),
    default="total",
    show_default=True,
    help="How ties elects a sign.",
)
@click.option(
    "--untie",
    is_flag=True,
    help="Write the head as a matrix of its own where an adapter changes a head tied to the token embedding.",
)
@click.option(
    "--quantized-base",
    type=click.Choice(("nf4", "nf4-double")),
    help="Round the base's linear layers to the 4-bit values that a QLoRA training saw (nf4-double: with double "
    "quantisation) before adding the adapter. By default the adapter is added to the unquantised base.",
)
@click.option(
    "--verify/--no-verify",
    default=None,
    help="Run base + adapter in peft and the merged model, and refuse a difference. By default where both fit in "
    "memory. The weights are always compared with base + adapter, computed a second time.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@quiet_option
@json_option
@command_body
def port_merge_lora(
    base: Path,
    adapters: tuple[tuple[Path, float], ...],
    out: Path,
    dtype: str,
    combination: str,
    density: float | None,
    svd_rank: int | None,
    majority_sign: str,
    untie: bool,
    quantized_base: str | None,
    verify: bool | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Merge LoRA adapters into the model directory BASE and write the directory OUT, on files: no model is built, and
    memory is bounded by the largest tensor. Adapters trained on an original's module names are ported on the way."""
    # A large file takes seconds to hash, and so do the imports: they may as well be done together.
    with BackgroundDigests(likely_weights(base)) as digests:
        with uncollected():
            from weightport.adapters.merging.combination import Combination
            from weightport.adapters.merging.merge import MergeOptions
            from weightport.api import merge_lora
            from weightport.checkpoints.dtypes import parse_dtype
        options = MergeOptions(
            dtype=parse_dtype(dtype),
            combination=Combination(combination, density, majority_sign, svd_rank),
            untie=untie,
            quantized_base=quantized_base,
            overwrite=overwrite,
        )
        lines = Lines(quiet=quiet or as_json)
        begun = time.monotonic()
        with lines.progress("write") as (start, advance):

            def announce(plan: MergePlan) -> None:
                _show_plan(lines, base, adapters, plan)
                start(plan.nbytes)

            def check(written: Written) -> Mapping[str, Any] | None:
                lines.line("written", f"{size(written.plan.nbytes)} in {time.monotonic() - begun:.1f} s")
                return _verified(lines, written, verify)

            def weighed(proof: WeightsCheck) -> None:
                lines.line("weights", f"{_share(proof.compared, proof.changed)} changed tensors {_within(proof)}")
                _show_unchecked(lines, proof.unchecked)

            result = merge_lora(
                base,
                adapters,
                out,
                options,
                digests=digests,
                announce=announce,
                advance=advance,
                weighed=weighed,
                check=check,
            )
        if as_json:
            echo(json.dumps({"directory": str(result.directory), **result.record}, ensure_ascii=False))
            return
        lines.line(f"{out}/", names_in(out))
        made = shlex.quote(str(out))
        lines.line("next", f"weightport generate {made} IMAGE · port-release {made} --repo ORG/NAME --dry-run")


def _show_plan(lines: Lines, base: Path, adapters: tuple[tuple[Path, float], ...], plan: MergePlan) -> None:
    outputs = plan.outputs
    parameters = sum(out.nbytes // out.dtype.itemsize for out in outputs)
    lines.heading(f"{base} · {count(parameters)} parameters · {len(outputs)} tensors")
    for folder, weight in adapters:
        lines.line("adapter", f"{folder}" + (f" · weight {weight:g}" if weight != 1 else ""))
    changed = [out for out in outputs if out.edit is not None]
    copied = sum(1 for out in outputs if out.copied)
    lines.line("plan", f"{len(changed)} tensors change ({size(sum(o.nbytes for o in changed))}) · {copied} copied")
    for note in plan.notes:
        lines.line("note", note)


def _verified(lines: Lines, written: Written, verify: bool | None) -> Mapping[str, Any] | None:
    """The record of the check; None when it was not asked for or cannot be had."""
    if verify is False:
        return None
    from weightport.adapters.verification.verify import UnverifiableError, verify_merge, why_not_verified, worst
    from weightport.checkpoints.formats.sharded import read_json
    from weightport.errors import UsageError

    reason = why_not_verified(written)
    if reason is not None:
        if verify:
            raise UsageError(f"--verify: the check cannot run: {reason}. Pass --no-verify to merge without it.")
        lines.line("verify", f"not run: {reason}")
        return None
    config = read_json(written.base / "config.json")
    family = registry().of_model_type(config.get("model_type") if isinstance(config, dict) else None)
    try:
        result = verify_merge(written, family.verification_prompt if family is not None else None)
    except UnverifiableError as error:
        if verify:
            raise
        lines.line("verify", f"not run: {error}")
        return None
    shown = {seam.seam: seam for seam in result.seams if seam.seam == "logits"}
    if result.seams:
        shown = {worst(result.seams).seam: worst(result.seams), **shown}
    for seam in shown.values():
        lines.line(
            "verify",
            f"{seam.seam}: {seam.difference:.1e} off at a scale of {seam.scale:.1e} "
            f"(rounding explains {seam.allowed:.1e})",
        )
    lines.line(
        "verify",
        f"{len(result.seams)} seams agree · {_share(result.weights, result.changed)} changed tensors within "
        f"{result.weight_steps:.2f} roundings of peft's"
        if result.seams
        else f"{_share(0, result.changed)} changed tensors: the model was not checked",
    )
    _show_unchecked(lines, result.unchecked)
    if verify and not result.seams:
        raise UsageError(f"--verify: not checked: {next(iter(result.unchecked.values()), 'nothing is comparable')}.")
    return result.record() if result.seams else None


def _share(compared: int, changed: int) -> str:
    return f"{compared} of {changed}"


def _within(proof: WeightsCheck) -> str:
    if not proof.compared:
        return "were compared with base + adapter, computed a second time"
    return f"are base + adapter, computed twice, within {proof.furthest:.2f} of what rounding explains"


def _show_unchecked(lines: Lines, unchecked: Mapping[str, str]) -> None:
    """What was not checked, a line for each reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in unchecked.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in list(reasons.items())[:5]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.line("not checked", f"{names[0]}{more}: {reason}")
    if len(reasons) > 5:
        lines.line("not checked", f"… for {len(reasons) - 5} further reasons; merge.json has all")


merge_lora_command = click.Command(
    "merge-lora", params=port_merge_lora.params, callback=port_merge_lora.callback, help=port_merge_lora.help
)


class RankOrAuto(click.ParamType):
    """A rank of at least 1, or auto (None)."""

    name = "rank|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """The rank; None for auto."""
        if value is None or value == "auto":
            return None
        try:
            rank = int(value)
        except ValueError:
            rank = 0
        if rank < 1:
            self.fail(f"{value!r} is neither auto nor a rank of at least 1.", param, ctx)
        return rank


@click.command("extract-lora")
@click.argument("tuned", type=ExistingPath())
@click.argument("base", type=ExistingPath())
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--rank",
    required=True,
    type=RankOrAuto(),
    help="Largest rank of a pair, or auto: of each the least that --keep takes.",
)
@click.option(
    "--keep", type=float, help="With --rank auto: share of a weight's squared change to keep.  [default: 0.99]"
)
@click.option(
    "--others",
    type=click.Choice(OTHERS),
    default="refuse",
    show_default=True,
    help="What happens where norms, biases or embeddings have changed, which pairs do not hold: refuse it by name, "
    "save them as they are (modules_to_save), or leave their changes out.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@quiet_option
@json_option
@command_body
def extract_lora_command(
    tuned: Path,
    base: Path,
    out: Path,
    rank: int | None,
    keep: float | None,
    others: str,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write what fine-tuning changed from the model directory BASE to TUNED as a LoRA adapter OUT: of each matrix the
    best approximation of the rank."""
    from weightport.adapters.extraction import extract_lora, largest_loss

    lines = Lines(quiet=quiet or as_json)
    with lines.progress("compare") as (start, advance):
        result = extract_lora(
            tuned, base, out, rank, keep=keep, others=others, overwrite=overwrite, announce=start, advance=advance
        )
    if as_json:
        found = {
            "directory": str(out),
            "share": result.share,
            "kept": dict(result.kept),
            "ranks": dict(result.ranks),
            "whole": list(result.whole),
            "left": list(result.left),
        }
        echo(json.dumps(found, ensure_ascii=False))
        return
    ranks = sorted(result.ranks.values()) or [0]
    shown = f"rank {ranks[-1]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
    lines.heading(f"{out} · {shown} · {len(result.kept)} pairs · {len(result.whole)} tensors saved as a whole")
    lines.line("kept", f"{result.share:.1%} of the squared change of the pairs' weights")
    worst_kept = largest_loss(result)
    if worst_kept is not None:
        lines.line("least", f"{worst_kept[0]}: {worst_kept[1]:.1%}")
    if result.left:
        lines.line(
            "left out", f"the changes of {len(result.left)} tensors, {result.left[0]} among them (extraction.json)"
        )
    lines.line("next", f"port-merge-lora {shlex.quote(str(base))} {shlex.quote(str(out))} MERGED")
