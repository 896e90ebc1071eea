"""Rules for tensors that hold all layers, as big_vision saves them, and models of two source files: both ways."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weightport.checkpoints import TensorRef, open_checkpoint
from weightport.checkpoints.sources import combine
from weightport.checkpoints.types import NamedTensors
from weightport.converters.export import original_tensors
from weightport.converters.native import NativeTensors
from weightport.converters.operations import Chain, Permute, Reshape, Unstack
from weightport.converters.plan import plan
from weightport.converters.rules import gated_mlp, move, table, unstack
from weightport.errors import CheckpointError, CoverageError
from weightport.writing.npz import write_npz
from weightport.writing.safetensors_shards import lay_out, write_shards

L, N, K, D, H, F = 3, 4, 2, 6, 5, 7  # layers, heads, key heads, width, head width, MLP width
HEAD = Permute((0, 2, 1))  # [heads, width, head width] → [heads, head width, width]

GEMMA = table(
    move("llm/embedder/input_embedding", "model.embed_tokens.weight"),
    unstack("llm/layers/pre_attention_norm/scale", "model.layers.*.input_layernorm.weight"),
    unstack(
        "llm/layers/attn/q_einsum/w",
        "model.layers.*.self_attn.q_proj.weight",
        each=Chain((HEAD, Reshape((N, H, D), (N * H, D)))),
    ),
    unstack(
        "llm/layers/attn/kv_einsum/w",
        "model.layers.*.self_attn.k_proj.weight",
        "model.layers.*.self_attn.v_proj.weight",
        each=Chain((Unstack(parts=2), HEAD, Reshape((K, H, D), (K * H, D)))),
    ),
    gated_mlp(
        "llm/layers/mlp/gating_einsum",
        "model.layers.*.mlp.gate_proj.weight",
        "model.layers.*.mlp.up_proj.weight",
        each=Permute((1, 0)),
    ),
)

STACKED = {
    "llm/embedder/input_embedding": (11, D),
    "llm/layers/pre_attention_norm/scale": (L, D),
    "llm/layers/attn/q_einsum/w": (L, N, D, H),
    "llm/layers/attn/kv_einsum/w": (L, 2, K, D, H),
    "llm/layers/mlp/gating_einsum": (L, 2, D, F),
}

NATIVE = {
    "model.embed_tokens.weight": (11, D),
    **{f"model.layers.{i}.input_layernorm.weight": (D,) for i in range(L)},
    **{f"model.layers.{i}.self_attn.q_proj.weight": (N * H, D) for i in range(L)},
    **{f"model.layers.{i}.self_attn.{p}_proj.weight": (K * H, D) for i in range(L) for p in "kv"},
    **{f"model.layers.{i}.mlp.{p}_proj.weight": (F, D) for i in range(L) for p in ("gate", "up")},
}


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in STACKED.items()}


def test_stacked_arrays_become_layers_as_the_original_indexes_them(arrays, tmp_path):
    np.savez(tmp_path / "source.npz", **arrays)
    tensors = NamedTensors(open_checkpoint(tmp_path / "source.npz").values())
    made = plan(tensors, GEMMA, NativeTensors(NATIVE))
    written = {
        target.name: torch.cat([b.reshape(-1) for b in target.blocks()]).reshape(target.shape)
        for target in made.targets
    }
    for layer in range(L):
        attention = f"model.layers.{layer}.self_attn"
        q = arrays["llm/layers/attn/q_einsum/w"][layer].transpose(0, 2, 1).reshape(N * H, D)
        value = arrays["llm/layers/attn/kv_einsum/w"][layer, 1].transpose(0, 2, 1).reshape(K * H, D)
        np.testing.assert_array_equal(written[f"{attention}.q_proj.weight"].numpy(), q)
        np.testing.assert_array_equal(written[f"{attention}.v_proj.weight"].numpy(), value)
        up = arrays["llm/layers/mlp/gating_einsum"][layer, 1].T
        np.testing.assert_array_equal(written[f"model.layers.{layer}.mlp.up_proj.weight"].numpy(), up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_table_gives_the_npz_back_array_by_array(arrays, tmp_path, dtype):
    source = tmp_path / "source.npz"
    refs = {name: torch.from_numpy(array).to(dtype) for name, array in arrays.items()}
    given = NamedTensors(TensorRef.of(n, tuple(t.shape), t.dtype, lambda t=t: t, (n,)) for n, t in refs.items())
    made = plan(given, GEMMA, NativeTensors(NATIVE))
    (tmp_path / "native").mkdir()
    write_shards(lay_out(made.targets, 10**9), tmp_path / "native")
    native = open_checkpoint(tmp_path / "native" / "model.safetensors")
    back, lost = original_tensors(native, GEMMA, config=None, record={})
    assert not lost
    write_npz(sorted(back, key=lambda tensor: list(STACKED).index(tensor.name)), source)
    for name, array in np.load(source, allow_pickle=False).items():
        expected = refs[name].view(torch.int16).numpy().view("V2") if dtype == torch.bfloat16 else refs[name].numpy()
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)
    assert list(open_checkpoint(source)) == list(STACKED)


def test_layers_that_are_not_all_there_are_missing_on_the_way_back(arrays, tmp_path):
    given = NamedTensors(
        TensorRef.of(n, shape, torch.float32, lambda s=shape: torch.zeros(s), (n,))
        for n, shape in NATIVE.items()
        if n != "model.layers.1.mlp.up_proj.weight"
    )
    with pytest.raises(CoverageError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        original_tensors(_checkpoint(given), GEMMA, config=None, record={})


def test_a_layer_number_in_one_name_does_not_decide_how_many_names_are_made():
    given = NamedTensors(
        [TensorRef.of("model.layers.999999999.input_layernorm.weight", (D,), torch.float32, lambda: torch.zeros(D))]
    )
    with pytest.raises(CoverageError, match="layers of"):
        original_tensors(_checkpoint(given), GEMMA, config=None, record={})


def test_another_number_of_layers_than_the_model_has_is_named(arrays):
    shapes = {name: shape for name, shape in NATIVE.items() if "layers.2." not in name}
    given = NamedTensors(
        TensorRef.of(n, a.shape, torch.float32, lambda a=a: torch.from_numpy(a), (n,)) for n, a in arrays.items()
    )
    with pytest.raises(CoverageError, match=r"would become model\.layers\.2\..*which the model does not have"):
        plan(given, GEMMA, NativeTensors(shapes))


def _checkpoint(tensors: NamedTensors):
    from pathlib import Path

    from weightport.checkpoints import Checkpoint

    return Checkpoint(Path("native"), "safetensors", (), tensors)


# Two sources: a checkpoint with what was trained, and a file with the vision tower.

TWO = table(move("visual.{a,b}", "vision.{a,b}"), move("projection", "projector.weight"))


def two_sources(trained: dict[str, float], vision: dict[str, float]):
    def part(values: dict[str, float]) -> NamedTensors:
        return NamedTensors(
            TensorRef.of(name, (2,), torch.float32, lambda value=value: torch.full((2,), value), (name, value))
            for name, value in values.items()
        )

    return combine({"checkpoint": part(trained), "vision": part(vision)})


def test_two_sources_are_one_checkpoint_and_every_tensor_knows_its_own():
    both = two_sources({"projection": 1.0}, {"visual.a": 2.0, "visual.b": 3.0})
    assert both.origins == {"projection": "checkpoint", "visual.a": "vision", "visual.b": "vision"}
    made = plan(both.tensors, TWO, NativeTensors({"vision.a": (2,), "vision.b": (2,), "projector.weight": (2,)}))
    assert {t.name: float(next(t.blocks())[0]) for t in made.targets} == {
        "projector.weight": 1.0, "vision.a": 2.0, "vision.b": 3.0,
    }  # fmt: skip


def test_a_tensor_that_two_sources_hold_is_the_first_ones_and_the_other_is_accounted_for():
    both = two_sources({"projection": 1.0, "visual.b": 9.0}, {"visual.a": 2.0, "visual.b": 3.0})
    assert both.origins["visual.b"] == "checkpoint"
    assert float(both.tensors["visual.b"].read()[0]) == 9.0
    assert {source: list(tensors) for source, tensors in both.shadowed.items()} == {"vision": ["visual.b"]}


def test_what_no_source_holds_is_missing_from_all_of_them():
    both = two_sources({"projection": 1.0}, {"visual.a": 2.0})
    with pytest.raises(CoverageError, match=r"visual\.b \[2\] → vision\.b"):
        plan(both.tensors, TWO, NativeTensors({"vision.a": (2,), "vision.b": (2,), "projector.weight": (2,)}))


def test_an_export_of_one_part_leaves_the_others_tensors_out():
    native = _checkpoint(
        NamedTensors(
            TensorRef.of(name, (2,), torch.float32, lambda: torch.zeros(2), (name,))
            for name in ("vision.a", "vision.b", "projector.weight")
        )
    )
    sources = {
        "checkpoint": {"tensors": {"projection": "float32"}},
        "vision": {"tensors": {"visual.a": "float32", "visual.b": "float32"}},
    }
    for part, expected in (("checkpoint", ["projection"]), ("vision", ["visual.a", "visual.b"])):
        found, _ = original_tensors(native, TWO, config=None, record={"sources": sources}, part=part)
        assert [tensor.name for tensor in found] == expected


def test_two_tensors_of_one_name_are_no_set_of_tensors():
    ref = TensorRef.of("a", (1,), torch.float32, lambda: torch.zeros(1))
    with pytest.raises(CheckpointError, match="Two tensors are named a"):
        NamedTensors([ref, ref])


def test_a_rule_table_can_be_read_backwards_only_where_layers_stand_on_one_side():
    with pytest.raises(ValueError, match=r"has no \* for the layer"):
        unstack("llm/scale", "model.norm.weight")
