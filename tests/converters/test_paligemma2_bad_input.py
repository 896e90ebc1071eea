"""What a PaliGemma checkpoint can be wrong in: each gets one error that names it, and leaves nothing behind."""

from __future__ import annotations

import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from paligemma2_checkpoints import VOCABULARY, Arrays, arrays, originals, trainer_step, write

from weightport.api import convert
from weightport.errors import (
    CheckpointError,
    ConfigurationError,
    CoverageError,
    UnknownFamilyError,
    UnsafeCheckpointError,
    VocabularyError,
    WeightportError,
)

LINEAR, TABLE = "params/llm/layers/mlp/linear", "params/llm/embedder/input_embedding"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return originals(tmp_path_factory)("tiny-gemma2")


@pytest.fixture
def given(source: Path) -> Arrays:
    return arrays(source)


def refused(source: Path, tmp_path: Path, error: type[WeightportError], text: str, **options) -> None:
    with pytest.raises(error, match=text) as caught:
        convert(source, tmp_path / "out", **options)
    assert type(caught.value) is error
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_pickled_array_among_plain_ones_is_refused_by_name(given: Arrays, tmp_path: Path) -> None:
    given["params/llm/final_norm/scale"] = np.array([{"a": 1}], dtype=object)
    path = write(tmp_path / "c.npz", given)
    refused(path, tmp_path, UnsafeCheckpointError, r"final_norm/scale.* is no plain array but pickled Python objects")


def test_file_of_pickled_objects_alone_is_refused(given: Arrays, tmp_path: Path) -> None:
    path = write(tmp_path / "c.npz", {"params": np.array(given, dtype=object)})
    refused(path, tmp_path, UnknownFamilyError, r"holds no tensors.*\n.*\(params\) are pickled Python objects")


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_truncated_file_is_refused(source: Path, tmp_path: Path, kept: float) -> None:
    data = source.read_bytes()
    path = tmp_path / "c.npz"
    path.write_bytes(data[: int(len(data) * kept)])
    refused(path, tmp_path, CheckpointError, "truncated|bytes were added or lost")


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(path: Path, contents: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


def test_member_that_is_shorter_than_its_header_says_is_refused(source: Path, tmp_path: Path) -> None:
    contents = members(source)
    contents[f"{LINEAR}.npy"] = contents[f"{LINEAR}.npy"][:-40]
    path = pack(tmp_path / "c.npz", contents)
    refused(
        path, tmp_path, CheckpointError, r"mlp/linear'?: has shape \[4, 72, 40\].*take 46080 bytes, but holds 46040"
    )


def test_member_whose_header_says_another_shape_is_refused(source: Path, tmp_path: Path) -> None:
    contents = members(source)
    data = contents[f"{LINEAR}.npy"]
    contents[f"{LINEAR}.npy"] = data.replace(b"(4, 72, 40)", b"(4, 72, 41)")
    refused(pack(tmp_path / "c.npz", contents), tmp_path, CheckpointError, "take 47232 bytes, but holds 46080")


def test_overlapping_members_are_refused(source: Path, tmp_path: Path) -> None:
    data = bytearray(source.read_bytes())
    entries = [found.start() for found in re.finditer(b"PK\x01\x02", bytes(data))]
    first, second = entries[:2]
    header = struct.unpack_from("<L", data, first + 42)[0]
    # The second entry's local header is that of the first, under the second's name and sizes.
    struct.pack_into("<L", data, second + 42, header)
    path = tmp_path / "c.npz"
    path.write_bytes(bytes(data))
    refused(path, tmp_path, CheckpointError, "disagree|overlaps")


def test_damaged_values_are_refused(source: Path, tmp_path: Path) -> None:
    data = bytearray(source.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "c.npz").write_bytes(bytes(data))
    refused(tmp_path / "c.npz", tmp_path, CheckpointError, "is damaged: its CRC-32")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (TABLE, r"lacks llm/embedder/input_embedding, so the model's sizes cannot be told"),
        ("params/img/pos_embedding", r"lacks img/pos_embedding, so the model's sizes"),
    ],
)
def test_what_tells_the_sizes_must_be_there(given: Arrays, tmp_path: Path, name: str, said: str) -> None:
    del given[name]
    refused(write(tmp_path / "c.npz", given), tmp_path, ConfigurationError, said)


def test_other_missing_and_surplus_arrays_are_named(given: Arrays, tmp_path: Path) -> None:
    del given["params/llm/layers/pre_ffw_norm/scale"]
    given["params/llm/layers/extra/scale"] = np.ones((4, 40), np.float32)
    said = r"pre_ffw_norm/scale \[40\] → language_model.*\n(.*\n)*.*llm/layers/extra/scale \[4, 40\]"
    refused(write(tmp_path / "c.npz", given), tmp_path, CoverageError, said)


def test_tower_of_fewer_layers_in_one_array_is_named(given: Arrays, tmp_path: Path) -> None:
    given[LINEAR] = given[LINEAR][:3]
    refused(write(tmp_path / "c.npz", given), tmp_path, CoverageError, r"layers\.3\.mlp\.down_proj")


def test_positions_that_are_no_square_are_refused(given: Arrays, tmp_path: Path) -> None:
    given["params/img/pos_embedding"] = given["params/img/pos_embedding"][:, :8]
    refused(write(tmp_path / "c.npz", given), tmp_path, ConfigurationError, "8 positions, which are no square")


def test_width_that_heads_do_not_divide_is_refused(given: Arrays, tmp_path: Path) -> None:
    given["params/llm/layers/attn/q_einsum/w"] = np.ones((4, 3, 40, 16), np.float32)
    refused(write(tmp_path / "c.npz", given), tmp_path, ConfigurationError, "transformers has no model of these sizes")


def test_joined_projections_are_refused(given: Arrays, tmp_path: Path) -> None:
    given["params/llm/layers/attn/qkv_einsum/w"] = np.ones((4, 3, 4, 40, 16), np.float32)
    refused(write(tmp_path / "c.npz", given), tmp_path, ConfigurationError, "qkv_einsum/w joins query, key and value")


def test_values_that_are_not_finite_are_refused(given: Arrays, tmp_path: Path) -> None:
    given[LINEAR] = given[LINEAR].copy()
    given[LINEAR][1, 2, 3] = np.nan
    with pytest.raises(WeightportError, match=r"NaN"):
        convert(write(tmp_path / "c.npz", given), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def shortened(target: Path, drop: int) -> Path:
    """PaliGemma's sentencepiece model without its last pieces."""
    data, kept, at = VOCABULARY.read_bytes(), [], 0
    while at < len(data):
        start, tag = at, data[at]
        length, shift, at = 0, 0, at + 1
        while True:
            length |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 0x80:
                break
        at += length
        kept.append((tag == 0x0A, data[start:at]))
    pieces = [field for is_piece, field in kept if is_piece]
    rest = [field for is_piece, field in kept if not is_piece]
    target.write_bytes(b"".join(pieces[: len(pieces) - drop] + rest))
    return target


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        (1, "has 1151 of the 1152 pieces <loc0000> to <seg127>, and not as its last ones"),
        (1152 + 20, "has 1644 pieces, those of places and masks included; the model's embedding has 1664 rows"),
    ],
)
def test_vocabulary_of_too_few_pieces_is_refused(source: Path, tmp_path: Path, drop: int, said: str) -> None:
    vocabulary = shortened(tmp_path / "short.model", drop)
    refused(source, tmp_path, VocabularyError, said, vocabulary=str(vocabulary))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "has 0 bytes; a sentencepiece model has some"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is not a sentencepiece model"),
        (b"\x12\x02\x18\x01", "is not a sentencepiece model, or is damaged .it holds no pieces"),
        (b"\x0a\x05\x0a\x01a\x18", "is not a sentencepiece model, or is damaged"),
        (VOCABULARY.read_bytes()[:20_001], "ends in the middle of a field"),
    ],
)
def test_what_is_no_vocabulary_is_refused(source: Path, tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "v.model"
    path.write_bytes(data)
    refused(source, tmp_path, VocabularyError, said, vocabulary=str(path))


def test_vocabulary_of_another_model_is_refused_with_what_differs(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "v.model"
    # A piece, and settings that are left at their defaults: unigram, with a space before every text.
    path.write_bytes(b"\x0a\x03\x0a\x01a")
    said = "is not Gemma's vocabulary: it cuts text by UNIGRAM, not BPE, does not fall back to bytes, puts a space"
    refused(source, tmp_path, VocabularyError, said, vocabulary=str(path))


def test_folder_without_a_vocabulary_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = r"holds no sentencepiece model \(paligemma_tokenizer.model or tokenizer.model\)"
    refused(source, tmp_path, VocabularyError, said, vocabulary=str(tmp_path / "empty"))


def test_native_folder_is_native_already(source: Path, tmp_path: Path) -> None:
    native = convert(source, tmp_path / "native").directory
    refused(native, tmp_path, UnknownFamilyError, "is a native PaliGemma model already: there is nothing to convert")


def test_unfinished_step_of_a_trainer_is_refused(given: Arrays, tmp_path: Path) -> None:
    step = trainer_step(tmp_path / "work" / "checkpoint.bv-000000200", given)
    (step / LINEAR.replace("/", "~") / "1.0.0").unlink()
    refused(tmp_path / "work", tmp_path, CheckpointError, r"params~llm~layers~mlp~linear: lacks 1 of its 2 chunks")
