"""What weightport wrote and what is the user's: the record in every folder that it writes, the mark in single files.

A folder's `.weightport.json` lists each file with its size, the time of its last change and its SHA-256, and ends with
the hash of that list. A file that is not listed, or that changed since, is the user's. Files that stand alone (an
exported checkpoint, a parity report) name their maker within.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from weightport.version import __version__
from weightport.writing.disk_errors import disk_errors
from weightport.writing.written_hashes import sha256_of

RECORD = ".weightport.json"
FORMAT = 1
_SEAL = "sha256"
MADE_BY = f"made by weightport {__version__}"
"""What a file that stands alone holds within its first or last LOOK bytes."""
LOOK = 4096

_MADE_BY = re.compile(rb'made[ _]by"?:? ?"?weightport ', re.IGNORECASE)
_WORKING = re.compile(r"\..*\.weightport-[0-9a-f]{16}(\.lock|\.old|\.moving)?")
_SECOND = 10**9


@dataclass(frozen=True)
class FolderRecord:
    """What `.weightport.json` says. files: (bytes, nanoseconds of the last change) by path within the folder. hashes:
    SHA-256 by path; records of earlier versions have none. also:
    patterns of paths that are weightport's whatever they hold, such as a run's checkpoints. replaces: the hidden name
    of the folder that stood here before and comes back unless this one gets as far as its first checkpoint; carried:
    folders within that go back with it."""

    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    replaces: str = ""
    carried: tuple[str, ...] = ()
    hashes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stranger:
    """Something in a folder that weightport did not write, or, `recorded`, not as it is now."""

    path: str
    why: str
    recorded: bool = False


def is_working_name(name: str) -> bool:
    """Whether a run that is at work, or was killed, left a file or folder of this name."""
    return _WORKING.fullmatch(name) is not None


def contents(folder: Path) -> list[Path]:
    """What a folder holds, sorted; not what runs at work left there, nor an ext volume's own lost+found."""
    return [path for path in sorted(folder.iterdir()) if not is_working_name(path.name) and path.name != "lost+found"]


def record_folder(folder: Path, also: Sequence[str] = (), replaces: str = "", carried: Sequence[str] = ()) -> None:
    """Write the record of a folder whose files are finished."""
    paths = {str(path.relative_to(folder)): path for path in _files(folder) if path.relative_to(folder) != _OWN}
    files = {name: _state(path) for name, path in paths.items()}
    hashes = {name: sha256_of(path) for name, path in paths.items() if files[name] != _IRREGULAR}
    write_record(folder, FolderRecord(files, tuple(also), replaces, tuple(carried), hashes))


def record_file(path: Path) -> None:
    """Note that weightport wrote this file, where the folder it stands in has a record. Raises OutputError."""
    record = read_record(path.parent)
    if record is not None:
        state = _state(path)
        hashes = {name: value for name, value in record.hashes.items() if name != path.name}
        if state != _IRREGULAR:
            hashes[path.name] = sha256_of(path)
        with disk_errors(path.parent / RECORD):
            write_record(path.parent, replace(record, files={**record.files, path.name: state}, hashes=hashes))


def is_edited(path: Path) -> bool:
    """Whether somebody else wrote this file since weightport did, or made it."""
    record = read_record(path.parent)
    if record is None or not os.path.lexists(path):
        return False
    return path.name not in record.files or not _unchanged(record.files[path.name], _state(path))


def read_record(folder: Path) -> FolderRecord | None:
    """The record of a folder; None where there is none that can be read."""
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            return None
        files = {str(name): (int(state[0]), int(state[1])) for name, state in content["files"].items()}
        return FolderRecord(
            files,
            tuple(map(str, content.get("also", ()))),
            str(content.get("replaces", "")),
            tuple(map(str, content.get("carried", ()))),
            {str(name): str(state[2]) for name, state in content["files"].items() if len(state) > 2},
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        return None


def write_record(folder: Path, record: FolderRecord) -> None:
    """Write the record in one step."""
    work = folder / f"{RECORD}.new"
    try:
        work.write_text(_sealed(record), encoding="utf-8")
        os.replace(work, folder / RECORD)
    except BaseException:
        with suppress(OSError):
            work.unlink()
        raise


def is_intact(folder: Path) -> bool:
    """Whether the folder's record is, to the byte, as it was written. Records of earlier versions, which hold no
    hashes, are where they can be read."""
    record = read_record(folder)
    if record is None:
        return False
    text = (folder / RECORD).read_text(encoding="utf-8")
    content = json.loads(text)
    digest = content.pop(_SEAL, None)
    if digest is None:
        return not record.hashes
    return bool(digest == _digest(content) and text == _text({**content, _SEAL: digest}))


def _sealed(record: FolderRecord) -> str:
    """The record as text, the SHA-256 of what stands before it last."""
    content = {
        "format": FORMAT,
        "about": "What weightport wrote here: size, time, SHA-256 of every file. --overwrite replaces nothing else.",
        "files": {
            name: [*state, *([record.hashes[name]] if name in record.hashes else [])]
            for name, state in sorted(record.files.items())
        },
        **({"also": list(record.also)} if record.also else {}),
        **({"replaces": record.replaces} if record.replaces else {}),
        **({"carried": list(record.carried)} if record.carried else {}),
    }
    return _text({**content, _SEAL: _digest(content)})


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()


def _text(content: object) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def strangers(folder: Path) -> Iterator[Stranger]:
    """What in a folder is not weightport's; everything where it has no record."""
    record = read_record(folder) or FolderRecord()
    for path in _files(folder):
        name = str(path.relative_to(folder))
        if name in (RECORD, f"{RECORD}.new"):
            continue
        if name not in record.files:
            if not any(fnmatchcase(name, pattern) for pattern in record.also):
                yield Stranger(name, "is not weightport's")
        elif not _unchanged(record.files[name], _state(path)):
            yield Stranger(name, "was changed since weightport wrote it", recorded=True)
    for each in _recorded_folders(folder):
        inner = each.relative_to(folder)
        yield from (replace(found, path=str(inner / found.path)) for found in strangers(each))


def is_own_file(path: Path) -> bool:
    """Whether this file says itself that weightport made it. A folder's record is no permission: that an output is
    weightport's does not mean that a report may take the place of its weights."""
    try:
        with path.open("rb") as file:
            start = file.read(LOOK)
            file.seek(max(0, os.fstat(file.fileno()).st_size - LOOK))
            return _MADE_BY.search(start) is not None or _MADE_BY.search(file.read()) is not None
    except OSError:
        return False


_OWN = Path(RECORD)
_IRREGULAR = (-1, 0)


def _files(folder: Path) -> Iterator[Path]:
    """All that is no folder, at any depth; folders with a record of their own are left to that."""
    for path in contents(folder):
        if not path.is_dir() or path.is_symlink():
            yield path
        elif not (path / RECORD).is_file():
            yield from _files(path)


def _recorded_folders(folder: Path) -> Iterator[Path]:
    for path in contents(folder):
        if path.is_dir() and not path.is_symlink():
            if (path / RECORD).is_file():
                yield path
            else:
                yield from _recorded_folders(path)


def _state(path: Path) -> tuple[int, int]:
    """(bytes, time of the last change in nanoseconds) of a regular file; of anything else what no record holds."""
    found = path.lstat()
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else _IRREGULAR


def _unchanged(recorded: tuple[int, int], found: tuple[int, int]) -> bool:
    """Archives and some file systems keep whole seconds only."""
    seconds_only = found[1] % _SECOND == 0 and found[1] // _SECOND == recorded[1] // _SECOND
    return recorded[0] == found[0] >= 0 and (recorded[1] == found[1] or seconds_only)
