"""Reports: whole in a file, through a pipe or a device, and never in the place of what is not a report."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from weightport.errors import OutputError
from weightport.writing import require_text_output, text_output, write_text
from weightport.writing.ownership import MADE_BY


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_is_printed_to_and_stays_what_it_is(name, capsys):
    before = os.lstat(name) if name != "-" else None
    assert not write_text(Path(name), "a report\n", overwrite=False)
    assert capsys.readouterr().out == "a report\n"
    assert before is None or os.lstat(name).st_mode == before.st_mode
    assert not Path("-").exists()


def test_a_pipe_is_written_through(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    assert not write_text(pipe, "a report\n", overwrite=False)
    reader.join()
    assert read == ["a report\n"] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_device_is_written_through(tmp_path):
    (tmp_path / "link").symlink_to("/dev/null")
    for path in (Path("/dev/null"), tmp_path / "link"):
        assert not write_text(path, "a report\n", overwrite=False)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and (tmp_path / "link").is_symlink()
    with pytest.raises(OutputError, match="disk is full"):
        write_text(Path("/dev/full"), "a report\n" * 10_000, overwrite=False)


def test_an_open_file_is_written_through(tmp_path):
    with (tmp_path / "open").open("w+") as file:
        write_text(Path(f"/dev/fd/{file.fileno()}"), "a report\n", overwrite=False)
        assert (tmp_path / "open").read_text() == "a report\n"


def test_a_disk_is_not_written_through(tmp_path, monkeypatch):
    monkeypatch.setattr(text_output, "_is_written_through", lambda path: True)
    monkeypatch.setattr(stat, "S_ISBLK", lambda mode: True)
    (tmp_path / "sda").touch()
    with pytest.raises(OutputError, match="is a disk"):
        write_text(tmp_path / "sda", "a report\n", overwrite=True)


def test_an_earlier_report_is_replaced_only_when_asked_and_what_is_none_never(tmp_path):
    report = tmp_path / "parity.json"
    assert write_text(report, MADE_BY, overwrite=False)
    with pytest.raises(OutputError, match="--overwrite"):
        require_text_output(report, overwrite=False)
    assert write_text(report, f"again {MADE_BY}", overwrite=True)
    report.write_text("notes of the user's")
    with pytest.raises(OutputError, match="not written by weightport"):
        write_text(report, "a report", overwrite=True)
    assert report.read_text() == "notes of the user's"


def test_a_report_that_is_a_link_is_written_where_it_points(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "made.json")
    assert write_text(tmp_path / "link.json", MADE_BY, overwrite=False)
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "made.json").read_text() == MADE_BY
    with pytest.raises(OutputError, match="exists"):
        write_text(tmp_path / "link.json", MADE_BY, overwrite=False)


def test_what_is_read_is_not_replaced_by_its_report(tmp_path):
    (tmp_path / "reference.safetensors").write_text(MADE_BY)
    with pytest.raises(OutputError, match="which is read"):
        write_text(tmp_path / "reference.safetensors", "", overwrite=True, beside=[tmp_path / "reference.safetensors"])
    with pytest.raises(OutputError, match="is a folder"):
        write_text(tmp_path, "", overwrite=True)
