"""Where the tensors that an adapter names stand in the base's files.

An adapter speaks of the running model; the files may say otherwise (`language_model.model.layers.0…` for
`model.language_model.layers.0…`), and two eras of transformers have had two names for one module. A name is found as
the model's of today, as a stored one, or as an earlier one, always through transformers' own loading rules: a name
that they do not lead anywhere belongs to another model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from weightport.adapters.base.base_identity import states_base
from weightport.adapters.base.base_model import Base
from weightport.adapters.merging.low_rank_delta import CONV1D_MODELS
from weightport.adapters.merging.ties import is_head_module, token_embedding
from weightport.adapters.reading.lora_tensors import LoraAdapter, ModuleAdapter
from weightport.checkpoints import TensorRef
from weightport.converters.name_spaces import NameSpace, name_space
from weightport.converters.stored_pieces import Assembled, Piece
from weightport.errors import ConfigurationError


@dataclass(frozen=True)
class Place:
    """A tensor of the running model: its name there, its shape, and the stored blocks that make it.

    turned: whether its module keeps matrices as [in, out]; None where that is not known.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    turned: bool | None = None

    @property
    def plain(self) -> str | None:
        """The stored tensor that it is as a whole; None where it is made of blocks, or turned round."""
        if len(self.pieces) != 1:
            return None
        piece = self.pieces[0]
        return piece.stored if Assembled.whole(piece.stored, self.shape).pieces == self.pieces else None


class ModuleNames:
    """The names of a base: those in its files and, where `space` is known, those of the running model."""

    def __init__(self, tensors: Mapping[str, TensorRef], space: NameSpace | None = None) -> None:
        self._tensors = tensors
        self.space = space

    def find(self, name: str) -> Place | None:
        """The tensor that an adapter calls `name`; None when the base has none, or only as another's second place."""
        current = self.current(name)
        if current is None:
            # Of a converter's sources (one expert's matrix, say) an earlier model may have had a module each.
            return self._stored(name)
        if self.space is None or current in self.space.tied:
            return None
        pieces = self.space.pieces(current)
        turned = current.rpartition(".")[0] in self.space.turned
        return Place(current, self.space.shapes[current], pieces, turned) if pieces else None

    def current(self, name: str) -> str | None:
        """What today's running model calls the tensor; None where it has none, or nothing is known of it."""
        return self.space.current(name) if self.space is not None else None

    def permuted(self, name: str) -> str | None:
        """By which operations the tensor's values are rearranged while they are loaded; None where they are not."""
        current = self.current(name)
        return self.space.permuted.get(current) if self.space is not None and current is not None else None

    def bound(self, name: str) -> str | None:
        """The stored tensor of which `name` is a further place in the model; None where it is none."""
        current = self.current(name)
        if self.space is None or current is None or current not in self.space.tied:
            return None
        return self.space.pieces(current)[0].stored

    def parameters(self, module: str, names: Iterable[str]) -> tuple[str, ...]:
        """Which own parameters of `module` the entries `names` of target_parameters mean, in the model's order."""
        wanted = tuple(names)
        leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in wanted))
        owner = next((c.rpartition(".")[0] for leaf in leaves if (c := self.current(f"{module}.{leaf}"))), module)
        own = self.space.parameters.get(owner, ()) if self.space is not None else leaves
        return tuple(leaf for leaf in own if any(f".{module}.{leaf}".endswith(f".{name}") for name in wanted))

    def vocabulary(self) -> tuple[str | None, tuple[str, ...]]:
        """(the stored token embedding, the stored heads of their own)."""
        if self.space is None:
            heads = [n for n in self._tensors if n.endswith(".weight") and is_head_module(n.removesuffix(".weight"))]
            return token_embedding(self._tensors), tuple(heads)
        found = [self.space.pieces(name) if name in self.space.shapes else () for name in self._ends()]
        embedding, head = (pieces[0].stored if len(pieces) == 1 else None for pieces in found)
        own = head is not None and head != embedding
        return (embedding if head is not None else token_embedding(self._tensors)), ((head,) if own and head else ())

    def _ends(self) -> tuple[str, str]:
        space = self.space
        return (space.embedding or "", space.head or "") if space is not None else ("", "")

    def near(self, name: str) -> Sequence[str]:
        """A few names like `name`, for an error message."""
        known = self.space.shapes if self.space is not None else self._tensors
        return get_close_matches(name[:200], known, n=2, cutoff=0.6)

    def _stored(self, name: str) -> Place | None:
        ref = self._tensors.get(name)
        return None if ref is None else Place(name, ref.shape, Assembled.whole(name, ref.shape).pieces)


def names_of_base(base: Base, adapters: Sequence[LoraAdapter], *, untie: bool = False) -> ModuleNames:
    """The names of `base`, of the running model too where the adapters need these: where they say something that the
    files do not, touch what may be tied, or say nothing of their base. Knowing them takes transformers, and some
    seconds to import it."""
    tensors = base.checkpoint.tensors
    embedding = token_embedding(tensors)
    # A square matrix beside this setting may be of a layer that the setting is about, or of one that it is not.
    unclear = any(a.settings.fan_in_fan_out for a in adapters) and base.model_type not in CONV1D_MODELS
    unknown = not all(states_base(adapter) for adapter in adapters)
    if not (untie or unclear or unknown) and all(
        _as_stored(name, tensors, embedding) for a in adapters for name in _said(a)
    ):
        return ModuleNames(tensors)
    return ModuleNames(tensors, running_names(base))


def running_names(base: Base) -> NameSpace | None:
    """The names of the base's running model; None where transformers has no such architecture."""
    try:
        return name_space(base.path, {name: ref.shape for name, ref in base.checkpoint.tensors.items()})
    except ConfigurationError:
        return None


def _as_stored(name: str, tensors: Mapping[str, TensorRef], embedding: str | None) -> bool:
    return name in tensors and name != embedding and not is_head_module(name.rpartition(".")[0])


def _said(adapter: LoraAdapter) -> Iterable[str]:
    """The tensors that an adapter speaks of; of parameters (target_parameters) names that no file has."""
    yield from (f"{delta.module}.weight" for delta in adapter.deltas)
    for module in adapter.modules:
        yield f"{module.module}.weight" if not adapter.settings.target_parameters else ""
        if module.bias is not None:
            yield f"{module.module}.bias"
    yield from adapter.whole
    yield from (f"{name}.weight" for name in adapter.tokens)


def earlier_names(names: ModuleNames, adapter: LoraAdapter) -> list[str]:
    """The adapter's modules that the base has, but the running model of today has not under these names."""
    if names.space is None:
        return []
    today = names.space.shapes
    leaves = ("weight", "in_proj_weight")
    return [
        module
        for module in adapter.targets
        if any(names.find(f"{module}.{leaf}") is not None for leaf in leaves)
        and not any(f"{module}.{leaf}" in today for leaf in leaves)
    ]


def weight_of(names: ModuleNames, module: ModuleAdapter) -> Place | None:
    """The weight that a module's pair is added to (of MultiheadAttention: in_proj_weight)."""
    return names.find(f"{module.module}.weight") or names.find(f"{module.module}.in_proj_weight")
