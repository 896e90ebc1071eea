"""WebDataset tars: files of one name before the first dot are a sample. Read in place; nothing is extracted."""

from __future__ import annotations

import hashlib
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from weightport.errors import DataError
from weightport.finetuning.data.columns import decode_text, parse_object, shown
from weightport.finetuning.data.content_keys import Tick, keys_by_content
from weightport.finetuning.data.entries import Entry
from weightport.finetuning.data.faults import Faults
from weightport.finetuning.data.files import PinnedFile
from weightport.finetuning.data.hashing import fingerprint_of, key_of
from weightport.finetuning.data.image_folder import EXTENSIONS
from weightport.finetuning.data.packed_texts import PackedTexts
from weightport.finetuning.data.rows import Row, RowReader, row_reader
from weightport.finetuning.data.samples import Picture
from weightport.finetuning.data.settings import DataSettings

TEXTS = ("txt", "text", "caption", "cls")
"""Endings of files that are a column of their own; a json's keys are columns."""

LONGEST_TEXT = 2**24
"""Bytes of a text or a json in an archive."""


@dataclass(frozen=True)
class TarPicture:
    """Bytes at a place in an archive."""

    file: PinnedFile
    offset: int
    length: int

    def __call__(self) -> bytes:
        return self.file.read(self.offset, self.length)


@dataclass
class _Group:
    """The members of a sample: place and bytes of its picture, and of its texts by ending."""

    key: str
    picture: tuple[int, int] | None = None
    texts: dict[str, tuple[int, int]] = field(default_factory=dict)
    fault: DataError | None = None


class TarRows:
    """The samples of a shard. Opening reads the headers and the texts; pictures are read by their place in the file.

    No name in an archive is used as a path. Links, devices and names that lead out of a folder are bad samples.
    """

    each_answer = False

    def __init__(self, path: Path, settings: DataSettings) -> None:
        self.name = str(path)
        self.file = PinnedFile(path)
        self.reader: RowReader | None = None
        faults, rows_seen = Faults(settings.skip_bad), hashlib.blake2b()
        keys: list[str] = []
        self.endings: list[str] = []
        numbers = {name: array("q") for name in ("group", "part", "answers", "key", "picture")}
        members = {name: array("q") for name in ("offset", "length", "ending", "end")}
        pictures = array("q")
        for group in _groups(self.file):
            try:
                rows = self._examined(group, settings)
            except DataError as fault:
                faults.add(fault)
                continue
            offset, length = group.picture or (0, 0)
            pictures.extend((offset, length))
            for ending, (begin, size) in group.texts.items():
                if ending not in self.endings:
                    self.endings.append(ending)
                members["offset"].append(begin)
                members["length"].append(size)
                members["ending"].append(self.endings.index(ending))
            members["end"].append(len(members["offset"]))
            for part, row in enumerate(rows):
                asked = row.question.encode()
                about = group.key.encode()
                texts = [text.encode() for pair in row.history for text in pair]
                numbers["group"].append(len(keys))
                numbers["part"].append(part)
                numbers["answers"].append(len(row.answers))
                numbers["key"].append(key_of(about, *texts, asked))
                # Of text alone, each row is about its own.
                numbers["picture"].append(key_of(about, b"" if length else str(part).encode()))
                rows_seen.update(f"{group.key!r} {length} {row.question!r} {row.answers!r} {row.history!r}\n".encode())
            keys.append(group.key)
        self.keys = PackedTexts(keys)
        self.members = {name: np.array(values, dtype=np.int64) for name, values in members.items()}
        self.pictures = np.array(pictures, dtype=np.int64).reshape(-1, 2)
        self.groups, self.parts = (np.array(numbers[name], dtype=np.int64) for name in ("group", "part"))
        self.answer_counts = np.array(numbers["answers"], dtype=np.int32)
        self.question_keys = np.array(numbers["key"], dtype=np.int64)
        self._picture_names = np.array(numbers["picture"], dtype=np.int64)
        self.skipped = tuple(faults.skipped)
        self.content = fingerprint_of(["tar", rows_seen.hexdigest()])
        self.fingerprint = fingerprint_of(["tar", self.file.identity, asdict(settings)])

    def picture_keys(self, tick: Tick) -> np.ndarray:
        return keys_by_content(self._picture_names, self.entry, tick)

    def entry(self, row: int) -> Entry:
        number, part = int(self.groups[row]), int(self.parts[row])
        key = self.keys[number]
        end = int(self.members["end"][number])
        begin = int(self.members["end"][number - 1]) if number else 0
        columns = [self.members[name][begin:end].tolist() for name in ("ending", "offset", "length")]
        texts = {self.endings[ending]: (offset, length) for ending, offset, length in zip(*columns)}
        place = self._place(key)
        rows = self._rows(texts, place)
        offset, length = (int(value) for value in self.pictures[number])
        picture = Picture(key, place, TarPicture(self.file, offset, length)) if length else None
        found = rows[part]
        place = f"{place}, answer {part + 1}" if len(rows) > 1 else place
        return Entry(place, picture, found.question, found.answers, history=found.history)

    def _examined(self, group: _Group, settings: DataSettings) -> list[Row]:
        if group.fault is not None:
            raise group.fault
        place = self._place(group.key)
        if group.picture is None and not settings.text_only:
            raise DataError(
                f"{place}: no picture ({', '.join(EXTENSIONS)}). Found: {', '.join(group.texts) or 'none'}."
            )
        if self.reader is None:
            self.reader = row_reader(self._record(group.texts, place), settings, place, needs_image=False)
        return self._rows(group.texts, place)

    def _rows(self, texts: dict[str, tuple[int, int]], place: str) -> list[Row]:
        assert self.reader is not None
        return list(self.reader(self._record(texts, place), place))

    def _record(self, texts: dict[str, tuple[int, int]], place: str) -> dict[str, Any]:
        """The columns of a sample: one for each text, and those of its json."""
        record: dict[str, Any] = {}
        for ending, (offset, length) in texts.items():
            content = self.file.read(offset, length)
            if ending == "json":
                record |= parse_object(content, f"{place}.json")
            else:
                record[ending] = decode_text(content, f"{place}.{ending}").strip()
        return record

    def _place(self, key: str) -> str:
        return f"{self.name}, {shown(key)}"


def _groups(file: PinnedFile) -> Iterator[_Group]:
    """The samples of an archive, members of one name being next to each other."""
    group: _Group | None = None
    for member in _members(file):
        key, ending = _split(member.name)
        if group is None or group.key != key:
            if group is not None:
                yield group
            group = _Group(key)
        if group.fault is None:
            group.fault = _added(group, member, ending, file)
    if group is not None:
        yield group


def _added(group: _Group, member: tarfile.TarInfo, ending: str, file: PinnedFile) -> DataError | None:
    """What is wrong with a member that belongs to the group, if anything is."""
    place = f"{file.path}, {shown(member.name)}"
    if not member.isreg() or member.issparse():
        kind = "a link" if member.issym() or member.islnk() else "no regular file"
        return DataError(f"{place}: {kind}. Regular files were expected: links in archives are not followed.")
    if shown(member.name) != member.name:
        return DataError(f"{place}: a name that is not UTF-8.")
    if member.name.startswith("/") or ".." in member.name.replace("\\", "/").split("/"):
        return DataError(f"{place}: a name that leads out of a folder. Names such as 00001.jpg were expected.")
    if member.offset_data + member.size > file.size:
        return DataError(f"{place}: the archive ends within this file: it is not whole.")
    last = ending.rpartition(".")[2]
    if f".{last}" in EXTENSIONS:
        if group.picture is not None:
            return DataError(f"{place}: a second picture of the sample. One a sample was expected.")
        if not member.size:
            return DataError(f"{place}: an empty file.")
        group.picture = member.offset_data, member.size
    elif ending == "json" or ending in TEXTS:
        if member.size > LONGEST_TEXT:
            return DataError(f"{place}: a text of {member.size:,} bytes. Up to {LONGEST_TEXT:,} were expected.")
        group.texts[ending] = member.offset_data, member.size
    return None


def _members(file: PinnedFile) -> Iterator[tarfile.TarInfo]:
    """The members but for folders, one in memory at a time. Raises DataError for what is no plain tar."""
    try:
        with tarfile.open(file.path, "r:") as archive:
            while (member := archive.next()) is not None:
                # tarfile would keep every member that it has seen.
                archive.members.clear()  # type: ignore[attr-defined]
                if not member.isdir():
                    yield member
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        raise DataError(
            f"{file.path} cannot be read as a tar: {error}. Plain tars are read; a compressed one (.tar.gz, .tar.zst) "
            "is unpacked to a plain one first."
        ) from error


def _split(name: str) -> tuple[str, str]:
    """WebDataset's key and ending: before and behind the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    base, _, ending = file.partition(".")
    return f"{folder}{slash}{base}", ending.lower()
