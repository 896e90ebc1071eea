"""Which vocabulary a conversion read: its files by SHA-256, and where files of that content are known from.

The number of tokens is all that a checkpoint says of its vocabulary: another one of that length fits as well, and
gives every text other ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from weightport.errors import VocabularyError
from weightport.tokenizers.sources import CHINESE_FILES, ENGLISH_FILES, PORTED_ENGLISH_FILES

FLORENCE2_FILES = ("tokenizer.json",)
FLORENCE2_PARTS = ("vocab.json", "merges.txt")
ADDED = "added_tokens.json"

KNOWN = {
    "45bbac6b341c319adc98a532532882e91a9cefc0329aa57bac9ae761c27b291c": "OFA-Sys/OFA utils/BERT_CN_dict",
    "77254f85a4aac36919b2ebbaa27a4305ef4dd2a25bf1c428b595dea05e73df25": "OFA-Sys/OFA utils/BERT_CN_dict",
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783": "GPT-2",
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5": "GPT-2",
    "847bbeab6174d66a88898f729d52fa8d355fafe1bea101cf960dd404581df70e": "microsoft/Florence-2",
    "394fdc63c71aabe0a9b97117f5d62fb5fcc4d59b2b3ea929a3929e6a53217b3c": "microsoft/Florence-2",
    "8986bb4f423f07f8c7f70d0dbe3526fb2316056c17bae71b1ea975e77a168fc6": "google-research/big_vision PaliGemma",
    "61a7b147390c64585d6c3543dd6fc636906c9af3865a5548f27f31aee1d4c8e2": "Gemma 1 and 2",
}
"""Origin of files by SHA-256: OFA-CN's vocab.txt and dict.txt, GPT-2's encoder.json and vocab.bpe, tokenizer.json and
vocab.json of the Florence-2 releases, and the sentencepiece models of PaliGemma and of Gemma (as published lists of
their digests have them; 4264023 and 4241003 bytes)."""


@dataclass(frozen=True)
class VocabularyFile:
    """One file of a vocabulary. `origin`: where a file of this content is known from."""

    name: str
    sha256: str
    origin: str | None


@dataclass(frozen=True)
class Provenance:
    """What a tokenizer was made of. `source` is a folder's or a file's name or a Hub id, never a whole path."""

    source: str
    files: tuple[VocabularyFile, ...]

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of the files whose content is known from nowhere."""
        return tuple(file.name for file in self.files if file.origin is None)

    @property
    def sentence(self) -> str:
        """Its name and its files, for a line of output."""
        origins = ", ".join(dict.fromkeys(file.origin for file in self.files if file.origin is not None))
        files = ", ".join(f"{file.name} {file.sha256[:12]}" for file in self.files)
        return f"{self.source}: {files}" + (f" (known: {origins})" if origins else "")

    @property
    def warning(self) -> str | None:
        """What to look at, where a file is known from nowhere."""
        if not self.unknown:
            return None
        one = len(self.unknown) == 1
        return (
            f"{', '.join(self.unknown)} {'is' if one else 'are'} of no release that weightport knows: right for a "
            "fine-tune with tokens of its own; but any vocabulary of this length fits, and another gives other ids."
        )


def ofa_provenance(source: Path | str) -> Provenance:
    """The files that `read_ofa_vocabulary` reads of `source`."""
    folder = Path(source)
    if not folder.is_dir():
        return _single(source, CHINESE_FILES[0])
    if any((folder / name).is_file() for name in ENGLISH_FILES[:2]):
        names: tuple[str, ...] = ENGLISH_FILES
    elif all((folder / name).is_file() for name in PORTED_ENGLISH_FILES):
        names = (*PORTED_ENGLISH_FILES, ADDED)
    else:
        # added_tokens.json says nothing where dict.txt names every row.
        names = CHINESE_FILES if (folder / CHINESE_FILES[1]).is_file() else (CHINESE_FILES[0], ADDED)
    return _of_folder(folder, names)


def florence2_provenance(source: Path | str) -> Provenance:
    """The files that `read_florence2_vocabulary` reads of `source`."""
    folder = Path(source)
    if not folder.is_dir():
        return _single(source, FLORENCE2_FILES[0])
    whole = (folder / FLORENCE2_FILES[0]).is_file()
    return _of_folder(folder, (*(FLORENCE2_FILES if whole else FLORENCE2_PARTS), ADDED))


def of_file(path: Path, source: str) -> Provenance:
    """A vocabulary of one file; `source` is its name, or the Hub id that it was downloaded of."""
    return Provenance(source, (_file(path),))


def of_folder(folder: Path, names: Iterable[str], source: str) -> Provenance:
    """A vocabulary of those of the named files that stand in `folder`; `source` as in `of_file`."""
    return replace(_of_folder(folder, names), source=source)


def _of_folder(folder: Path, names: Iterable[str]) -> Provenance:
    present = [folder / name for name in names if (folder / name).is_file()]
    return Provenance(folder.resolve().name, tuple(_file(path) for path in present))


def _single(source: Path | str, name: str) -> Provenance:
    """One file, or a Hub repository's file `name`, which has been downloaded already."""
    path = Path(source)
    if path.is_file():
        return Provenance(path.name, (_file(path),))
    try:
        return Provenance(str(source), (_file(Path(hf_hub_download(str(source), name))),))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise VocabularyError(f"{name} of {source} cannot be had from the Hub: {error}") from error


def _file(path: Path) -> VocabularyFile:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise VocabularyError(f"{path} cannot be read: {error.strerror}.") from error
    return VocabularyFile(path.name, digest, KNOWN.get(digest))
