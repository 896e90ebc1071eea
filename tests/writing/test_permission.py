"""--overwrite replaces what weightport wrote, and nothing else; no output takes the place of what is read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from weightport.errors import OutputError
from weightport.writing import (
    own_file,
    replaced_directory,
    require_directory,
    require_file,
    whole_directory,
    whole_file,
)
from weightport.writing.ownership import MADE_BY, RECORD, strangers


@pytest.fixture
def output(tmp_path):
    """A folder that weightport wrote."""
    with whole_directory(tmp_path / "out") as work:
        (work / "config.json").write_text("{}")
        (work / "deep").mkdir()
        (work / "deep" / "weights").write_text("w")
    return tmp_path / "out"


def refused(target: Path, *said: str, **options) -> None:
    """Before any work, by the first look and by the writer, with everything still there."""
    before = sorted(target.rglob("*")) if target.is_dir() else None
    for attempt in (lambda: require_directory(target, overwrite=True, **options), lambda: _write(target, **options)):
        with pytest.raises(OutputError) as raised:
            attempt()
        for text in said:
            assert text in str(raised.value), raised.value
    assert before is None or sorted(target.rglob("*")) == before


def _write(target: Path, **options) -> None:
    with whole_directory(target, overwrite=True, **options):
        raise AssertionError("the block ran")


def test_what_weightport_wrote_is_replaced(output):
    require_directory(output, overwrite=True)


def test_a_folder_of_photographs_is_not_replaced(tmp_path):
    (tmp_path / "holidays" / ".ssh").mkdir(parents=True)
    (tmp_path / "holidays" / "beach.jpg").write_text("x")
    (tmp_path / "holidays" / ".ssh" / "id").write_text("x")
    refused(tmp_path / "holidays", "not written by weightport", ".ssh/id", "beach.jpg")


def test_a_folder_with_the_users_own_recipe_is_not_taken_for_a_run(tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "recipe.yaml").write_text("name: mine")
    (tmp_path / "project" / "train.py").write_text("x")
    refused(tmp_path / "project", "not written by weightport", "train.py")


@pytest.mark.parametrize("name", ["notes.txt", "deep/notes.txt", "new/er/notes.txt", ".hidden"])
def test_a_file_that_was_put_into_an_output_stands_in_the_way(output, name):
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    (output / name).write_text("mine")
    refused(output, f"{name} is not weightport's")


def test_links_in_an_output_stand_in_the_way(output, tmp_path):
    (output / "data").symlink_to(tmp_path)
    refused(output, "data is not weightport's")
    (output / "data").unlink()
    (output / "config.json").unlink()
    (output / "config.json").symlink_to(tmp_path / "elsewhere.json")
    refused(output, "config.json was changed")


@pytest.mark.parametrize("longer", [True, False])
def test_weights_that_the_user_saved_over_those_of_weightport_stand_in_the_way(output, longer):
    """save_pretrained of a trained model into the folder that it was loaded from: the same names and sizes."""
    weights = output / "deep" / "weights"
    state = weights.stat()
    weights.write_text("ww" if longer else "v")
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns + (0 if longer else 1000)))
    refused(output, "deep/weights was changed since weightport wrote it")


def test_a_copy_that_keeps_times_is_known_and_one_of_whole_seconds_too(output, tmp_path):
    shutil.copytree(output, tmp_path / "copy")
    require_directory(tmp_path / "copy", overwrite=True)
    for path in (tmp_path / "copy").rglob("*"):
        os.utime(path, (0, int(path.stat().st_mtime)))
    require_directory(tmp_path / "copy", overwrite=True)


def test_a_record_that_cannot_be_read_is_none(output):
    for content in ("", "[]", '{"format": 2, "files": {}}', '{"format": 1, "files": 3}', "\xff"):
        (output / RECORD).write_text(content, encoding="latin-1")
        refused(output, "more than weightport wrote", "config.json")
    (output / RECORD).unlink()
    refused(output, f"it has no {RECORD}")


def test_what_weightport_adds_to_its_output_later_is_its_own(output):
    with own_file(output / "conversion.json") as work:
        work.write_text("{}")
    with whole_file(output / "parity.json") as work:
        work.write_text(MADE_BY)
    require_directory(output, overwrite=True)
    (output / "parity.json").write_text("the user's")
    refused(output, "parity.json was changed")


def test_an_output_within_an_output_is_judged_by_its_own_record(tmp_path):
    with replaced_directory(tmp_path / "run", lambda folder: None, also=("checkpoints/checkpoint-*",)) as keep:
        keep()
        (tmp_path / "run" / "checkpoints" / "checkpoint-1").mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / "checkpoint-1" / "optimizer.pt").write_text("x")
        with whole_directory(tmp_path / "run" / "model") as work:
            (work / "weights").write_text("x")
    require_directory(tmp_path / "run", overwrite=True)
    (tmp_path / "run" / "model" / "weights").write_text("the user's")
    (tmp_path / "run" / "checkpoints" / "notes").write_text("the user's")
    assert {each.path for each in strangers(tmp_path / "run")} == {"model/weights", "checkpoints/notes"}
    refused(tmp_path / "run", "model/weights was changed", "checkpoints/notes is not")


def test_what_appears_in_an_output_while_the_new_one_is_made_stands_in_the_way(output):
    with pytest.raises(OutputError, match=r"late\.txt"), whole_directory(output, overwrite=True):
        (output / "late.txt").write_text("mine")
    assert sorted(os.listdir(output)) == [RECORD, "config.json", "deep", "late.txt"]


@pytest.mark.parametrize("how", ["itself", "holds it", "as a link", "through a link", "with dots"])
@pytest.mark.parametrize("kind", ["inputs", "beside"])
def test_an_output_is_not_and_does_not_hold_what_is_read(output, tmp_path, how, kind):
    (tmp_path / "link").symlink_to(output)
    target, read = {
        "itself": (output, output),
        "holds it": (output, output / "deep" / "weights"),
        "as a link": (tmp_path / "link", output),
        "through a link": (output, tmp_path / "link" / "deep"),
        "with dots": (output / "deep" / "..", output),
    }[how]
    refused(target, "is read", **{kind: [read]})


def test_an_output_is_not_and_does_not_hold_the_working_directory_or_home(output, monkeypatch):
    monkeypatch.setenv("HOME", str(output / "deep"))
    refused(output, "holds your home folder")
    monkeypatch.setenv("HOME", "/")
    monkeypatch.chdir(output)
    refused(output, "is the working directory")
    refused(Path("."), "is the working directory")
    monkeypatch.chdir(output / "deep")
    refused(output, "holds the working directory")
    with pytest.raises(OutputError, match="holds the working directory"):
        require_directory(Path("/"), overwrite=True)


def test_an_output_does_not_lie_in_what_it_is_made_from(output, tmp_path):
    (tmp_path / "link").symlink_to(output / "deep")
    for target in (output / "new", tmp_path / "link" / "new"):
        with pytest.raises(OutputError, match=r"lies in .*out, which is read"):
            require_directory(target, overwrite=True, inputs=[output])
        with pytest.raises(OutputError, match=r"lies in .*out, which is read"):
            require_file(target, overwrite=True, inputs=[output])
        require_directory(target, overwrite=True, beside=[output])
    # Beside a source that is a file is where outputs usually go.
    require_directory(output / "new", overwrite=True, inputs=[output / "config.json"])


def test_what_is_no_path_of_this_machine_stands_in_nobodys_way(output, monkeypatch):
    monkeypatch.chdir(output.parent)
    require_directory(Path("out"), overwrite=True, inputs=[None, "out/dataset-of-the-hub", "bert-base-chinese"])


def test_an_output_that_is_a_link_is_written_where_it_points(output, tmp_path):
    (tmp_path / "link").symlink_to(output)
    with whole_directory(tmp_path / "link", overwrite=True) as work:
        (work / "new").write_text("x")
    assert (tmp_path / "link").is_symlink() and (output / "new").exists() and not (output / "config.json").exists()
    (tmp_path / "dangling").symlink_to(tmp_path / "made")
    with whole_file(tmp_path / "dangling"):
        pass
    assert (tmp_path / "dangling").is_symlink() and (tmp_path / "made").is_file()


def test_a_file_is_no_place_for_a_folder(tmp_path):
    (tmp_path / "out").write_text(MADE_BY)
    refused(tmp_path / "out", "is no folder")


@pytest.mark.parametrize("content", ["the user's", "", "x" * 100_000])
def test_a_file_of_the_users_is_not_replaced(tmp_path, content):
    (tmp_path / "model.pt").write_text(content)
    with pytest.raises(OutputError, match="not written by weightport"):
        require_file(tmp_path / "model.pt", overwrite=True)
    (tmp_path / "model.pt").write_text(content + MADE_BY)
    require_file(tmp_path / "model.pt", overwrite=True)


def test_a_pipe_is_no_place_for_an_output(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="no regular file"):
        require_file(tmp_path / "pipe", overwrite=True)
