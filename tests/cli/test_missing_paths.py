"""A path that is not there is a mistake of usage: exit status 2, one error, in every command that reads one."""

from __future__ import annotations

import re

import click
import pytest
from click.testing import CliRunner

from weightport.cli import main

ABSENT = "nowhere/absent.pt"
READ = {
    "convert": [[ABSENT, "out"], [".", "out", "--vocab", "./absent"]],
    "families": [["--cases", ABSENT]],
    "family-check": [["ofa", ABSENT]],
    "inspect": [[ABSENT]],
    "export": [[ABSENT, "out"]],
    "parity": [[ABSENT, "--reference", "."], [".", "--reference", ABSENT]],
    "compare": [[ABSENT, "."], [".", ABSENT]],
    "generate": [[ABSENT, "."], [".", ABSENT]],
    "finetune": [[ABSENT, "--data", ".", "-o", "out"]],
    "evaluate": [[ABSENT, "--data", "."], [".", "--data", ".", "--adapter", ABSENT]],
    "recipes": [["absent.yaml"]],
    "port-adapter": [[ABSENT, "out", "--base", "."], [".", "out", "--base", ABSENT]],
    "merge-lora": [[ABSENT, ".", "out"], [".", ABSENT, "out"], [".", f"{ABSENT}=0.5", "out"]],
    "extract-lora": [[ABSENT, ".", "out", "--rank", "1"], [".", ABSENT, "out", "--rank", "1"]],
    "release": [[ABSENT, "--repo", "org/name"]],
    "verify": [[ABSENT]],
}
"""Command lines by command, each with one path that is not there."""

CONTEXT = click.Context(main)
COMMANDS = {name: main.get_command(CONTEXT, name) for name in main.list_commands(CONTEXT)}


def test_every_command_is_held_to_it():
    assert set(READ) == set(COMMANDS), "a new command: say which of its paths are read"


@pytest.mark.parametrize(("name", "words"), [(name, words) for name, lines in READ.items() for words in lines])
def test_a_path_that_is_not_there_is_a_mistake_of_usage(name, words, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    if "--vocab" in words:
        words = [str(request.getfixturevalue("checkpoint")), *words[1:]]
    done = CliRunner().invoke(main, [name, *words])
    assert done.exit_code == 2, done.output
    assert re.search(r"absent\S* (does not exist|cannot be read)|no vocabulary at ./absent", done.stderr), done.stderr
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_no_two_options_of_a_command_have_one_name(name):
    flags = [flag for each in COMMANDS[name].params for flag in (*each.opts, *each.secondary_opts)]
    assert sorted(flags) == sorted(set(flags))


def test_every_path_that_is_read_is_checked_where_it_is_declared():
    """Only outputs are declared as plain paths."""
    outputs = {"out", "target", "output", "json_file", "page_file"}
    plain = {
        f"{name} {parameter.name}"
        for name, command in COMMANDS.items()
        for parameter in command.params
        if isinstance(parameter.type, click.Path) and parameter.name not in outputs
    }
    assert not plain


def test_a_link_that_leads_nowhere_says_where_it_should_lead(tmp_path):
    (tmp_path / "link.pt").symlink_to(tmp_path / "blob")
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "link.pt")])
    assert done.exit_code == 1 and "is a link to" in done.stderr
