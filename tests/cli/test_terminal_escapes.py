"""What a file calls its tensors cannot act on the terminal, forge a line, or stop the printing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from weightport import cli
from weightport.checkpoints import open_checkpoint
from weightport.cli.display import inert

EVIL = "a\x1b[2J\x9b31m\u202e\nfamily   OFA (fairseq)"
ESCAPED = r"a\x1b[2J\x9b31m\u202e\nfamily   OFA (fairseq)"


def inspected(path: Path, *options: str) -> Result:
    result = CliRunner().invoke(cli.main, ["inspect", str(path), *options])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(params=["torch", "safetensors"])
def hostile(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "torch":
        torch.save({EVIL: torch.zeros(2), "note": EVIL, EVIL + "?": {"x": torch.zeros(1)}}, tmp_path / "c")
    else:
        save_file({EVIL: torch.zeros(2)}, tmp_path / "c", metadata={"note": EVIL})
    return tmp_path / "c"


def test_names_are_printable(hostile: Path):
    checkpoint = open_checkpoint(hostile)
    assert ESCAPED in checkpoint and checkpoint[ESCAPED].name == ESCAPED
    assert checkpoint[ESCAPED].read().shape == (2,)


def test_inspecting_shows_escapes_instead_of_obeying_them(hostile: Path):
    output = inspected(hostile, "--tensors").output
    assert ESCAPED in output
    assert all(character.isprintable() or character == "\n" for character in output)
    assert sum(line.startswith("family") for line in output.splitlines()) == 1


def test_inspecting_as_json_stays_json(hostile: Path):
    output = inspected(hostile, "--json", "--tensors").output
    assert all(character.isprintable() or character == "\n" for character in output)
    assert ESCAPED in json.loads(output)["tensors"]
    assert EVIL in str(json.loads(output)["document"]).encode().decode("unicode_escape")


def test_errors_and_notes_are_printable(hostile: Path, tmp_path: Path):
    result = CliRunner().invoke(cli.port_ofa, [str(hostile), str(tmp_path / "out")])
    assert result.exit_code == 1 and "is not a checkpoint of OFA" in result.output, result.output
    assert all(character.isprintable() or character == "\n" for character in result.output)


def test_the_last_gate_escapes_what_reaches_it():
    assert inert(f"line\n\t{EVIL}\x7f\r\ud800é") == (
        "line\n\ta\\u001b[2J\\u009b31m\\u202e\nfamily   OFA (fairseq)\\u007f\\u000d\\ud800é"
    )
    assert json.loads(inert(json.dumps("\x9b\u202e", ensure_ascii=False))) == "\x9b\u202e"


def test_every_command_prints_through_the_gate():
    found = [
        path.name
        for path in (Path(cli.__file__).parent).glob("*.py")
        if "click.echo(" in path.read_text(encoding="utf-8") and path.name != "display.py"
    ]
    assert found == []


def test_a_path_that_is_not_utf_8_can_be_named_in_an_error(tmp_path: Path):
    path = tmp_path / b"caf\xe9.pt".decode(sys.getfilesystemencoding(), "surrogateescape")
    result = CliRunner().invoke(cli.main, ["inspect", str(path)])
    assert result.exit_code == 2 and r"caf\udce9.pt" in result.output
