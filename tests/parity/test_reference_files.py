"""What is wrong with a reference file is said, and nothing is compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weightport.api import check_parity
from weightport.errors import CheckpointError, ReferenceFileError
from weightport.parity import Selection, read_reference, write_reference
from weightport.parity.selection import parse_selection, selection_json

IDS = torch.tensor([[0, 20, 21, 2]])
LOGITS = torch.zeros(1, 4, 6)


def document(**changes: Any) -> dict[str, Any]:
    return {"format": 1, "family": "ofa", "source": {}, "runs": {"a": {"kind": "forward"}}, **changes}


def run(**changes: Any) -> dict[str, Any]:
    return document(runs={"a": {"kind": "forward", **changes}})


def tensors(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    whole = {"a/in/src_tokens": IDS, "a/in/prev_output_tokens": IDS.clone(), "a/out/logits": LOGITS}
    return {**whole, **{name.replace("__", "/"): tensor for name, tensor in changes.items()}}


def written(path: Path, metadata: Any, held: dict[str, torch.Tensor]) -> Path:
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    held = {name: tensor.clone() for name, tensor in held.items()}
    save_file(held, path, metadata={"weightport.reference": text})
    return path


MALFORMED = {
    "not_json": ("{", tensors(), "not JSON"),
    "no_object": ([1], tensors(), "JSON dict"),
    "other_version": (document(format=2), tensors(), "format 2.*reads format 1"),
    "no_version": ({"family": "ofa", "runs": {}}, tensors(), "format None"),
    "no_family": (document(family=None), tensors(), "family should be"),
    "no_runs": (document(runs={}), tensors(), "holds no run"),
    "runs_as_list": (document(runs=["a"]), tensors(), "runs should be"),
    "run_as_text": (document(runs={"a": "forward"}), tensors(), "run 'a' should be"),
    "unknown_kind": (run(kind="backward"), tensors(), "'backward'.*forward, train, generate"),
    "options_as_list": (run(options=[]), tensors(), "options of run 'a'"),
    "tensor_of_no_run": (document(), tensors(b__out__logits=LOGITS), "'b/out/logits' belongs to no run"),
    "tensor_of_no_side": (document(), tensors(a__side__logits=LOGITS), "neither a/in/<argument> nor a/out/<seam>"),
    "no_outputs": (document(), {"a/in/src_tokens": IDS}, "no output tensor"),
    "no_inputs": (document(), {"a/out/logits": LOGITS}, "no input tensor"),
    "slice_of_nothing": (run(slices={"out/encoder": [[0, 2]]}), tensors(), "out/encoder, which it does not hold"),
    "slice_backwards": (run(slices={"out/logits": [[4, 2]]}), tensors(), "malformed.*start < stop"),
    "slice_of_text": (run(slices={"out/logits": "all"}), tensors(), "malformed"),
    "slice_of_another_size": (run(slices={"out/logits": [[0, 3]]}), tensors(), r"cannot\s+give"),
    "slice_of_too_many_axes": (run(slices={"out/logits": [[0, 1]] * 4}), tensors(), r"cannot\s+give"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_reference_is_refused(name: str, tmp_path: Path) -> None:
    metadata, held, message = MALFORMED[name]
    with pytest.raises(ReferenceFileError, match=f"(?s){message}"):
        read_reference(written(tmp_path / "bad.safetensors", metadata, held))


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
def test_file_that_is_no_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ReferenceFileError, match="not a readable safetensors file"):
        read_reference(path)


def test_safetensors_file_that_is_no_reference_is_told_apart(tmp_path: Path) -> None:
    save_file({"weight": LOGITS}, tmp_path / "model.safetensors")
    with pytest.raises(ReferenceFileError, match="but no reference"):
        read_reference(tmp_path / "model.safetensors")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReferenceFileError, match="is not a file"):
        read_reference(tmp_path / "absent.safetensors")


def test_reference_error_is_a_usage_error() -> None:
    assert ReferenceFileError.exit_status == 2


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    kept = parse_selection([None, {"indices": [0, 3]}, [0, None, 61]])
    path = write_reference(
        tmp_path / "r.safetensors",
        "ofa",
        {"project": "fairseq"},
        {"a": {"kind": "train", "options": {"label_smoothing": 0.1}}},
        {"a/in/src_tokens": IDS, "a/out/logits": LOGITS[:, :2], "a/out/logits@float64": LOGITS[:, :2].double()},
        {"a/out/logits": kept},
    )
    opened = read_reference(path)
    (one,) = opened.runs
    assert (opened.family, opened.source, one.kind, one.options) == (
        "ofa", {"project": "fairseq"}, "train", {"label_smoothing": 0.1},
    )  # fmt: skip
    assert {(each.seam, each.dtype) for each in one.outputs} == {("logits", torch.float32), ("logits", torch.float64)}
    assert all(each.selection == kept for each in one.outputs), "a slice holds for the float64 run too"
    assert torch.equal(one.inputs["src_tokens"].read(), IDS)


@pytest.mark.parametrize(
    ("data", "index"),
    [
        ([[0, 2]], (slice(0, 2),)),
        ([None, [1, 7, 3]], (slice(None), slice(1, 7, 3))),
        ([[0, None, 2], None, [3, 5]], (slice(0, None, 2), slice(None), slice(3, 5))),
        ([None, {"indices": [4, 0, 4]}], (slice(None), [4, 0, 4])),
        ([], ()),
    ],
)
def test_slices_mean_what_indexing_means(data: list, index: tuple) -> None:
    tensor = torch.arange(5 * 8 * 6).view(5, 8, 6)
    selection = parse_selection(data)
    assert torch.equal(selection.apply(tensor), tensor[index])
    assert selection.fits(tuple(tensor[index].shape))
    assert parse_selection(selection_json(selection)) == selection


def test_flat_slice_is_row_major() -> None:
    tensor = torch.arange(12).view(3, 4)
    assert parse_selection({"flat": [2, 6]}).apply(tensor).tolist() == [2, 3, 4, 5]
    assert not Selection().given and Selection().apply(tensor) is tensor


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([[0, 9]], "axis 0 was kept up to place 8, but the model's has only 3"),
        ([None, {"indices": [4]}], "axis 1 was kept up to place 4, but the model's has only 4"),
        ({"flat": [0, 13]}, "axis 0 was kept up to place 12, but the model's has only 12"),
        ([None] * 2 + [[0, 1]], r"3 axes are sliced, but the tensor \[3, 4\] has fewer"),
    ],
)
def test_slice_beyond_the_tensor_is_refused(data: Any, said: str) -> None:
    with pytest.raises(ReferenceFileError, match=said):
        parse_selection(data).apply(torch.zeros(3, 4))


@pytest.mark.parametrize("data", [[[0, 10**20]], [[10**20, None]], [{"indices": [10**20]}], {"flat": [0, 1, 10**20]}])
def test_slice_past_what_torch_counts_to_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_selection(data)


def edit(**changes: Any) -> Callable[..., None]:
    """Replace (or, with None, remove) tensors of the run `text`, or its options."""

    def change(runs, held, slices) -> None:
        for name, value in changes.items():
            if name == "options":
                runs["text"]["options"] = value
                continue
            key = f"text/in/{name}" if name in ("src_tokens", "prev_output_tokens", "nonsense", "image_u8") else name
            if value is None:
                del held[key]
            else:
                held[key] = value(held.get(key))

    return change


UNFIT = {
    "missing_input": (edit(prev_output_tokens=None), "lacks the input prev_output_tokens"),
    "unknown_input": (edit(nonsense=lambda _: IDS), "arguments nonsense; known are src_tokens"),
    "unknown_option": (edit(options={"beam": 5}), "options beam"),
    "ids_beyond_the_vocabulary": (edit(src_tokens=lambda ids: ids + 10**6), "vocabulary has"),
    "negative_ids": (edit(src_tokens=lambda ids: ids - 500), "ids from -"),
    "ids_as_numbers": (edit(src_tokens=lambda ids: ids.float()), "expected token ids"),
    "other_batch_size": (edit(src_tokens=lambda ids: ids[:1]), "different batch sizes"),
    "too_long": (edit(src_tokens=lambda ids: ids[:, :1].repeat(1, 5000)), "does not take the inputs"),
    "image_of_one_channel": (
        edit(image_u8=lambda _: torch.zeros(2, 1, 32, 32, dtype=torch.uint8)),
        "expected images",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_inputs_that_do_not_fit_the_model_are_refused(name: str, native: Path, reference) -> None:
    change, message = UNFIT[name]
    with pytest.raises(ReferenceFileError, match=message):
        check_parity(native, reference("text", change=change), dtypes=[torch.float32])


@pytest.mark.parametrize(("run", "options"), [
    ("train.eval_eps0.1", {"label_smoothing": "much"}),
    ("train.eval_eps0.1", {"drop_worst_ratio": [1]}),
    ("generate.greedy", {"beam": "five"}),
    ("generate.greedy", {"beam": 2, "max_len_b": None}),
    ("generate.greedy", {"constraint_range": [5, 2]}),
    ("generate.greedy", {"constraint_range": "4,16"}),
])  # fmt: skip
def test_options_that_cannot_be_read_are_refused(run: str, options: dict, native: Path, reference) -> None:
    def change(runs, held, slices) -> None:
        runs[run]["options"] = options

    with pytest.raises(ReferenceFileError, match=r"options of run|constraint_range"):
        check_parity(native, reference(run, change=change), dtypes=[torch.float32])


def test_slice_beyond_the_models_logits_is_refused(native: Path, reference) -> None:
    def change(runs, held, slices) -> None:
        slices["text/out/logits"] = parse_selection([None, None, [10**6, None]])

    with pytest.raises(ReferenceFileError, match="does not fit the model"):
        check_parity(native, reference("text", change=change), dtypes=[torch.float32])


def test_reference_of_another_family_is_refused(native: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "r.safetensors", document(family="blip2"), tensors())
    with pytest.raises(ReferenceFileError, match="'blip2', but the model"):
        check_parity(native, path)


def test_directory_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "r.safetensors", document(), tensors())
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        check_parity(tmp_path, path)
