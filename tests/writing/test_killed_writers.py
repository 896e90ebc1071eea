"""A writer may be killed between any two calls of the system: the output is whole, and the next run cleans up."""

from __future__ import annotations

import os

import pytest
from killing import content_of, fill, killed_at_every_call

from weightport.writing import exchange, replaced_directory, whole_directory, whole_file
from weightport.writing.ownership import MADE_BY


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What a kill leaves does not depend on what is on the disk; tests/writing/test_whole_outputs.py looks at that."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(params=["exchange", "two renames"])
def system(request, monkeypatch) -> str:
    """With RENAME_EXCHANGE, and as on a file system without it."""
    if request.param == "two renames":
        monkeypatch.setattr(exchange, "_system_call", lambda: None)
    return request.param


@pytest.mark.parametrize("existing", [None, "old"])
def test_a_killed_writer_of_a_folder_leaves_the_old_or_the_new_one_whole(tmp_path, system, existing):
    parent, seen = tmp_path / "parent", []
    target = parent / "out"

    def write(content: str) -> None:
        with whole_directory(target, overwrite=True) as work:
            fill(work, content)

    def prepare() -> None:
        exchange.remove(parent)
        parent.mkdir()
        if existing:
            write(existing)

    def check() -> None:
        if system == "exchange" or target.exists() or not existing:
            seen.append(content_of(target) if target.exists() else None)
        # Whatever is written next beside it, a run that is killed in the same place or none: all is in order then.
        with whole_file(parent / "other.pt") as work:
            work.write_text("x")
        assert sorted(os.listdir(parent)) in (["other.pt"], ["other.pt", "out"])
        assert (content_of(target) if target.exists() else None) in (existing, "new")
        assert target.exists() or not existing, "the old output is gone"
        write("next")
        assert content_of(target) == "next" and sorted(os.listdir(parent)) == ["other.pt", "out"]

    calls = killed_at_every_call(lambda: write("new"), prepare, check)
    assert calls > 20 and set(seen) == {existing, "new"}, f"{calls} calls; the output was {set(seen)}"


@pytest.mark.parametrize("existing", [None, "old"])
def test_a_killed_writer_of_a_file_leaves_the_old_or_the_new_one_whole(tmp_path, system, existing):
    parent, seen = tmp_path / "parent", []
    target = parent / "model.pt"

    def write(content: str) -> None:
        with whole_file(target, overwrite=True) as work:
            work.write_text(f"{content} {MADE_BY}")

    def prepare() -> None:
        exchange.remove(parent)
        parent.mkdir()
        if existing:
            write(existing)

    def check() -> None:
        seen.append(target.read_text().split()[0] if target.exists() else None)
        write("next")
        assert os.listdir(parent) == ["model.pt"] and target.read_text().startswith("next")

    killed_at_every_call(lambda: write("new"), prepare, check)
    assert set(seen) == {existing, "new"}


def test_a_killed_run_gives_way_to_the_one_it_was_to_replace(tmp_path, system):
    parent, seen = tmp_path / "parent", []
    target, reached = parent / "run", parent / "checkpoint-reached"

    def train(content: str) -> None:
        with replaced_directory(
            target, lambda folder: fill(folder, content), overwrite=True, also=("step-*",), carried=("features",)
        ) as keep:
            (target / "step-1").write_text(content)
            reached.touch()
            keep()
            (target / "step-2").write_text(content)

    def prepare() -> None:
        exchange.remove(parent)
        parent.mkdir()
        with whole_directory(target) as work:
            fill(work, "old")
            (work / "features").mkdir()
            (work / "features" / "kept").write_text("features")

    def check() -> None:
        had_checkpoint = reached.exists()
        with whole_file(parent / "other.pt") as work:
            work.write_text("x")
        assert set(os.listdir(parent)) - {reached.name} == {"other.pt", "run"}
        found = (target / "config.json").read_text()
        seen.append(found)
        assert found == (target / "deep" / "weights").read_text()
        assert found == "old" or had_checkpoint, "the earlier run was given up before there was a checkpoint"
        assert (found == "old") == (not (target / "step-1").exists())
        assert (target / "features" / "kept").read_text() == "features"

    killed_at_every_call(lambda: train("new"), prepare, check)
    assert set(seen) == {"old", "new"}


def test_nothing_of_a_run_at_work_is_taken_for_the_rest_of_a_killed_one(tmp_path):
    with whole_directory(tmp_path / "out") as work:
        (work / "file").write_text("x")
        exchange.remove(tmp_path / "nothing")
        with whole_file(tmp_path / "other.pt") as other:
            other.write_text("y")
        assert (work / "file").read_text() == "x"


def test_a_lock_that_was_never_written_to_is_removed(tmp_path):
    (tmp_path / ".out.weightport-0123456789abcdef.lock").touch()
    (tmp_path / ".out.weightport-mine.lock").touch()
    with whole_file(tmp_path / "out"):
        pass
    assert sorted(os.listdir(tmp_path)) == [".out.weightport-mine.lock", "out"]
