"""The algebra of operations: inverses, chains, stacks, and what they do to LoRA pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightport.checkpoints.lazy_tensors import LazyTensor, blocks, in_memory
from weightport.converters.low_rank_pair import LowRankPair
from weightport.converters.operations import (
    COPY,
    Cast,
    Chain,
    Concatenate,
    JoinAroundZeros,
    Operation,
    Pad,
    Permute,
    Reshape,
    Resize,
    Rounded,
    Split,
    Stack,
    Truncate,
    Unstack,
    applied,
)
from weightport.errors import AdapterError

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool)


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random bits, NaN among them, so that a change of any bit shows."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
    )


@st.composite
def single_steps(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[Operation, tuple[int, ...]]:
    """(an operation that takes one tensor of `shape` to one, the shape that it makes)."""
    kind = draw(st.sampled_from(("permute", "reshape", "pad", "copy")))
    if kind == "permute":
        dims = tuple(draw(st.permutations(range(len(shape)))))
        return Permute(dims), tuple(shape[axis] for axis in dims)
    if kind == "reshape":
        return Reshape(shape, (-1, *shape[2:])), (shape[0] * shape[1], *shape[2:]) if len(shape) > 1 else shape
    if kind == "pad":
        count = draw(st.integers(0, 3))
        return Pad(count), (shape[0] + count, *shape[1:])
    return COPY, shape


@st.composite
def chains(draw: st.DrawFn) -> tuple[Operation, list[tuple[int, ...]]]:
    """(a chain, the shapes of its sources): single steps, a split or a join somewhere among them."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    sources = [shape]
    steps: list[Operation] = []
    if draw(st.booleans()):
        parts = draw(st.integers(2, 3))
        sources = [shape] * parts
        dim = draw(st.integers(0, len(shape) - 1))
        steps.append(Concatenate(parts, dim))
        shape = (*shape[:dim], shape[dim] * parts, *shape[dim + 1 :])
    for _ in range(draw(st.integers(0, 3))):
        step, shape = draw(single_steps(shape))
        steps.append(step)
    if draw(st.booleans()):
        steps.append(Split(shape[0], 0))
        shape = (1, *shape[1:])
        if draw(st.booleans()):
            step, shape = draw(single_steps(shape))
            steps.append(step)
    return Chain(tuple(steps)), sources


@given(chains(), st.sampled_from(DTYPES), st.integers(0, 1000))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_backward_undoes_forward_bit_for_bit_through_any_chain(chain, dtype, seed):
    operation, shapes = chain
    tensors = [values(shape, dtype, seed + place) for place, shape in enumerate(shapes)]
    made = applied(operation.forward, tensors)
    assert all(
        tuple(lazy.shape) == tuple(t.shape) for lazy, t in zip(operation.forward(list(map(in_memory, tensors))), made)
    )
    back = applied(operation.backward, made)
    assert len(back) == len(tensors)
    assert all(same_bits(a, b) for a, b in zip(tensors, back))


@given(chains(), st.integers(1, 3), st.sampled_from(DTYPES))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_stack_of_layers_comes_apart_and_together_bit_for_bit(chain, layers, dtype):
    each, shapes = chain
    if len(shapes) == 1:
        stacked = values((layers, *shapes[0]), dtype)
        made = applied(Unstack(each).forward, [stacked])
        assert same_bits(applied(Unstack(each).backward, made)[0], stacked)
    elif each.targets == 1:
        tensors = [values(shape, dtype, place) for place, shape in enumerate(shapes * layers)]
        (stacked,) = applied(Stack(each).forward, tensors)
        assert stacked.shape[0] == layers
        back = applied(Stack(each).backward, [stacked])
        assert all(same_bits(a, b) for a, b in zip(tensors, back))


@given(chains(), st.sampled_from(DTYPES), st.integers(1, 64))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_blocks_are_the_tensor_whatever_their_size(chain, dtype, size):
    operation, shapes = chain
    tensors = [values(shape, dtype, place) for place, shape in enumerate(shapes)]
    for lazy in operation.forward(list(map(in_memory, tensors))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("weightport.checkpoints.lazy_tensors.CHUNK_BYTES", size)
            parts = [part.reshape(-1) for part in blocks(lazy)]
        assert same_bits(torch.cat(parts), lazy.read().contiguous().reshape(-1))


@pytest.mark.parametrize(
    ("operation", "shapes", "reason"),
    [
        (Split(3), [(7, 2)], "does not divide"),
        (Split(2, sizes=(3, 3)), [(7, 2)], "does not divide"),
        (Reshape((2, 6), (3, 4)), [(12,)], "is not the stated"),
        (Reshape((2, -1), (5, 3)), [(2, 6)], "does not reshape"),
        (Permute((1, 0)), [(2, 3, 4)], "has not the 2 axes"),
        (Concatenate(2), [(2, 3), (2, 4)], "do not join"),
        (Truncate(5), [(3, 2)], "too short"),
        (Cast(torch.float16, torch.float32), [(3, 2)], "expected float16"),
        (Unstack(), [()], "scalar"),
        (Stack(), [(2,), (3,)], "the layers differ"),
        (Resize(3, 4), [(8, 2)], "no table"),
    ],
)
def test_a_shape_that_an_operation_does_not_apply_to_is_refused_before_anything_is_read(operation, shapes, reason):
    def unread(start: int, stop: int) -> torch.Tensor:
        raise AssertionError("was read")

    with pytest.raises(ValueError, match=reason):
        operation.forward([LazyTensor(shape, torch.float32, unread) for shape in shapes])


def test_permute_moves_the_axis_it_says():
    kernel = torch.arange(24).reshape(2, 3, 4)
    (moved,) = applied(Permute((2, 0, 1)).forward, [kernel])
    assert moved.shape == (4, 2, 3)
    assert moved[3, 1, 2] == kernel[1, 2, 3]


def test_one_layer_of_a_stack_costs_the_bytes_of_that_layer_alone():
    asked: list[tuple[int, int]] = []

    def rows(start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        return torch.zeros(stop - start, 4, 6)

    stacked = LazyTensor((5, 4, 6), torch.float32, rows)
    made = Unstack(Chain((Split(2), Permute((1, 0))))).forward([stacked])
    assert [tensor.shape for tensor in made] == [(6, 2)] * 10
    assert not asked
    made[7].read()
    assert asked == [(3, 4)]


def test_a_stack_is_written_one_layer_at_a_time():
    held: list[int] = []

    def layer(place: int) -> LazyTensor:
        def rows(start: int, stop: int) -> torch.Tensor:
            held.append(place)
            return torch.full((stop - start, 3), float(place))

        return LazyTensor((1000, 3), torch.float32, rows)

    (stacked,) = Unstack(Permute((1, 0))).backward([layer(place) for place in range(4)])
    assert stacked.shape == (4, 3, 1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weightport.checkpoints.lazy_tensors.CHUNK_BYTES", 1000)
        for number, part in enumerate(blocks(stacked)):
            assert set(held) == set(range(number + 1)), "a later layer was read too early"
            assert part.numel() == 3000


@pytest.mark.parametrize(
    ("operation", "lost"),
    [
        (Cast(torch.float32, torch.bfloat16), "digits"),
        (Truncate(2), "last 2 rows"),
        (Resize(4, 3), "positions"),
        (Chain((Permute((1, 0)), Truncate(1))), "last 1 rows"),
        (Unstack(Cast(torch.float32, torch.float16)), "digits"),
    ],
)
def test_an_operation_that_cannot_be_undone_says_what_is_lost(operation, lost):
    assert lost in operation.lossy


@pytest.mark.parametrize(
    "operation", [Cast(torch.float16, torch.float32), Resize(3, 3), Pad(4), Unstack(Permute((1, 0)))]
)
def test_an_operation_that_can_be_undone_loses_nothing(operation):
    assert operation.lossy is None


def test_resized_positions_are_those_of_torch_and_class_tokens_stay():
    table = torch.randn(1, 1 + 9, 8)
    (grown,) = applied(Resize(3, 5, extra=1).forward, [table])
    grid = table[:, 1:].reshape(1, 3, 3, 8).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(5, 5), mode="bicubic", align_corners=False)
    assert torch.equal(grown[:, :1], table[:, :1])
    assert torch.equal(grown[0, 1:], expected.permute(0, 2, 3, 1).reshape(-1, 8))


@pytest.mark.parametrize(
    "operation",
    [COPY, Permute((1, 0)), Split(3), Split(2, sizes=(4, 8)), Pad(3), Chain((Split(2), Permute((1, 0))))],
    ids=lambda operation: operation.name,
)
def test_a_pair_does_beside_the_targets_what_it_did_beside_the_source(operation):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    pair = LowRankPair(
        torch.randn(2, 5, generator=generator, dtype=torch.float64),
        torch.randn(12, 2, generator=generator, dtype=torch.float64),
    )
    expected = applied(operation.forward, [weight + pair.b @ pair.a])
    found = zip(applied(operation.forward, [weight]), operation.pairs(pair), expected, strict=True)
    for target, part, tuned in found:
        torch.testing.assert_close(target + part.b @ part.a, tuned, rtol=0, atol=1e-14)


@pytest.mark.parametrize("operation", [Resize(3, 4), Concatenate(2), Unstack(), Split(2, dim=1)])
def test_what_a_pair_cannot_follow_is_refused_by_the_operations_name(operation):
    with pytest.raises(AdapterError, match=operation.name.split("(")[0].strip().replace("²", ".")):
        operation.pairs(LowRankPair(torch.ones(2, 4), torch.ones(4, 2)))


def test_biases_of_query_and_value_are_joined_around_zeros_and_come_back():
    query, value = torch.arange(1.0, 4.0), torch.arange(5.0, 8.0)
    (joined,) = applied(JoinAroundZeros().forward, [query, value])
    assert joined.tolist() == [1, 2, 3, 0, 0, 0, 5, 6, 7]
    # Whatever a trainer left in the middle changes nothing that the model computes.
    joined[3:6] = 1e-9
    back = applied(JoinAroundZeros().backward, [joined])
    assert torch.equal(back[0], query) and torch.equal(back[1], value)
    with pytest.raises(ValueError, match="differ"):
        applied(JoinAroundZeros().forward, [query, value[:2]])


@pytest.mark.parametrize(
    ("precision", "corners", "dtype"),
    [("rounded", False, torch.float16), ("float32", False, torch.float32), ("own", True, torch.float16)],
)
def test_positions_are_resized_in_the_stated_precision(precision, corners, dtype):
    table = torch.rand(17, 6).half()
    (grown,) = applied(Resize(4, 7, 1, corners, precision).forward, [table])
    assert grown.dtype == dtype and torch.equal(grown[0], table[0].to(dtype))
    grid = table[1:].reshape(1, 4, 4, 6).permute(0, 3, 1, 2)
    wide = grid if precision == "own" else grid.float()
    expected = torch.nn.functional.interpolate(wide, size=(7, 7), mode="bicubic", align_corners=corners)
    assert torch.equal(grown[1:], expected.permute(0, 2, 3, 1).reshape(-1, 6).to(dtype))


def test_rounded_values_are_written_in_the_narrower_type():
    values = torch.rand(4, 3)
    (rounded,) = applied(Rounded(torch.bfloat16).forward, [values])
    assert torch.equal(rounded, values.bfloat16())
    assert "bfloat16" in Rounded(torch.bfloat16).lossy
