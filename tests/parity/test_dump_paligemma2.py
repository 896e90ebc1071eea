"""dump_paligemma2.py: what it reads and derives, without JAX; and whole, against a small big_vision, with JAX.

The second part runs where WEIGHTPORT_JAX_PYTHON names a Python with jax, flax, ml_collections, pillow, safetensors.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from original_stand_ins import SCRIPTS, script
from PIL import Image

from weightport.parity import read_reference

STAND_INS = Path(__file__).parent / "stand_ins"
JAX_PYTHON = os.environ.get("WEIGHTPORT_JAX_PYTHON")
PREFIXES, SUFFIXES = ("ab", "abcd"), ("xyz", "x")


@pytest.fixture
def dump():
    return script("dump_paligemma2")


def save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **{name.replace("|", "/"): array for name, array in arrays.items()})
    return path


@pytest.mark.parametrize("prefix", ["params/", "opt/target/", ""])
def test_parameters_are_found_under_every_prefix_and_nothing_else_is(dump, prefix: str, tmp_path: Path) -> None:
    other = {"opt/step": np.ones(1), "chrono/x": np.ones(1)} if prefix else {}
    arrays = {f"{prefix}img/head/bias": np.arange(3, dtype=np.float32)} | other
    path = tmp_path / "p.npz"
    np.savez(path, **arrays)
    assert {key: array.tolist() for key, array in dump.read_params(path).items()} == {"img/head/bias": [0, 1, 2]}


def test_raw_bfloat16_is_widened_and_not_cast(dump) -> None:
    values = torch.tensor([1.5, -2.25, 3e-20, 0.0], dtype=torch.bfloat16)
    raw = values.view(torch.int16).numpy().view("V2")
    found = dump.widened(raw)
    assert found.dtype == np.float32 and found.tolist() == values.float().tolist()


def test_nan_in_the_checkpoint_is_refused(dump, tmp_path: Path) -> None:
    with pytest.raises(dump.DumpError, match="NaN in img/head/bias"):
        dump.read_params(save(tmp_path / "p.npz", **{"params|img|head|bias": np.float32([np.nan])}))


def shapes(*, layers: int = 26, width: int = 2304, stacked: bool = True) -> dict[str, np.ndarray]:
    block = "img/Transformer/encoderblock" + ("" if stacked else "_%d")
    vision = {
        f"{block}/MultiHeadDotProductAttention_0/query/kernel": (12, 3, 4),
        f"{block}/MlpBlock_0/Dense_0/kernel": (12, 16),
    }
    found = {name: (2, *shape) for name, shape in vision.items()}
    if not stacked:
        found = {name % layer: shape for name, shape in vision.items() for layer in range(2)}
    found |= {"llm/embedder/input_embedding": (7, width), "llm/layers/mlp/linear": (layers, 1, 1),
              "img/pos_embedding": (1, 9, 12), "img/embedding/kernel": (14, 14, 3, 12)}  # fmt: skip
    return {name: np.zeros(shape, np.float32) for name, shape in found.items()}


@pytest.mark.parametrize("stacked", [True, False])
def test_sizes_come_from_the_shapes(dump, stacked: bool) -> None:
    image, text, size = dump.architecture(shapes(stacked=stacked))
    assert image == {"width": 12, "depth": 2, "mlp_dim": 16, "num_heads": 3, "patch_size": (14, 14),
                     "pool_type": "none", "scan": stacked}  # fmt: skip
    assert (text["variant"], text["vocab_size"], text["scan"], size) == ("gemma2_2b", 7, True, 42)


def test_cache_is_not_the_originals_bfloat16(dump) -> None:
    assert dump.architecture(shapes())[1]["cache_dtype"] == "float32"


def test_unknown_text_model_asks_for_its_name(dump) -> None:
    with pytest.raises(dump.DumpError, match=r"width 9 and 3 layers: give --variant"):
        dump.architecture(shapes(layers=3, width=9))
    assert dump.architecture(shapes(layers=3, width=9), "gemma_mine")[1]["variant"] == "gemma_mine"


def test_prefix_is_not_causal_and_only_the_suffix_is_in_the_loss(dump) -> None:
    batch = dump.text_batch(lambda text: [10 + len(text)] * len(text), ["ab", "a"], ["x", "xyz"])
    assert batch["text"].tolist() == [[2, 12, 12, 11, 11, 1, 0], [2, 11, 11, 13, 13, 13, 1]]
    assert batch["mask_ar"].tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]]
    assert batch["mask_loss"].tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]]
    assert batch["mask_input"].tolist() == [[1, 1, 1, 1, 1, 1, 0], [1] * 7]


def test_norm_of_a_stacked_gradient_is_one_a_layer(dump) -> None:
    gradient = np.float32([[3, 4], [0, 2]])
    assert dump.norms("llm/layers/mlp/linear", gradient).tolist() == [5, 2]
    assert dump.norms("llm/final_norm/scale", gradient).tolist() == pytest.approx(29**0.5)
    assert dump.norms("llm/layers/0/mlp/linear", gradient).tolist() == pytest.approx(29**0.5)
    assert dump.norms("img/Transformer/encoderblock_0/x", gradient).tolist() == pytest.approx(29**0.5)


def test_layer_whose_gradient_is_zero_is_refused_among_others(dump, tmp_path: Path) -> None:
    tensors = {"train/out/grad_norm.llm/layers/mlp/linear": np.float64([1, 0])}
    with pytest.raises(dump.DumpError, match="linear is all zeros"):
        dump.write(str(tmp_path / "r"), "paligemma2", {}, {"train": {"kind": "train"}}, tensors)


def test_float32_run_that_gave_float64_is_refused(dump, tmp_path: Path) -> None:
    with pytest.raises(dump.DumpError, match="is float64, in a float32 run"):
        dump.write(str(tmp_path / "r"), "paligemma2", {}, {"f": {"kind": "forward"}}, {"f/out/logits": np.ones(2)})


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Writes a tiny npz and dumps it in the environment with JAX."""
    if JAX_PYTHON is None:
        pytest.skip("WEIGHTPORT_JAX_PYTHON names no Python with JAX")
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(STAND_INS))
    for number, size in enumerate(((9, 7), (8, 8))):
        Image.new("RGB", size, (40 * number, 200, 90)).save(tmp_path / f"{number}.png")

    def dumped(*options: str, of: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        tiny, out = tmp_path / "tiny.npz", tmp_path / "reference.safetensors"
        subprocess.run([JAX_PYTHON, STAND_INS / "tiny_paligemma.py", SCRIPTS / "dump_paligemma2.py", tiny, *of],
                       check=True, env=environment)  # fmt: skip
        given = [each for number in (0, 1) for each in ("--image", str(tmp_path / f"{number}.png"), "--prefix",
                                                        PREFIXES[number], "--suffix", SUFFIXES[number])]  # fmt: skip
        command = [JAX_PYTHON, SCRIPTS / "dump_paligemma2.py", tiny, out, "--repo", STAND_INS, "--tokenizer", "none",
                   "--variant", "gemma_tiny", "--max-decode-len", "4", *given, *options]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    return dumped


@pytest.mark.parametrize("of", [(), ("unstacked",), ("bfloat16",)])
def test_whole_dump_is_a_reference_in_both_precisions(run, of: tuple[str, ...], tmp_path: Path) -> None:
    finished = run(of=of)
    assert finished.returncode == 0, finished.stderr
    reference = read_reference(tmp_path / "reference.safetensors")
    assert [(each.name, each.kind) for each in reference.runs] == [
        ("forward", "forward"), ("train", "train"), ("trainer", "train"), ("greedy", "generate"),
    ]  # fmt: skip
    found = {each.tensor.name: each.tensor.read() for run in reference.runs for each in run.outputs}
    forward = {name.removeprefix("forward/out/") for name in found if name.startswith("forward/out/")}
    seams = {"vision.embeddings", "vision.layers.0", "vision.layers.1", "vision", "projector", "decoder.layers.0",
             "decoder.layers.1", "decoder.layers.2", "decoder", "logits"}  # fmt: skip
    assert forward == seams | {f"{seam}@float64" for seam in seams}
    for name, tensor in found.items():
        if name.endswith("@float64"):
            near = found[name.removesuffix("@float64")].double()
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(near, tensor, rtol=1e-4, atol=2e-5)
    logits = found["forward/out/logits@float64"]
    assert not torch.equal(logits, logits.float().double())
    assert found["forward/out/decoder.layers.2"].shape == (2, 4 + 7, 8)
    assert found["train/out/grad_norm.llm/layers/mlp/linear"].shape == (3,)
    assert found["greedy/out/sequences"].shape == (2, 1, 4)


def test_attention_logits_stay_float64(run, tmp_path: Path) -> None:
    """Against the same mathematics in numpy's float64: the first text layer of the stand-in."""
    assert run().returncode == 0
    reference = read_reference(tmp_path / "reference.safetensors")
    found = {each.tensor.name: each.tensor.read().numpy() for run in reference.runs for each in run.outputs}
    given = {ref.name: ref.read().numpy() for run in reference.runs for ref in run.inputs.values()}
    stored = script("dump_paligemma2").read_params(tmp_path / "tiny.npz")
    params = {key: value.astype(np.float64) for key, value in stored.items()}

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * (1 + scale)

    text = params["llm/embedder/input_embedding"][given["forward/in/text"]] * np.sqrt(8.0)
    x = np.concatenate([found["forward/out/projector@float64"], text], axis=1)
    order = np.cumsum(np.pad(given["forward/in/mask_ar"], ((0, 0), (4, 0))), axis=1)
    mask = order[:, None, :] <= order[:, :, None]
    layer = {name.removeprefix("llm/layers/"): value[0] for name, value in params.items() if "llm/layers/" in name}
    y = norm(x, layer["pre_attention_norm/scale"])
    q = np.einsum("BTD,NDH->BTNH", y, layer["attn/q_einsum/w"]).reshape(2, -1, 2, 2, 4) / 2
    k, v = np.einsum("BSD,CKDH->CBSKH", y, layer["attn/kv_einsum/w"])
    scores = np.where(mask[:, None, None], np.einsum("BTKGH,BSKH->BKGTS", q, k), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    heads = np.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(2, -1, 4, 4)
    x = x + np.einsum("BTNH,NHD->BTD", heads, layer["attn/attn_vec_einsum/w"])
    y = norm(x, layer["pre_ffw_norm/scale"])
    gate = y @ layer["mlp/gating_einsum"][0]
    gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    x = x + (gate * (y @ layer["mlp/gating_einsum"][1])) @ layer["mlp/linear"]
    assert np.abs(x - found["forward/out/decoder.layers.0@float64"]).max() <= 1e-13


@pytest.mark.parametrize(
    ("of", "said"),
    [
        ("missing", "the checkpoint has no llm/layers/pre_ffw_norm/scale"),
        ("surplus", "the checkpoint has unknown llm/layers/post_ffw_norm/scale"),
    ],
)
def test_checkpoint_of_other_tensors_is_refused(run, of: str, said: str, tmp_path: Path) -> None:
    finished = run(of=(of,))
    assert finished.returncode == 1 and said in finished.stderr and "Traceback" not in finished.stderr
    assert not list(tmp_path.glob("reference*"))


def test_no_float64_leaves_it_out(run, tmp_path: Path) -> None:
    assert run("--no-float64").returncode == 0
    reference = read_reference(tmp_path / "reference.safetensors")
    assert {each.dtype for run in reference.runs for each in run.outputs} == {torch.float32}
