"""Every bit of a directory's files is covered by a hash on record, and a directory without one says so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from weightport.api import verify
from weightport.integrity.file_hashes import check_hashes
from weightport.integrity.findings import Finding, Severity
from weightport.integrity.recorded_hashes import SUMS, recorded_hashes, sums
from weightport.writing import own_file, whole_directory
from weightport.writing.ownership import RECORD, is_intact, record_folder

LARGE = 4096


def flipped(path: Path, place: int, bit: int = 0) -> bytes:
    """Flip one bit of a file; its earlier content."""
    before = path.read_bytes()
    content = bytearray(before)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return before


def hash_findings(folder: Path) -> list[Finding]:
    recorded, findings = recorded_hashes(folder)
    return findings + check_hashes(folder, recorded, {}, lambda amount: None)


def every_bit(path: Path) -> Iterator[None]:
    """Each bit of a small file, flipped in turn."""
    before = path.read_bytes()
    for place in range(len(before)):
        for bit in range(8):
            flipped(path, place, bit)
            yield
            path.write_bytes(before)


def test_a_directory_as_it_was_written_is_whole_and_every_file_is_covered(model: Path) -> None:
    done: list[int] = []
    total: list[int] = []
    found = verify(model, start=total.append, advance=done.append)
    assert found.passed and not found.findings, found.findings
    assert set(found.hashed) == {path.name for path in model.iterdir()} - {RECORD}
    assert sum(done) == found.nbytes == total[0] == sum((model / name).stat().st_size for name in found.hashed)
    assert len(found.checked) == 3 and found.tensors == 299


def test_one_flipped_bit_in_any_file_is_found_and_the_file_is_named(model: Path) -> None:
    names = sorted(path.name for path in model.iterdir())
    assert len(names) == 9
    for name in names:
        size = (model / name).stat().st_size
        for place in {0, size // 3, size - 1}:
            before = flipped(model / name, place, place % 8)
            assert name in {each.subject for each in hash_findings(model)}, (name, place)
            (model / name).write_bytes(before)
    assert not hash_findings(model)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "conversion.json", RECORD])
def test_a_flipped_bit_that_breaks_a_file_is_a_finding_and_no_error(name: str, model: Path) -> None:
    flipped(model / name, 0, 6)
    found = verify(model)
    assert not found.passed and name in {each.subject for each in found.of(Severity.WRONG)}


def test_every_single_bit_of_the_record_itself_is_covered(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    record_folder(tmp_path)
    assert is_intact(tmp_path)
    for _ in every_bit(tmp_path / RECORD):
        assert not is_intact(tmp_path)
    assert is_intact(tmp_path)


def test_every_single_bit_of_a_release_s_sums_is_covered(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / SUMS).write_text(sums({"a.txt": hashlib.sha256(b"a").hexdigest()}))
    assert not hash_findings(tmp_path)
    for _ in every_bit(tmp_path / SUMS):
        assert hash_findings(tmp_path)


def test_a_record_of_an_earlier_version_is_read_and_what_it_lacks_is_named(model: Path) -> None:
    record = json.loads((model / RECORD).read_text())
    del record["sha256"]
    record["files"] = {name: state[:2] for name, state in record["files"].items()}
    (model / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    found = verify(model)
    assert found.passed and found.hashed == ("model.safetensors",) and found.sources == ("conversion.json",)
    assert {each.subject for each in found.of(Severity.UNCHECKED)} >= {"config.json", "tokenizer.json"}
    flipped(model / "model.safetensors", -1)
    assert [each.subject for each in verify(model).of(Severity.WRONG)] == ["model.safetensors"]


def test_a_file_that_is_listed_and_not_there_is_missing(model: Path) -> None:
    (model / "generation_config.json").unlink()
    (finding,) = verify(model).of(Severity.WRONG)
    assert finding.line == f"generation_config.json: is missing; {RECORD} lists it"


def test_what_weightport_adds_later_is_covered_and_what_others_add_is_named(model: Path) -> None:
    with own_file(model / "metrics.json") as work:
        work.write_text("{}")
    (model / "notes.txt").write_text("mine")
    found = verify(model)
    assert found.passed and "metrics.json" in found.hashed
    assert [each.subject for each in found.findings] == ["notes.txt"]
    flipped(model / "metrics.json", 0)
    assert [each.subject for each in hash_findings(model)] == ["metrics.json"]


def test_a_hash_is_taken_from_the_bytes_where_a_file_was_written_to_after_its_writer_closed_it(tmp_path: Path) -> None:
    from weightport.writing.hashed_file import HashedFile

    with whole_directory(tmp_path / "out") as work:
        for name in ("kept", "changed"):
            with HashedFile(work / name) as file:
                file.write(b"x" * LARGE)
        (work / "changed").write_bytes(b"other bytes")
    assert not hash_findings(tmp_path / "out")


def test_a_repository_without_any_record_says_what_could_not_be_checked(foreign: Path) -> None:
    found = verify(foreign)
    assert found.passed and not found.hashed
    assert {each.subject for each in found.of(Severity.UNCHECKED)} == {path.name for path in foreign.iterdir()}
    assert len(found.checked) == 3


def git_hash(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def hub_name(path: Path) -> str:
    """What the Hub calls a file's content: large files by SHA-256, others as git does."""
    content = path.read_bytes()
    return hashlib.sha256(content).hexdigest() if path.suffix == ".safetensors" else git_hash(content)


def test_a_download_is_checked_against_what_the_hub_said_of_its_files(foreign: Path) -> None:
    records = foreign / ".cache" / "huggingface" / "download"
    records.mkdir(parents=True)
    names = sorted(path.name for path in foreign.iterdir() if path.is_file())
    for name in names:
        (records / f"{name}.metadata").write_text(f"{'0' * 40}\n{hub_name(foreign / name)}\n1700000000.0\n")
    found = verify(foreign)
    assert found.passed and sorted(found.hashed) == names and found.sources == ("the Hub",)
    for name in names:
        before = flipped(foreign / name, -1)
        assert [each.subject for each in hash_findings(foreign)] == [name]
        (foreign / name).write_bytes(before)


def test_a_snapshot_in_the_hubs_cache_is_checked_against_the_names_of_its_blobs(foreign: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "hub" / "snapshots" / ("1" * 40), tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in foreign.iterdir():
        blob = blobs / hub_name(path)
        path.rename(blob)
        (snapshot / path.name).symlink_to(blob)
    found = verify(snapshot)
    assert found.passed and not found.of(Severity.UNCHECKED) and len(found.hashed) == 7
    flipped((snapshot / "tokenizer.json").resolve(), 10)
    assert [each.subject for each in hash_findings(snapshot)] == ["tokenizer.json"]


def test_an_interruption_does_not_wait_for_the_files_that_are_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weightport.integrity import file_hashes

    monkeypatch.setattr(file_hashes, "BLOCK_BYTES", 512)
    for name in "abc":
        (tmp_path / name).write_bytes(b"x" * 512 * 64)
    record_folder(tmp_path)
    read: list[int] = []

    def advance(amount: int) -> None:
        read.append(amount)
        if len(read) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_hashes(tmp_path, recorded_hashes(tmp_path)[0], {}, advance)
    assert len(read) < 100


def test_a_download_that_was_trained_on_in_its_place_is_no_error_of_a_release(foreign: Path) -> None:
    from weightport.integrity.file_hashes import require_recorded

    records = foreign / ".cache" / "huggingface" / "download"
    records.mkdir(parents=True)
    (records / "model.safetensors.metadata").write_text(f"{'0' * 40}\n{'1' * 64}\n1700000000.0\n")
    assert not require_recorded(foreign, {"model.safetensors": "2" * 64})
    assert not verify(foreign).passed
