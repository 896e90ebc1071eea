"""Outputs that cannot be renamed, a container's volume above all: their content is exchanged, whole or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap

import pytest
from killing import content_of, fill, killed_at_every_call

from weightport.errors import OutputError
from weightport.writing import exchange, mount_points, replaced_directory, whole_directory, whole_file, working_places
from weightport.writing.ownership import RECORD


@pytest.fixture
def volume(tmp_path, monkeypatch):
    """A folder that nothing may be renamed to, as a mount point is; an ext volume's lost+found is in it."""
    folder = tmp_path / "volume"
    monkeypatch.setattr(working_places, "fills_in_place", lambda path: path == folder)
    _empty(folder)
    return folder


def _empty(folder):
    exchange.remove(folder)
    (folder / "lost+found").mkdir(parents=True)


def _listed(folder) -> list[str]:
    return sorted(set(os.listdir(folder)) - {RECORD, "lost+found"})


def test_a_volume_is_written_inside(volume):
    place = volume.stat().st_ino
    for content in ("first", "second"):
        with whole_directory(volume, overwrite=content == "second") as work:
            fill(work, content)
        shutil.rmtree(volume / "lost+found")
        assert content_of(volume) == content
        (volume / "lost+found").mkdir()
    assert volume.stat().st_ino == place, "the mount point was replaced"
    with pytest.raises(OutputError, match="--overwrite"), whole_directory(volume):
        raise AssertionError("the block ran")


def test_a_failed_run_leaves_a_volume_as_it_was(volume):
    with pytest.raises(RuntimeError), whole_directory(volume) as work:
        fill(work, "half")
        raise RuntimeError
    assert os.listdir(volume) == ["lost+found"]


def test_a_run_that_fails_in_a_volume_gives_way_to_the_earlier_one(volume):
    with whole_directory(volume) as work:
        fill(work, "old")
    with pytest.raises(RuntimeError), replaced_directory(volume, lambda folder: fill(folder, "new"), overwrite=True):
        assert (volume / "config.json").read_text() == "new"
        raise RuntimeError
    assert (volume / "config.json").read_text() == "old"
    assert _listed(volume) == ["config.json", "deep"]


def test_a_first_run_that_fails_in_a_volume_leaves_nothing(volume):
    with pytest.raises(RuntimeError), replaced_directory(volume, lambda folder: fill(folder, "new")):
        raise RuntimeError
    assert os.listdir(volume) == ["lost+found"]


@pytest.mark.parametrize("existing", [None, "old"])
def test_a_writer_that_is_killed_in_a_volume_is_taken_back_or_completed_by_the_next(volume, monkeypatch, existing):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    seen = []

    def write(content: str) -> None:
        with whole_directory(volume, overwrite=True) as work:
            fill(work, content)

    def prepare() -> None:
        _empty(volume)
        if existing:
            write(existing)

    def check() -> None:
        working_places.remove_abandoned(volume)
        shutil.rmtree(volume / "lost+found")
        seen.append(content_of(volume) if _listed(volume) else None)
        assert not [name for name in os.listdir(volume) if ".weightport-" in name]

    killed_at_every_call(lambda: write("new"), prepare, check)
    assert set(seen) == {existing, "new"}


def test_taking_back_may_be_killed_too(volume, monkeypatch):
    """Whatever a killed clean-up leaves is the next one's: the old output is still there at the end."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)

    def prepare() -> None:
        _empty(volume)
        with whole_directory(volume) as work:
            fill(work, "old")
        child = os.fork()
        if child == 0:
            mount_points.sync = lambda path: os._exit(0)  # when all new files stand there, before the commit
            with whole_directory(volume, overwrite=True) as work:
                fill(work, "new")
        os.waitpid(child, 0)
        assert (volume / "config.json").read_text() == "new" and (volume / RECORD).exists()
        # As if one file more had still to be moved.
        (working,) = (path for path in volume.glob(".volume.weightport-*") if path.name.count(".") == 2)
        (volume / RECORD).rename(working / RECORD)

    def check() -> None:
        working_places.remove_abandoned(volume)
        shutil.rmtree(volume / "lost+found")
        assert content_of(volume) == "old"

    killed_at_every_call(lambda: working_places.remove_abandoned(volume), prepare, check)


def test_a_folder_below_one_that_is_not_writable_is_written_inside(tmp_path, monkeypatch):
    real = os.access
    monkeypatch.setattr(mount_points.os, "access", lambda path, how: path != tmp_path and real(path, how))
    (tmp_path / "out").mkdir()
    place = (tmp_path / "out").stat().st_ino
    with whole_directory(tmp_path / "out") as work:
        assert work.parent == tmp_path / "out"
    assert (tmp_path / "out").stat().st_ino == place


def test_a_file_that_is_mounted_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "a b.pt").touch()
    monkeypatch.setattr(mount_points, "_mounted", lambda: frozenset({str(tmp_path / "a b.pt")}))
    with pytest.raises(OutputError, match="mounted as a single file"), whole_file(tmp_path / "a b.pt", overwrite=True):
        raise AssertionError("the block ran")


def test_mount_points_with_blanks_in_their_names_are_known(monkeypatch, tmp_path):
    table = tmp_path / "mountinfo"
    table.write_text("36 35 98:0 /mnt1 /my\\040volume rw,noatime master:1 - ext3 /dev/root rw\n")
    monkeypatch.setattr("builtins.open", lambda path, **options: table.open(**options))
    assert mount_points._mounted() == {"/my volume"}


def test_a_real_mount_point_is_written_inside(tmp_path):
    """In a mount namespace of its own: a tmpfs, and a bind mount of the same file system, which no device tells."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no mount namespaces")
    script = textwrap.dedent(
        """
        import os, sys
        from pathlib import Path
        from weightport.writing import whole_directory
        for overwrite in (False, True):
            with whole_directory(Path(sys.argv[1]), overwrite=overwrite) as work:
                (work / "file").write_text(str(overwrite))
        print(sorted(os.listdir(sys.argv[1])), (Path(sys.argv[1]) / "file").read_text(), os.path.ismount(sys.argv[1]))
        """
    )
    for place in ("volume", "elsewhere"):
        (tmp_path / place).mkdir()
    for mount, is_device in (("-t tmpfs none", "True"), ("--bind elsewhere", "False")):
        command = f'mount {mount} volume && exec "$0" -c "$1" volume'
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", command, sys.executable, script],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.stdout == f"['{RECORD}', 'file'] True {is_device}\n", done.stderr
