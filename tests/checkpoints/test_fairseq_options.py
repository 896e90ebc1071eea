"""The options of a fairseq checkpoint are the same whichever way it was saved, with nothing of fairseq installed."""

from __future__ import annotations

import enum
import json
import types
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_bytes import foreign_classes

from weightport.checkpoints import open_checkpoint, plain, sections
from weightport.errors import ConfigurationError
from weightport.families.ofa.fairseq_options import fairseq_options, is_fairseq

MODEL = {"_name": "ofa_base", "arch": "ofa_base", "encoder_layers": 6, "scale_attn": True, "dropout": 0.1}
TASK = {"_name": "caption", "bpe": "bert", "patch_image_size": 480, "data": "???", "seed": "${common.seed}"}
GROUPS = {"_name": None, "common": {"seed": 7, "fp16": False}, "model": MODEL, "task": TASK, "names": ["a", ["b"]]}


class DictConfig:
    def __init__(self) -> None:
        self.__dict__["_content"] = {}


class ListConfig:
    pass


class AnyNode:
    pass


class EnumNode:
    pass


class ContainerMetadata:
    pass


class Metadata:
    pass


class Backend(enum.Enum):
    C10D = "c10d"


OMEGACONF = {
    "omegaconf__dictconfig": {"DictConfig": DictConfig},
    "omegaconf__listconfig": {"ListConfig": ListConfig},
    "omegaconf__nodes": {"AnyNode": AnyNode, "EnumNode": EnumNode},
    "omegaconf__base": {"ContainerMetadata": ContainerMetadata, "Metadata": Metadata},
    "fairseq__dataclass__constants": {"Backend": Backend},
}


def omegaconf(value: Any, parent: Any = None, key: Any = None, *, release: str = "2.0") -> Any:
    """`value` as the objects, with all their links, that omegaconf of that release pickles."""
    kinds = {dict: DictConfig, list: ListConfig, Backend: EnumNode}
    node = kinds.get(type(value), AnyNode)()
    metadata = (ContainerMetadata if type(value) in (dict, list) else Metadata)()
    vars(metadata).update(ref_type=Any, object_type=dict, optional=True, key=key, flags={"struct": True})
    if release == "2.0":
        vars(metadata).update(resolver_cache=defaultdict(dict), element_type=None, key_type=None)
    else:
        vars(metadata).update(flags_root=False, resolver_cache=defaultdict(dict))
    vars(node).update(_metadata=metadata, _parent=parent)
    if release != "2.0":
        vars(node)["_flags_cache"] = None
    if isinstance(value, dict):
        vars(node)["_content"] = {name: omegaconf(item, node, name, release=release) for name, item in value.items()}
    elif isinstance(value, list):
        vars(node)["_content"] = [omegaconf(item, node, index, release=release) for index, item in enumerate(value)]
    else:
        vars(node)["_val"] = value
    return node


def saved(path: Path, **parts: Any) -> Any:
    torch.save({"model": {"w": torch.ones(2)}, **parts}, path)
    return open_checkpoint(path)


def test_a_dictionary_of_groups_with_a_namespace_for_the_model(tmp_path):
    checkpoint = saved(tmp_path / "c.pt", args=None, cfg={**GROUPS, "model": Namespace(**MODEL)})
    options = fairseq_options(checkpoint.document)
    assert options.flavour == "cfg"
    assert options.model == MODEL and options.task == TASK
    assert options.groups["common"] == {"seed": 7, "fp16": False} and options.groups["names"] == ["a", ["b"]]
    assert options.architecture == "ofa_base" and options.task_name == "caption"
    assert list(checkpoint) == ["model.w"]


def test_one_namespace_for_everything_wins_over_groups(tmp_path):
    flat = {"arch": "ofa_tiny", "task": "caption", "patch_image_size": 128, "lr": [0.1]}
    for extra in ({}, {"cfg": None}, {"cfg": GROUPS}):
        options = fairseq_options(saved(tmp_path / "c.pt", args=Namespace(**flat), **extra).document)
        assert options.flavour == "args"
        assert options.model == options.task == flat
        assert options.architecture == "ofa_tiny" and options.task_name == "caption"


@pytest.mark.parametrize("release", ["2.0", "2.1"])
@pytest.mark.parametrize("namespace", [True, False])
def test_pickled_omegaconf_of_any_release(tmp_path, release, namespace):
    groups = {**GROUPS, "model": Namespace(**MODEL) if namespace else MODEL, "backend": Backend.C10D, "missing": "???"}
    with foreign_classes(**OMEGACONF):
        checkpoint = saved(tmp_path / "c.pt", args=None, cfg=omegaconf(groups, release=release))
    options = fairseq_options(checkpoint.document)
    assert options.flavour == "omegaconf"
    assert options.model == MODEL and options.task == TASK
    assert options.groups == {**GROUPS, "backend": "c10d", "missing": "???"}
    shown = plain(checkpoint.document)
    assert shown["cfg"]["common"] == {"seed": 7, "fp16": False}
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert list(checkpoint) == ["model.w"]


def test_the_options_name_the_same_classes_that_omegaconf_does(tmp_path):
    with foreign_classes(**OMEGACONF):
        path = tmp_path / "c.pt"
        saved(path, args=None, cfg=omegaconf(GROUPS))
    data = path.read_bytes()
    for name in (
        b"omegaconf.dictconfig\nDictConfig",
        b"omegaconf.nodes\nAnyNode",
        b"omegaconf.base\nContainerMetadata",
    ):
        assert name in data


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({}, "Expected a fairseq checkpoint"),
        ({"args": None, "cfg": None}, "Expected a fairseq checkpoint"),
        ({"args": 5}, "should hold options by name"),
        ({"cfg": {"model": 5, "task": {}}}, r"cfg\['model'\]"),
        ({"cfg": [1]}, "should hold options by name"),
    ],
)
def test_documents_without_options_say_so(tmp_path, parts, problem):
    document = saved(tmp_path / "c.pt", **parts).document
    with pytest.raises(ConfigurationError, match=problem):
        fairseq_options(document)


def test_options_that_lead_in_a_circle_are_refused(tmp_path):
    circle: dict[str, Any] = {}
    circle["model"] = circle
    document = saved(tmp_path / "c.pt", cfg=circle).document
    with pytest.raises(ConfigurationError, match="circle"):
        fairseq_options(document)
    with foreign_classes(**OMEGACONF):
        node, other = AnyNode(), AnyNode()
        node._val, other._val = other, node
        document = saved(tmp_path / "c.pt", cfg={"model": node}).document
    with pytest.raises(ConfigurationError, match="circle"):
        fairseq_options(document)


def test_options_that_share_themselves_are_read_quickly(tmp_path):
    shared: Any = {"x": 1}
    for _ in range(50):
        shared = {"a": shared, "b": shared}
    options = fairseq_options(saved(tmp_path / "c.pt", cfg={"model": shared}).document)
    assert set(options.model) == {"a", "b"} and options.task == {}


def test_other_checkpoints_are_not_taken_for_fairseqs(tmp_path):
    assert is_fairseq(saved(tmp_path / "a.pt", cfg={"model": {}}).document)
    assert is_fairseq(saved(tmp_path / "b.pt", args=Namespace()).document)
    for document in (None, {}, {"model": {}}, {"args": Namespace()}, {"model": {}, "args": None, "cfg": None}, []):
        assert not is_fairseq(document)


def test_sections_tell_sizes_without_reading(tmp_path):
    shared = torch.zeros(10)
    torch.save(
        {
            "model": {"a": shared, "b": shared, "c.d": torch.zeros(3)},
            "optimizer.state": [{"m": torch.zeros(100)}],
            "step": torch.tensor(1),
            "epoch": 1,
        },
        tmp_path / "c.pt",
    )
    found = {part.name: (part.tensors, part.nbytes) for part in sections(open_checkpoint(tmp_path / "c.pt"))}
    assert found == {"model": (3, 52), "optimizer.state": (1, 400), "": (1, 8)}
    torch.save({"encoder.weight": torch.zeros(4), "decoder.weight": torch.zeros(4)}, tmp_path / "flat.pt")
    (part,) = sections(open_checkpoint(tmp_path / "flat.pt"))
    assert (part.name, part.tensors, part.nbytes) == ("", 2, 32)


def test_anything_can_be_shown_as_json(tmp_path):
    value: dict[Any, Any] = {
        "nan": float("nan"),
        "inf": [float("inf")],
        "bytes": b"\xff",
        "set": {1},
        "complex": 1j,
        "space": Namespace(a=types.SimpleNamespace(b=1)),
        "tensor": torch.zeros(2, 3, dtype=torch.bfloat16),
        "dtype": torch.float16,
        ("x", 1): None,
        5: "five",
        "long": "x" * 10_000,
        "many": list(range(5000)),
        "deep": [[[[[[[[[1]]]]]]]]],
    }
    torch.save(value, tmp_path / "c.pt")
    shown = plain(open_checkpoint(tmp_path / "c.pt").document)
    json.dumps(shown, allow_nan=False)
    assert shown["tensor"] == "bfloat16 [2, 3]" and shown["nan"] == "nan" and shown["bytes"] == "<1 bytes>"
    assert shown["space"] == {"__type__": "argparse.Namespace", "a": {"__type__": "types.SimpleNamespace", "b": 1}}
    assert shown["5"] == "five" and shown["many"][-1] == "…" and shown["long"].endswith("…")
    assert len(json.dumps(shown)) < 20_000
