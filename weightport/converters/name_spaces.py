"""Names on disk and names in memory: which stored tensors each tensor of a running model is made of.

transformers renames tensors, and stacks or splits some, while it loads; what a class calls its tensors is not what a
directory holds, and directories of one class differ (the Hub's, and what save_pretrained writes of a fresh model). The
names in the files decide: each goes through transformers' own loading rules, and the result is read backwards. The
model is built on the meta device, so this takes no memory for weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightport.converters.stored_pieces import Assembled, Converting, Piece, follow
from weightport.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class NameSpace:
    """The tensors of a running model and where their values are stored.

    shapes: of every parameter and persistent buffer, by the model's name. made_of: the blocks of stored tensors that
    make each. permuted: tensors whose values are rearranged in another way while they are loaded, and by what. tied:
    names of one tensor's other places, to the name that is stored; bound: all ties that the model declares. unused:
    stored tensors that the model does not take. parameters: names of each module's own parameters, in the module's
    order; turned: modules whose matrices are [in, out]. head, embedding: the weights of the output and input
    embeddings; ties_words: whether the configuration says, at its top, that they are one.
    """

    architecture: str
    shapes: Mapping[str, tuple[int, ...]]
    made_of: Mapping[str, tuple[Piece, ...]]
    permuted: Mapping[str, str]
    tied: Mapping[str, str]
    bound: Mapping[str, str]
    unused: tuple[str, ...]
    parameters: Mapping[str, tuple[str, ...]]
    turned: frozenset[str]
    head: str | None
    embedding: str | None
    ties_words: bool
    _rules: _Rules = field(repr=False)

    def current(self, name: str) -> str | None:
        """Today's name of the tensor that an earlier transformers called `name`, or a file does; None when the model
        has none."""
        if name in self.shapes:
            return name
        renamed, converted = self._rules.renamed(name)
        return renamed if converted is None and renamed in self.shapes else None

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """The stored blocks that make the model's tensor `name`; none where it is not stored, or permuted."""
        return self.made_of.get(self.tied.get(name, name), ())

    @cached_property
    def _held(self) -> Mapping[str, tuple[str, ...]]:
        found: dict[str, list[str]] = {}
        for name, pieces in self.made_of.items():
            for stored in dict.fromkeys(piece.stored for piece in pieces):
                found.setdefault(stored, []).append(name)
        return {stored: tuple(names) for stored, names in found.items()}

    def held(self) -> Mapping[str, tuple[str, ...]]:
        """By stored tensor the names of the model's tensors that take values from it."""
        return self._held

    def stored_name(self, name: str) -> str:
        """A name under which a file may hold the model's tensor `name`, so that loading finds it: as the other names
        in the file are written, where that can be told."""
        candidate = self._rules.undone(name)
        return candidate if self._rules.renamed(candidate) == (name, None) else name


@dataclass(frozen=True)
class _Rules:
    """transformers' rules of one model: how a stored name becomes the model's."""

    renamings: list[Any]
    converters: list[Any]
    prefix: str
    state: dict[str, Any]
    used: list[Any] = field(default_factory=list)

    def renamed(self, stored: str) -> tuple[str, str | None]:
        """(the model's name of a stored tensor, the pattern of the converter that takes it), as loading finds them."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(stored, self.renamings, self.converters, self.prefix, self.state)
        if name not in self.state and stored in self.state:
            name, pattern = rename_source_key(stored, [], [], self.prefix, self.state)
        return name, pattern

    def undone(self, name: str) -> str:
        """`name` with the renamings undone that the stored names needed, the last first."""
        for rule in reversed(self.used):
            name, _ = rule.reverse_transform().rename_source_key(name)
        return name


def name_space(directory: str | Path, stored: Mapping[str, tuple[int, ...]]) -> NameSpace:
    """The name space of a model directory whose files hold tensors of the shapes `stored`, by name.

    Raises ConfigurationError when its config.json builds no model that transformers or weightport has.
    """
    return name_space_of(meta_model(Path(directory)), stored)


def meta_model(directory: Path) -> PreTrainedModel:
    """The model that the directory's config.json names, on the meta device. Raises ConfigurationError."""
    import transformers

    import weightport.modeling  # noqa: F401 - registers with the Auto classes

    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{directory / 'config.json'} builds no configuration: {error}") from error
    name = str((config.architectures or [None])[0])
    model_class = getattr(transformers, name, None) or _registered(name, config)
    if model_class is None:
        raise ConfigurationError(
            f"{directory}: transformers {transformers.__version__} has no architecture {name!r}, so the names of its "
            "running model are not known."
        )
    try:
        with torch.device("meta"):
            model: PreTrainedModel = model_class(config)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise ConfigurationError(f"{directory / 'config.json'} builds no {name}: {error}") from error
    return model


def _registered(name: str, config: PreTrainedConfig) -> Any:
    """The class `name` that the Auto classes know for a configuration of ours; None when there is none."""
    from transformers import (
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
        AutoModelForZeroShotImageClassification,
    )

    import weightport.modeling  # noqa: F401 - registers with the Auto classes

    loaders = (
        AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoModelForZeroShotImageClassification, AutoModel,
    )  # fmt: skip
    for auto_class in loaders:
        found = auto_class._model_mapping.get(type(config), None)
        if getattr(found, "__name__", None) == name:
            return found
    return None


def name_space_of(model: PreTrainedModel, stored: Mapping[str, tuple[int, ...]]) -> NameSpace:
    """The name space of a model (on the meta device) whose files hold tensors of the shapes `stored`, by name."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key
    from transformers.pytorch_utils import Conv1D

    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    transforms = get_model_conversion_mapping(model)
    rules = _Rules(
        [rule for rule in transforms if isinstance(rule, WeightRenaming)],
        [rule for rule in transforms if isinstance(rule, WeightConverter)],
        model.base_model_prefix,
        dict(state),
    )
    by_pattern = {pattern: rule for rule in rules.converters for pattern in rule.source_patterns}
    collected: dict[str, tuple[Any, dict[str, list[Assembled]]]] = {}
    made_of: dict[str, tuple[Piece, ...]] = {}
    unused: list[str] = []
    for name in sorted(stored, key=dot_natural_key):
        renamed, pattern = rules.renamed(name)
        if renamed not in shapes:
            unused.append(name)
        elif pattern is None:
            made_of.setdefault(renamed, Assembled.whole(name, stored[name]).pieces)
        else:
            _, lists = collected.setdefault(renamed, (deepcopy(by_pattern[pattern]), {}))
            lists.setdefault(pattern, []).append(Assembled.whole(name, stored[name]))
    rules.used.extend(rule for rule in rules.renamings if rule.was_used())
    permuted: dict[str, str] = {}
    for renamed, (rule, lists) in collected.items():
        use = Converting(rule.source_patterns, rule.target_patterns, renamed, shapes, model.config)
        found: dict[str, list[Assembled]] | None = lists
        for operation in rule.operations:
            found = follow(operation, found, use) if found is not None else None
        names = [renamed.replace(rule.target_patterns[0], target) for target in rule.target_patterns]
        if found is None:
            permuted |= {name: ", ".join(type(op).__name__ for op in rule.operations) for name in names}
            continue
        prefix, _, suffix = next((renamed.partition(key) for key in found if key in renamed), (renamed, "", ""))
        for key, tensors in found.items():
            made_of.setdefault(prefix + key + suffix, tensors[0].pieces)
    bound: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return NameSpace(
        type(model).__name__,
        shapes,
        made_of,
        permuted,
        _ties(bound, made_of),
        bound,
        tuple(unused),
        {
            name: tuple(own for own, _ in module.named_parameters(recurse=False))
            for name, module in model.named_modules()
        },
        frozenset(
            name
            for name, module in model.named_modules()
            if isinstance(module, Conv1D) or getattr(module, "is_transposed", False)
        ),
        _weight_name(model, model.get_output_embeddings()),
        _weight_name(model, _input_embeddings(model)),
        bool(getattr(model.config, "tie_word_embeddings", False)),
        rules,
    )


def _ties(bound: Mapping[str, str], made_of: Mapping[str, Any]) -> dict[str, str]:
    """By the name of a place that is not stored itself, the place of the same tensor that is."""
    groups: dict[str, list[str]] = {}
    for target, source in bound.items():
        groups.setdefault(source, [source]).append(target)
    found: dict[str, str] = {}
    for places in groups.values():
        present = next((name for name in places if name in made_of), None)
        if present is not None:
            found |= {name: present for name in places if name not in made_of}
    return found


def _input_embeddings(model: PreTrainedModel) -> torch.nn.Module | None:
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def _weight_name(model: PreTrainedModel, module: torch.nn.Module | None) -> str | None:
    """The name of a module's weight in the model."""
    if module is None:
        return None
    return next((f"{name}.weight" for name, found in model.named_modules() if found is module), None)
