"""The rule engine: patterns, operations, tables, and the completeness of plans."""

from __future__ import annotations

import pytest
import torch

from weightport.checkpoints import TensorRef
from weightport.checkpoints.types import NamedTensors
from weightport.converters.native import NativeTensors
from weightport.converters.patterns import Pattern, check_correspondence
from weightport.converters.plan import plan
from weightport.converters.rules import RuleTable, concatenate, drop, fill, move, renames, split, table, tie
from weightport.errors import CoverageError


def ref(name: str, tensor: torch.Tensor) -> TensorRef:
    return TensorRef.of(name, tuple(tensor.shape), tensor.dtype, lambda: tensor, (id(tensor),))


def sources(**tensors: torch.Tensor) -> NamedTensors:
    return NamedTensors(ref(name, tensor) for name, tensor in tensors.items())


def native(**shapes: tuple[int, ...]) -> NativeTensors:
    return NativeTensors(shapes)


@pytest.mark.parametrize(
    ("pattern", "name", "captures"),
    [
        ("a.*.b", "a.12.b", (12,)),
        ("a.*.b", "a.x.b", None),
        ("a.*.b", "a.012.b", None),
        ("a.*.b", "a.1.b.c", None),
        ("a.{q,k}_proj.{weight,bias}", "a.k_proj.weight", (1, 0)),
        ("a.{q,k}_proj", "a.v_proj", None),
        ("x.**", "x.anything.at.all", ("anything.at.all",)),
        ("{fc,fc1}.w", "fc1.w", (1,)),
        ("params/img/*/w", "params/img/3/w", (3,)),
        ("a.b", "axb", None),
    ],
)
def test_a_pattern_reads_only_the_names_it_describes(pattern, name, captures):
    assert Pattern(pattern).match(name) == captures


def test_filling_is_the_inverse_of_matching():
    pattern = Pattern("encoder.layers.*.{self,cross}_attn.{q,k,v}_proj.**")
    name = "encoder.layers.11.cross_attn.v_proj.lora_A.weight"
    assert pattern.fill(pattern.match(name)) == name


def test_alternatives_correspond_by_place_so_that_stages_are_renumbered():
    left, right = Pattern("layer{1,2,3}.*.conv{1,2}"), Pattern("stages.{0,1,2}.layers.*.layer.{0,1}")
    check_correspondence(left, right)
    assert right.fill(left.match("layer3.22.conv1")) == "stages.2.layers.22.layer.0"


@pytest.mark.parametrize(("left", "right"), [("a.*", "b"), ("a.{x,y}", "b.{x,y,z}"), ("a.*.{x,y}", "b.{x,y}.*")])
def test_a_rule_whose_sides_cannot_be_read_backwards_is_refused(left, right):
    with pytest.raises(ValueError, match=r"hole|correspond"):
        move(left, right)


def test_a_line_of_renames_with_three_names_is_refused():
    with pytest.raises(ValueError, match="one or two"):
        renames("a.", "b.", "x y z")


def test_every_unaccounted_tensor_is_named_in_one_error():
    rules = table(move("a", "x"), move("b", "y"), move("c", "z"))
    with pytest.raises(CoverageError, match="native model's do not meet") as caught:
        plan(
            sources(a=torch.zeros(2), c=torch.zeros(4), stray=torch.zeros(7)),
            rules,
            native(x=(2,), y=(3,), z=(5,)),
        )
    text = str(caught.value)
    assert "b [3] → y" in text
    assert "stray [7]" in text
    assert "the model has [5], the file gives [4]" in text


def test_an_operation_that_does_not_apply_is_named_once():
    rules = table(split("qkv", ("q", "k", "v")))
    with pytest.raises(CoverageError, match=r"qkv \[4\]: split into 3 along 0 does not apply") as caught:
        plan(sources(qkv=torch.zeros(4)), rules, native(q=(2,), k=(2,), v=(2,)))
    assert "missing" not in str(caught.value), "the targets are explained by the shape already"


def test_a_target_the_model_does_not_have_is_surplus():
    with pytest.raises(CoverageError, match=r"b \[1\] \(would become y, which the model does not have\)"):
        plan(sources(a=torch.zeros(1), b=torch.zeros(1)), table(move("{a,b}", "{x,y}")), native(x=(1,)))


def test_a_name_that_two_rules_claim_is_refused():
    with pytest.raises(CoverageError, match=r"claims a\.1 twice"):
        plan(NamedTensors([ref("a.1", torch.zeros(1))]), table(move("a.*", "x.*"), move("a.**", "y.**")), native())


def test_a_missing_part_of_a_concatenation_is_named():
    rules = table(concatenate(("q", "k", "v"), "qkv"))
    with pytest.raises(CoverageError, match=r"(?s)missing from the checkpoint:\s+k"):
        plan(sources(q=torch.zeros(2, 2), v=torch.zeros(2, 2)), rules, native(qkv=(6, 2)))


def test_a_split_that_does_not_divide_is_named():
    rules = table(split("qkv", into=("q", "k", "v")))
    with pytest.raises(CoverageError, match=r"qkv \[7, 2\]: split into 3"):
        plan(sources(qkv=torch.zeros(7, 2)), rules, native(q=(2, 2), k=(2, 2), v=(2, 2)))


def test_dropped_and_filled_tensors_keep_their_reasons():
    rules = table(move("a", "x"), drop("buffer", because="recomputed"), fill("count", 3, because="absent"))
    made = plan(sources(a=torch.zeros(2), buffer=torch.zeros(9)), rules, native(x=(2,), count=(2,)))
    assert [(item.ref.name, item.because) for item in made.dropped] == [("buffer", "recomputed")]
    filled = next(step for step in made.steps if step.targets[0].name == "count")
    assert torch.equal(torch.cat(list(filled.targets[0].blocks())), torch.full((2,), 3.0))


def test_a_user_may_give_a_tensor_up_by_name():
    made = plan(
        sources(a=torch.zeros(2), head=torch.zeros(1)), table(move("a", "x")), native(x=(2,)), drop={"head": "asked"}
    )
    assert [item.because for item in made.dropped] == ["asked"]


def test_an_alias_of_another_shape_is_refused():
    rules = table(tie("a", "b", to="x"))
    with pytest.raises(CoverageError, match="tied copy"):
        plan(sources(a=torch.zeros(2), b=torch.zeros(3)), rules, native(x=(2,)))


def test_tables_add_up_without_losing_rows():
    first, second = table(move("a", "x")), table(drop("b", because="no"))
    both = first + second
    assert isinstance(both, RuleTable)
    assert (len(both.rules), len(both.dropped)) == (1, 1)
