"""Outputs appear whole or not at all."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from safetensors import SafetensorError

from weightport.errors import OutputError
from weightport.writing import (
    exchange,
    own_file,
    replaced_directory,
    whole_directory,
    whole_file,
    whole_output,
    working_places,
)
from weightport.writing.ownership import MADE_BY, RECORD, record_file


def written(target, *names: str, overwrite: bool = False, **options) -> None:
    """An output folder with these files."""
    with whole_directory(target, overwrite=overwrite, **options) as work:
        for name in names:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_text(name)


def listed(folder) -> list[str]:
    """The files of an output, without weightport's record of them."""
    return sorted(set(os.listdir(folder)) - {RECORD})


def test_a_directory_appears_only_when_the_block_ends_well(tmp_path):
    target = tmp_path / "out"
    with whole_directory(target) as work:
        (work / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert os.listdir(tmp_path) == ["out"]
    assert listed(target) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_stays_behind_when_the_block_fails(tmp_path, error):
    with pytest.raises(error), whole_directory(tmp_path / "out") as work:
        (work / "file").write_text("x")
        raise error
    assert os.listdir(tmp_path) == []


def test_an_existing_directory_is_not_touched_without_overwrite(tmp_path):
    written(tmp_path / "out", "mine")
    with pytest.raises(OutputError, match="--overwrite"):
        written(tmp_path / "out", "other")
    assert listed(tmp_path / "out") == ["mine"]


def test_overwriting_replaces_everything_and_only_at_the_end(tmp_path):
    target = tmp_path / "out"
    written(target, "old")
    with pytest.raises(RuntimeError), whole_directory(target, overwrite=True):
        raise RuntimeError
    assert listed(target) == ["old"]
    with whole_directory(target, overwrite=True) as work:
        (work / "new").write_text("y")
        assert listed(target) == ["old"]
    assert listed(target) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_directory_is_filled_without_overwrite(tmp_path):
    (tmp_path / "out").mkdir()
    written(tmp_path / "out", "file")
    assert listed(tmp_path / "out") == ["file"]


def test_an_empty_directory_is_refused_where_a_file_is_to_stand(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="is a folder, and the output is a file"), whole_file(tmp_path / "out"):
        raise AssertionError("the block ran")


def test_the_target_is_always_there_while_it_is_replaced(tmp_path, monkeypatch):
    """Between no two calls of the system is the name without a folder: there is one exchange, not two renames."""
    target = tmp_path / "out"
    written(target, "old")
    seen = []
    for name in ("rename", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, **k: (real(*a, **k), seen.append(target.is_dir()))[0])
    written(target, "new", overwrite=True)
    assert listed(target) == ["new"]
    assert all(seen)


@pytest.mark.parametrize("supported", [True, False])
def test_without_the_systems_exchange_outputs_are_replaced_all_the_same(tmp_path, monkeypatch, supported):
    if not supported:
        monkeypatch.setattr(exchange, "_system_call", lambda: None)
    written(tmp_path / "out", "old")
    written(tmp_path / "out", "new", overwrite=True)
    with whole_file(tmp_path / "file") as work:
        work.write_text(f"1 {MADE_BY}")
    with whole_file(tmp_path / "file", overwrite=True) as work:
        work.write_text("2")
    assert listed(tmp_path / "out") == ["new"]
    assert (tmp_path / "file").read_text() == "2"
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]


def test_every_file_and_folder_is_on_the_disk_before_the_output_has_its_name(tmp_path, monkeypatch):
    synced: list[tuple[int, bool]] = []
    target, real = tmp_path / "out", os.fsync
    monkeypatch.setattr(os, "fsync", lambda f: (synced.append((os.fstat(f).st_ino, target.exists())), real(f))[1])
    written(target, "a", "deep/er/b")
    before = {inode for inode, named in synced if not named}
    expected = [target, *target.rglob("*")]
    assert {path.stat().st_ino for path in expected} <= before
    assert (tmp_path.stat().st_ino, True) in synced, "the name itself is not on the disk"


def test_too_little_space_is_found_before_anything_is_written(tmp_path):
    with pytest.raises(OutputError, match="bytes free"), whole_directory(tmp_path / "out", needs=1 << 60):
        raise AssertionError("the block ran")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "input/output error"),
        (errno.EROFS, "read-only"),
        (errno.EFBIG, "ulimit -f"),
        (errno.ESTALE, "network share"),
        (errno.ENOTCONN, "not connected"),
        (errno.EMFILE, "too many files"),
    ],
)
@pytest.mark.parametrize("whole", [whole_directory, whole_file, own_file])
def test_what_a_disk_refuses_is_one_clear_error_and_leaves_nothing(tmp_path, whole, code, said):
    with pytest.raises(OutputError, match=f"Cannot write .*out: .*{said}"), whole(tmp_path / "out"):
        raise OSError(code, os.strerror(code))
    assert os.listdir(tmp_path) == []


def test_a_disk_error_within_safetensors_is_recognised(tmp_path):
    said = "I/O error: No space left on device (os error 28)"
    with pytest.raises(OutputError, match="disk is full"), whole_directory(tmp_path / "out"):
        raise SafetensorError(said)
    with pytest.raises(SafetensorError, match="header"), whole_directory(tmp_path / "out"):
        raise SafetensorError("invalid header")


def test_an_error_of_reading_another_file_is_not_called_one_of_writing(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), whole_directory(tmp_path / "out"):
        (tmp_path / "elsewhere").read_text()
    with pytest.raises(BrokenPipeError, match="went away"), whole_directory(tmp_path / "out"):
        raise BrokenPipeError(errno.EPIPE, "the reader of our output went away")


def test_a_disk_that_fills_up_while_a_file_is_copied_is_an_error_of_the_output(tmp_path):
    """shutil names the source first in what it raises."""
    with pytest.raises(OutputError, match="disk is full"), whole_directory(tmp_path / "out") as work:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "source"), None, str(work / "copy"))
    with pytest.raises(OutputError, match="input/output"), whole_directory(tmp_path / "out") as work:
        raise OSError(errno.EIO, "Input/output error", str(tmp_path / "source"), None, str(work / "copy"))


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"), whole_directory(tmp_path / "file" / "out"):
        raise AssertionError("the block ran")


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 120])
def test_a_long_name_leaves_room_for_the_working_files(tmp_path, name):
    written(tmp_path / name, "file")
    written(tmp_path / name, "again", overwrite=True)
    assert os.listdir(tmp_path) == [name]
    with pytest.raises(OutputError, match="name is too long"):
        written(tmp_path / (name + "x" * 256), "file")


def test_of_two_writers_the_second_finds_the_output_of_the_first(tmp_path):
    with pytest.raises(OutputError, match="exists"), whole_directory(tmp_path / "out") as second:
        (second / "file").write_text("second")
        written(tmp_path / "out", "first")
        assert (second / "file").exists(), "a run at work was taken for an abandoned one"
    assert listed(tmp_path / "out") == ["first"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("whole", [whole_directory, whole_file])
def test_a_writer_that_comes_in_between_is_replaced_only_when_asked(tmp_path, monkeypatch, whole, overwrite):
    """The moment between the last look and the name: the system itself refuses to replace anything then."""
    target, real = tmp_path / "out", whole_output.give_name

    def write(content: str) -> None:
        with whole(target, overwrite=overwrite) as work:
            (work / "file" if whole is whole_directory else work).write_text(f"{content} {MADE_BY}")

    def raced(work, place):
        monkeypatch.setattr(whole_output, "give_name", real)
        write("first")
        real(work, place)

    monkeypatch.setattr(whole_output, "give_name", raced)
    if overwrite:
        write("second")
    else:
        with pytest.raises(OutputError, match="another run has written it"):
            write("second")
    found = (target / "file" if whole is whole_directory else target).read_text()
    assert found.split()[0] == ("second" if overwrite else "first")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("whole", [whole_directory, whole_file])
def test_an_output_that_is_removed_in_between_is_written_anew(tmp_path, monkeypatch, whole):
    target, real = tmp_path / "out", whole_output.exchange_with

    def write(content: str) -> None:
        with whole(target, overwrite=True) as work:
            (work / "file" if whole is whole_directory else work).write_text(f"{content} {MADE_BY}")

    def removed(work, place):
        exchange.remove(place)
        real(work, place)

    write("first")
    monkeypatch.setattr(whole_output, "exchange_with", removed)
    write("second")
    assert (target / "file" if whole is whole_directory else target).read_text().startswith("second")


@pytest.mark.parametrize("overwrite", [True, False])
def test_many_writers_at_once_leave_one_whole_output(tmp_path, overwrite):
    target, start, refused = tmp_path / "out", threading.Barrier(8), []

    def write(number: int) -> None:
        start.wait()
        try:
            with whole_directory(target, overwrite=overwrite) as work:
                for part in range(4):
                    (work / f"{part}").write_text(str(number))
        except OutputError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({(target / f"{part}").read_text() for part in range(4)}) == 1
    assert os.listdir(tmp_path) == ["out"]
    assert len(refused) == (0 if overwrite else 7), refused


def test_a_file_appears_whole(tmp_path):
    target = tmp_path / "model.pt"
    with pytest.raises(RuntimeError), whole_file(target) as work:
        work.write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with whole_file(target) as work:
        work.write_text("all")
    assert target.read_text() == "all"
    with pytest.raises(OutputError, match="--overwrite"), whole_file(target):
        raise AssertionError("the block ran")


def test_the_umask_decides_who_may_read(tmp_path):
    written(tmp_path / "out", "file")
    with whole_file(tmp_path / "alone"):
        pass
    mask = whole_output._umask()
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
    assert (tmp_path / "alone").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    def refuse(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(working_places.fcntl, "flock", refuse)
    written(tmp_path / "out", "file")
    assert listed(tmp_path / "out") == ["file"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [Exception, SafetensorError])
def test_an_error_of_the_disk_that_rust_says_in_words_is_one_of_ours(tmp_path, error):
    with pytest.raises(OutputError, match="the disk is full"), whole_directory(tmp_path / "out"):
        raise error("No space left on device (os error 28)")
    assert not list(tmp_path.iterdir())


def test_an_error_without_a_number_of_the_system_stays_what_it_is(tmp_path):
    with pytest.raises(Exception, match="no such thing"), whole_directory(tmp_path / "out"):
        raise Exception("no such thing")


def test_a_list_of_files_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    with whole_directory(tmp_path / "out") as work:
        (work / "a").write_text("a")
    kept = (tmp_path / "out" / RECORD).read_text()

    def full(path, text, encoding=None):
        path.touch()
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match=r"Cannot write .*\.weightport\.json: the disk is full"):
        record_file(tmp_path / "out" / "a")
    assert sorted(os.listdir(tmp_path / "out")) == [RECORD, "a"]
    assert (tmp_path / "out" / RECORD).read_text() == kept


def fails(*_: object, **__: object) -> int:
    raise OSError(errno.EDQUOT, "quota")


def test_a_run_that_cannot_have_its_working_place_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(working_places, "_locked", fails)
    with (
        pytest.raises(OutputError, match="the disk quota is used up"),
        replaced_directory(tmp_path / "run", lambda folder: None),
    ):
        raise AssertionError("it was let in")


def test_what_failed_first_is_told_when_a_run_cannot_be_cleared_either(tmp_path, monkeypatch):
    with (
        pytest.raises(ValueError, match="the first"),
        replaced_directory(tmp_path / "run", lambda folder: None),
    ):
        monkeypatch.setattr(working_places, "_clear", fails)
        raise ValueError("the first")


def test_a_run_that_ends_well_and_cannot_be_cleared_says_so(tmp_path, monkeypatch):
    with pytest.raises(OutputError, match="quota"), replaced_directory(tmp_path / "run", lambda folder: None):
        monkeypatch.setattr(working_places, "_clear", fails)


def test_a_run_that_could_not_be_brought_back_is_by_the_next_one(tmp_path, monkeypatch):
    written(tmp_path / "run", "old")

    def fill(folder):
        (folder / "new").write_text("new")

    with (
        pytest.raises(ValueError, match="the first"),
        replaced_directory(tmp_path / "run", fill, overwrite=True),
    ):
        monkeypatch.setattr(working_places, "exchange_with", fails)
        raise ValueError("the first")
    assert (tmp_path / "run" / "new").exists()
    monkeypatch.undo()
    with whole_file(tmp_path / "other") as work:
        work.write_text("x")
    assert listed(tmp_path / "run") == ["old"] and sorted(os.listdir(tmp_path)) == ["other", "run"]
