"""`weightport compare`: the weights of two model directories or checkpoints, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from weightport.cli.display import echo, output_console
from weightport.cli.paths import ExistingPath
from weightport.cli.running import command_body, json_option, quiet_option

if TYPE_CHECKING:
    from weightport.parity.difference import TensorDifference, WeightsReport

FAILED = 1
SHOWN = 40


@click.command("compare")
@click.argument("a", type=ExistingPath())
@click.argument("b", type=ExistingPath())
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=1e-6,
    show_default=True,
    help="Largest difference, relative to the root mean square of A's tensor, that is still close.",
)
@json_option
@quiet_option
@command_body
def compare_command(a: Path, b: Path, tolerance: float, as_json: bool, quiet: bool) -> None:
    """Compare the weights in A and B: model directories or checkpoint files of any format.

    Used after a merge, an export or a re-save. The exit status is 1 when a tensor differs or only one side has it.
    """
    from weightport.parity.difference import compare_weights

    report = compare_weights(a, b, tolerance=tolerance)
    if as_json:
        echo(report.to_json(), nl=False)
    elif not quiet:
        _show(report)
    if not report.passed:
        click.get_current_context().exit(FAILED)


def _show(report: WeightsReport) -> None:
    from rich.table import Table
    from rich.text import Text

    from weightport.parity.difference import Sameness

    console = output_console()
    kinds = [kind for kind in Sameness if report.count(kind)]
    unequal = {
        module: rows
        for module, rows in report.by_module().items()
        if any(each.sameness is not Sameness.EQUAL for each in rows)
    }
    if unequal:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("module", overflow="fold")
        for kind in kinds:
            table.add_column(kind.value, justify="right", no_wrap=True)
        table.add_column("largest difference", overflow="fold")
        for module, rows in list(unequal.items())[:SHOWN]:
            counts = [sum(each.sameness is kind for each in rows) for kind in kinds]
            passed = all(each.sameness.passes for each in rows)
            worst = max(rows, key=_badness)
            table.add_row(
                Text(module),
                *(str(count or "") for count in counts),
                Text(_said(worst)),
                style="" if passed else "red",
            )
        console.print(table)
    if len(unequal) > SHOWN:
        console.print(f"… and {len(unequal) - SHOWN} more modules (--json has them all)")
    for side, prefix in zip("AB", report.prefixes):
        if prefix:
            console.print(Text(f"the model of {side} stands below {prefix}"), soft_wrap=True)
    for each in report.left_out:
        console.print(
            Text(f"left out of {each.side}: {each.section} ({each.tensors} tensors), a trainer's state and no model"),
            soft_wrap=True,
        )
    console.print(Text(report.verdict, style="bold green" if report.passed else "bold red"), soft_wrap=True)


def _badness(each: TensorDifference) -> tuple[bool, float]:
    return not each.sameness.passes, each.relative if each.sameness.value == "different" or each.largest else 0.0


def _said(each: TensorDifference) -> str:
    name = each.name.rpartition(".")[2]
    if not each.largest:
        return f"{name}: {each.note}" if each.note else ""
    place = f"{name}{list(each.index or ())}: {each.a:.6g} and {each.b:.6g}"
    return f"{each.largest:.1e} ({each.relative:.1e} of the scale) at {place}" + (
        f"; {each.note}" if each.note else ""
    )
