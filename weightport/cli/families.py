"""`weightport families` and `weightport family-check`: what can be converted, and whether a family keeps its word."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightport.cli.display import Lines, echo
from weightport.cli.paths import ExistingPath
from weightport.cli.running import command_body, json_option
from weightport.converters.options import declared_options
from weightport.errors import FamilyError
from weightport.families.registry import Offer, registry

if TYPE_CHECKING:
    from weightport.conformance import Check
    from weightport.families.declaration import Family


@click.command("families")
@json_option
@command_body
def families_command(as_json: bool) -> None:
    """List the families of models that can be converted, with their options and sources."""
    found = [_described(offer) for offer in registry().offers]
    if as_json:
        echo(json.dumps(found, ensure_ascii=False))
        return
    lines = Lines(quiet=False)
    for family in found:
        lines.heading(f"{family['name']} · {family.get('title', '')} · {family['package']}")
        if "error" in family:
            lines.line("broken", family["error"])
            continue
        lines.line("converts", f"{family['converts']} → {', '.join(family['native'])}")
        lines.line("command", family["command"])
        for kind in ("options", "sources"):
            for flag, help_text in family[kind].items():
                lines.line(kind.removesuffix("s"), f"{flag}: {help_text}")
        lines.line("stages", " · ".join(family["stages"]))


def _described(offer: Offer) -> dict[str, Any]:
    try:
        family = registry()[offer.name]
    except FamilyError as error:
        return {"name": offer.name, "package": offer.package, "error": str(error)}
    return {
        "name": family.name,
        "package": offer.package,
        "title": family.title,
        "converts": family.original,
        "native": list(family.model_types),
        "command": family.command if offer.package == "weightport" else f"weightport convert --family {family.name}",
        "options": {declared.flag: declared.help for _, declared in declared_options(family.options)},
        "sources": {source.flag: source.help for source in family.sources},
        "stages": _stages(family),
    }


def _stages(family: Family) -> list[str]:
    stages = {"conversion": family.conversion_stage, "parity": family.parity_stage, "training": family.training_stage}
    return [name for name, reference in stages.items() if reference is not None]


@click.command("family-check")
@click.argument("family")
@click.argument("cases", nargs=-1, required=True, type=ExistingPath())
@json_option
@command_body
def family_check_command(family: str, cases: tuple[Path, ...], as_json: bool) -> None:
    """Hold FAMILY to its interface on CASES: folders with an original checkpoint and reference.safetensors, what the
    original computed on it. The exit status is 1 when a check fails."""
    from weightport.conformance import check_family, read_case

    lines = Lines(quiet=as_json)
    found = check_family(
        registry()[family],
        registry(),
        [read_case(folder) for folder in cases],
        lambda check: lines.line(_STATES[check.passed], f"{check.case}{': ' if check.case else ''}{_said(check)}"),
    )
    if as_json:
        echo(json.dumps([asdict(check) for check in found], ensure_ascii=False))
    if any(check.passed is False for check in found):
        click.get_current_context().exit(1)


_STATES = {True: "holds", False: "fails", None: "not run"}


def _said(check: Check) -> str:
    return f"{check.name} · {check.detail}"
