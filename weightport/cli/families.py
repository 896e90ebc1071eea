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
@click.option("--check", is_flag=True, help="Run the conformance kit on the cases that are installed with a family.")
@click.option(
    "--cases",
    "folders",
    metavar="DIR",
    multiple=True,
    type=ExistingPath(),
    help="Run it on the cases in DIR as well, at any depth, each for the family that it names.",
)
@json_option
@command_body
def families_command(check: bool, folders: tuple[Path, ...], as_json: bool) -> None:
    """List the families of models that can be converted, with their options and sources, and with --check whether
    their cases pass. The exit status is 1 when one does not."""
    elsewhere = _cases_by_family(folders)
    found = []
    lines = Lines(quiet=as_json)
    for offer in registry().offers:
        described = _described(offer)
        found.append(described)
        _print(lines, described)
        if (check or folders) and "error" not in described:
            described["cases"] = _judged(lines, registry()[offer.name], elsewhere.get(offer.name, []))
    if as_json:
        echo(json.dumps(found, ensure_ascii=False))
    if any(not passed for described in found for passed in described.get("cases", {}).values()):
        click.get_current_context().exit(1)


def _print(lines: Lines, family: dict[str, Any]) -> None:
    lines.heading(f"{family['name']} · {family.get('title', '')} · {family['package']}")
    if "error" in family:
        lines.line("broken", family["error"])
        return
    lines.line("converts", f"{family['converts']} → {', '.join(family['native'])}")
    lines.line("command", family["command"])
    for kind in ("options", "sources"):
        for flag, help_text in family[kind].items():
            lines.line(kind.removesuffix("s"), f"{flag}: {help_text}")
    lines.line("stages", " · ".join(family["stages"]))


def _cases_by_family(folders: tuple[Path, ...]) -> dict[str, list[Path]]:
    """The cases below `folders`, by the family that they name. Raises FamilyError for one of an unknown family."""
    if not folders:
        return {}
    from weightport.conformance import family_of_case, find_cases

    found: dict[str, list[Path]] = {}
    for folder in folders:
        cases = find_cases(folder)
        if not cases:
            raise FamilyError(f"{folder} holds no cases: no folder in it has a case.json or reference.safetensors.")
        for case in cases:
            found.setdefault(registry()[family_of_case(case)].name, []).append(case)
    return found


def _judged(lines: Lines, family: Family, more: list[Path]) -> dict[str, bool]:
    """Whether each case passes, by its folder's name: those installed with the family, and `more`."""
    from weightport.conformance import check_family, installed_cases, read_case

    folders = [*installed_cases(family), *more]
    if not folders:
        lines.line("cases", "none are installed with it (--cases DIR)")
    passed: dict[str, bool] = {}
    for folder in folders:
        checks = check_family(family, registry(), [read_case(folder)])
        failed = [check for check in checks if check.passed is False]
        made = sum(check.passed is not None for check in checks)
        lines.line("case", f"{folder.name}: {made - len(failed)} of {made} checks hold")
        for each in failed:
            lines.line("fails", _said(each))
        passed[folder.name] = not failed
    return passed


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
