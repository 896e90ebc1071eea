"""Outputs appear whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from weightport.errors import OutputError
from weightport.writing import whole_directory, whole_file, whole_output


def test_a_directory_appears_only_when_the_block_ends_well(tmp_path):
    target = tmp_path / "out"
    with whole_directory(target) as work:
        (work / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(target) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_stays_behind_when_the_block_fails(tmp_path, error):
    with pytest.raises(error), whole_directory(tmp_path / "out") as work:
        (work / "file").write_text("x")
        raise error
    assert os.listdir(tmp_path) == []


def test_an_existing_directory_is_not_touched_without_overwrite(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OutputError, match="--overwrite"), whole_directory(tmp_path / "out"):
        raise AssertionError("the block ran")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_overwriting_replaces_everything_and_only_at_the_end(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("x")
    with pytest.raises(RuntimeError), whole_directory(target, overwrite=True):
        raise RuntimeError
    assert os.listdir(target) == ["old"]
    with whole_directory(target, overwrite=True) as work:
        (work / "new").write_text("y")
        assert os.listdir(target) == ["old"]
    assert os.listdir(target) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_too_little_space_is_found_before_anything_is_written(tmp_path):
    with pytest.raises(OutputError, match="bytes free"), whole_directory(tmp_path / "out", needs=1 << 60):
        raise AssertionError("the block ran")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path):
    with pytest.raises(OutputError, match="disk is full"), whole_directory(tmp_path / "out") as work:
        (work / "file").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"), whole_directory(tmp_path / "file" / "out"):
        raise AssertionError("the block ran")


def test_the_rest_of_a_killed_run_is_removed_by_the_next(tmp_path):
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from weightport.writing import whole_directory
        with whole_directory(Path(sys.argv[1])) as work:
            (work / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    target = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", script, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    assert len(os.listdir(tmp_path)) == 1
    with whole_directory(target) as work:
        (work / "file").write_text("x")
    assert os.listdir(tmp_path) == ["out"]


def test_a_run_at_work_is_not_taken_for_an_abandoned_one(tmp_path):
    with whole_directory(tmp_path / "out") as first:
        (first / "file").write_text("first")
        with whole_directory(tmp_path / "out") as second:
            (second / "file").write_text("second")
            assert (first / "file").exists()
        with pytest.raises(OutputError), whole_directory(tmp_path / "out"):
            raise AssertionError("the block ran")
        (tmp_path / "out" / "file").unlink()


def test_a_file_appears_whole(tmp_path):
    target = tmp_path / "model.pt"
    with pytest.raises(RuntimeError), whole_file(target) as work:
        work.write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with whole_file(target) as work:
        work.write_text("all")
    assert target.read_text() == "all"
    with pytest.raises(OutputError), whole_file(target):
        raise AssertionError("the block ran")


def test_the_umask_decides_who_may_read(tmp_path):
    with whole_directory(tmp_path / "out") as work:
        (work / "file").write_text("x")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~whole_output._umask()
