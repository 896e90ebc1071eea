"""What adapters say about each tensor of a base, and which of it is one change in two tied places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from weightport.adapters.base.base_model import Base
from weightport.adapters.merging.module_names import ModuleNames, Place, weight_of
from weightport.adapters.merging.ties import TiedHead
from weightport.adapters.reading.additive_tensors import ModuleDelta
from weightport.adapters.reading.lora_tensors import LoraAdapter, ModuleAdapter
from weightport.checkpoints import TensorRef
from weightport.checkpoints.lazy_tensors import same_bits
from weightport.converters.stored_pieces import Assembled, Piece
from weightport.errors import AdapterError

SHOWN = 10


@dataclass(frozen=True)
class Part:
    """What of a stored tensor a change is about: the block `piece` of the model's tensor at `place`."""

    place: Place
    piece: Piece

    @property
    def plain(self) -> bool:
        """Whether the stored tensor is the model's, as it is."""
        return self.place.plain is not None


@dataclass(frozen=True)
class PairChange:
    """A pair of the adapter at position `adapter` of the command. `key`: what rank_pattern and alpha_pattern are
    matched against, the module's name or, for a parameter, the parameter's. `times`: how often peft adds it."""

    adapter: int
    module: ModuleAdapter
    part: Part
    key: str
    times: int = 1


@dataclass(frozen=True)
class DeltaChange:
    """What an adapter of a method other than LoRA, at position `adapter` of the command, has for a module."""

    adapter: int
    delta: ModuleDelta
    part: Part


@dataclass
class Touched:
    """What the adapters say about one stored tensor. Adapters are given by their place in the command."""

    pairs: list[PairChange] = field(default_factory=list)
    parameters: list[PairChange] = field(default_factory=list)
    biases: list[PairChange] = field(default_factory=list)
    whole: list[tuple[int, TensorRef, Part]] = field(default_factory=list)
    tokens: list[tuple[int, TensorRef, Sequence[int]]] = field(default_factory=list)
    deltas: list[DeltaChange] = field(default_factory=list)

    @property
    def sources(self) -> tuple[str, ...]:
        modules = [change.key for change in (*self.pairs, *self.parameters)]
        modules += [change.delta.module for change in self.deltas]
        rest = [change.module.bias.name for change in self.biases if change.module.bias is not None]
        return tuple(
            dict.fromkeys(
                [*modules, *rest, *(ref.name for _, ref, _ in self.whole), *(t.name for _, t, _ in self.tokens)]
            )
        )


def unresolved(names: ModuleNames, tied: TiedHead | None, adapter: LoraAdapter) -> list[str]:
    """The adapter's modules that the base has under no name, by the adapter's names."""
    return (
        [
            module.module
            for module in adapter.modules
            if weight_of(names, module) is None
            and _tied_place(names, tied, f"{module.module}.weight") is None
            and not names.parameters(module.module, adapter.settings.target_parameters)
        ]
        + [
            delta.module
            for delta in adapter.deltas
            if names.find(f"{delta.module}.weight") is None
            and _tied_place(names, tied, f"{delta.module}.weight") is None
        ]
        + [
            name.rpartition(".")[0]
            for name in adapter.whole
            if names.find(name) is None and _tied_place(names, tied, name) is None
        ]
    )


def gather(
    base: Base, names: ModuleNames, adapters: Sequence[LoraAdapter], tied: TiedHead | None
) -> dict[str, Touched]:
    """What touches each tensor of the base. Raises AdapterError listing everything that touches none."""
    found = _Gathering(base, names, tied)
    for position, adapter in enumerate(adapters):
        for module in adapter.modules:
            found.pair(position, adapter, module)
        for delta in adapter.deltas:
            found.delta(position, delta)
        found.require_both_projections(adapter)
        for key, ref in adapter.whole.items():
            found.whole(position, key, ref)
        for key, ref in adapter.token_bases.items():
            found.token_base(position, key, ref)
        for key, ref in adapter.tokens.items():
            found.tokens(position, adapter, key, ref)
    found.require_no_bias_beside_rows()
    if found.lost:
        has = f", a {names.space.architecture}" if names.space is not None else ""
        raise AdapterError(
            listed(
                f"{names_of(adapters)} belongs to another base than {base.path}{has}, which does not have:", found.lost
            )
        )
    return found.touched


class _Gathering:
    """What adapters say, sorted by stored tensor; `lost` says what has no place."""

    def __init__(self, base: Base, names: ModuleNames, tied: TiedHead | None) -> None:
        self.base, self.names, self.tied = base, names, tied
        self.touched: dict[str, Touched] = {}
        self.lost: list[str] = []

    def pair(self, position: int, adapter: LoraAdapter, module: ModuleAdapter) -> None:
        parameters = self.names.parameters(module.module, adapter.settings.target_parameters)
        if parameters:
            self._parameter(position, module, parameters)
        else:
            self._weight(position, module)
        if module.bias is not None:
            place = self.names.find(f"{module.module}.bias")
            if place is None:
                self.lost.append(f"{module.bias.name}: the base's layer has no bias to add it to (lora_bias)")
                return
            for piece in place.pieces:
                change = PairChange(position, module, Part(place, piece), module.module)
                self._at(piece.stored).biases.append(change)

    def _weight(self, position: int, module: ModuleAdapter) -> None:
        name = f"{module.module}.weight"
        place = weight_of(self.names, module) or self._tied(name)
        if place is None:
            self.lost.append(self._reason(name))
            return
        for piece in place.pieces:
            pairs = self._at(piece.stored).pairs
            if any(other.adapter == position and other.part.piece == piece for other in pairs):
                self.lost.append(f"{module.module}: two modules of the adapter are {piece.stored} in the base")
            # peft's layer for MultiheadAttention adds the pair of out_proj itself and lets that layer add it again.
            times = 2 if module.owner and self.names.find(f"{module.owner}.in_proj_weight") else 1
            pairs.append(PairChange(position, module, Part(place, piece), module.key, times))

    def require_both_projections(self, adapter: LoraAdapter) -> None:
        """Of MultiheadAttention peft trains in_proj_weight and out_proj together."""
        owners = {module.owner for module in adapter.modules}
        for module in adapter.modules:
            inside = self.names.find(f"{module.module}.in_proj_weight") is not None
            if inside and self.names.find(f"{module.module}.weight") is None and module.module not in owners:
                self.lost.append(f"{module.module}: the adapter is incomplete, it has no pair for its out_proj")

    def delta(self, position: int, delta: ModuleDelta) -> None:
        """What a method other than LoRA adds to a module's weight."""
        place = self.names.find(f"{delta.module}.weight") or self._tied(f"{delta.module}.weight")
        if place is None:
            self.lost.append(self._reason(f"{delta.module}.weight"))
            return
        for piece in place.pieces:
            self._at(piece.stored).deltas.append(DeltaChange(position, delta, Part(place, piece)))

    def _parameter(self, position: int, module: ModuleAdapter, parameters: Sequence[str]) -> None:
        # peft wraps a module once for each parameter, the first one innermost.
        index = len(parameters) - 1 - module.depth
        if index < 0:
            self.lost.append(f"{module.module}: {module.depth + 1} parameters are targeted, it has {len(parameters)}")
            return
        key = f"{module.module}.{parameters[index]}"
        place = self.names.find(key) or self._tied(key)
        if place is None:
            self.lost.append(self._reason(key))
            return
        for piece in place.pieces:
            self._at(piece.stored).parameters.append(PairChange(position, module, Part(place, piece), key))

    def whole(self, position: int, key: str, ref: TensorRef) -> None:
        """A tensor that takes the base's place."""
        place = self.names.find(key) or self._tied(key) or self._beside_a_tie(key)
        if place is None:
            self.lost.append(self._reason(key))
            return
        for piece in place.pieces:
            self._at(piece.stored).whole.append((position, ref, Part(place, piece)))

    def _beside_a_tie(self, key: str) -> Place | None:
        """Of a tie that is not of the embedding (BERT's output bias), the stored tensor."""
        bound = self.names.bound(key)
        if bound is None or (self.tied is not None and bound == self.tied.embedding):
            return None
        shape = self.base.checkpoint[bound].shape
        return Place(bound, shape, Assembled.whole(bound, shape).pieces)

    def tokens(self, position: int, adapter: LoraAdapter, key: str, ref: TensorRef) -> None:
        name = f"{key}.weight"
        place = self.names.find(name)
        if place is None and any(self.names.bound(name) == held for held in map(self._stored_tokens, adapter.tokens)):
            # Rows of tied places are trained together, and may be saved once more under another place's name.
            return
        place = place or self._tied(name)
        stored = place.plain if place is not None else None
        if stored is None:
            self.lost.append(self._reason(name))
            return
        rows = adapter.settings.trained_tokens(key)
        if rows is None or len(rows) != ref.shape[0]:
            self.lost.append(f"{key}: {ref.shape[0]} trained rows do not fit trainable_token_indices ({rows})")
            return
        for other, _, others in self._at(stored).tokens:
            if shared := sorted(set(rows) & set(others)):
                self.lost.append(
                    f"{key}: row {shared[0]} is trained by adapter {other + 1} of the command and by {position + 1}; "
                    "rows that take the place of the base's have no sum"
                )
        self._at(stored).tokens.append((position, ref, rows))

    def require_no_bias_beside_rows(self) -> None:
        """peft runs a tied head with the rows that were trained in the embedding, and without the head's bias."""
        tied = self.tied
        rows = self.touched.get(tied.embedding, Touched()).tokens if tied is not None else []
        if tied is None or not rows or not tied.rows_together:
            return
        name = f"{tied.running.removesuffix('.weight')}.bias"
        place = self.names.find(name)
        stored = place.plain if place is not None else self.names.bound(name)
        if stored is not None and self.base.checkpoint[stored].read().any():
            raise AdapterError(
                f"The adapter trained single rows of {tied.embedding}, which is the head too, and peft runs that head "
                f"without its bias ({stored}): the merged model, which has it, would not be the one that was trained."
            )

    def token_base(self, position: int, key: str, ref: TensorRef) -> None:
        """What trained rows are rows of: the base's own, unless the vocabulary was resized."""
        place = self.names.find(key) or self._tied(key) or self._beside_a_tie(key)
        if place is None or place.shape != ref.shape:
            self.whole(position, key, ref)

    def _stored_tokens(self, key: str) -> str | None:
        place = self.names.find(f"{key}.weight")
        return place.plain if place is not None else None

    def _tied(self, name: str) -> Place | None:
        return _tied_place(self.names, self.tied, name)

    def _at(self, stored: str) -> Touched:
        return self.touched.setdefault(stored, Touched())

    def _reason(self, name: str) -> str:
        permuted = self.names.permuted(name)
        if permuted is not None:
            return f"{name}: its values are rearranged while they are loaded ({permuted}), which no merge follows"
        bound = self.names.bound(name)
        if bound is not None:
            return f"{name} apart from {bound}, with which the model ties it"
        if self.names.current(name) is not None:
            return f"{name}: the model has it, but the files of {self.base.path} do not hold it"
        near = self.names.near(name)
        return name.removesuffix(".weight") + (f" (it has {' and '.join(near)})" if near else "")


def _tied_place(names: ModuleNames, tied: TiedHead | None, name: str) -> Place | None:
    """The head of a tied model, or another of its tied places, under the name that it has when it is written apart."""
    current = names.current(name)
    if tied is None or names.space is None or current is None:
        return None
    if current == tied.running:
        stored = tied.head
    elif tied.aliases.get(stored := names.space.stored_name(current)) != tied.embedding:
        return None
    shape = names.space.shapes[current]
    return Place(current, shape, Assembled.whole(stored, shape).pieces)


def require_all_layers(base: Base, names: ModuleNames, adapter: LoraAdapter) -> None:
    """An adapter has every module that its settings choose in the base: one that has not is incomplete, or was trained
    on another model, with fewer layers or without this one's towers."""
    present = set(adapter.targets)
    for known in (names.space.shapes if names.space is not None else (), base.checkpoint.tensors):
        modules = [name.removesuffix(".weight") for name in known if name.endswith(".weight")]
        if present <= set(modules):
            break
    else:
        return
    tied = names.space.tied if names.space is not None else {}
    adapter.settings.require_bounded(modules, adapter.settings.where)
    missing = [
        module
        for module in modules
        if module not in present and f"{module}.weight" not in tied and adapter.settings.targets(module)
    ]
    if missing:
        raise AdapterError(
            listed(
                f"{adapter.path} is incomplete, or belongs to another base than {base.path}: its settings choose "
                "modules of this base that it has no tensors for:",
                missing,
            )
        )


def settle_ties(
    tied: TiedHead | None,
    touched: dict[str, Touched],
    tensors: Mapping[str, TensorRef],
    adapters: Sequence[LoraAdapter],
    untie: bool,
) -> TiedHead | None:
    """The head to write apart, or None. Changes that are one for both places are kept once."""
    if tied is None:
        return None
    for name in tied.aliases:
        if name in touched and tied.embedding in touched and _one_tensor(touched[name], touched[tied.embedding]):
            del touched[name]
    head, embedding = touched.get(tied.head), touched.get(tied.embedding)
    others = [name for name in tied.aliases if name in touched]
    # peft trains single rows of tied places together where the configuration says at its top that they are tied.
    rows = embedding.tokens if embedding is not None else []
    apart = embedding is not None and (
        embedding.pairs
        or embedding.deltas
        or embedding.parameters
        or embedding.whole
        or (rows and not tied.rows_together)
    )
    if not others and head is None and not apart:
        return None
    if not others and head is not None and embedding is not None and _one_change(head, embedding, tied):
        del touched[tied.head]
        return None
    if not others and head is None and embedding is not None and (tied.rows_together or not rows):
        positions = {change.adapter for change in (*embedding.pairs, *embedding.parameters)}
        positions |= {change.adapter for change in embedding.deltas}
        positions |= {position for position, _, _ in embedding.whole}
        grown = any(ref.shape != tensors[tied.embedding].shape for _, ref, _ in embedding.whole)
        if grown or all(adapters[place].settings.ensure_weight_tying for place in positions):
            return None
    if not untie:
        places = {"head": head, "token embedding": embedding} | {name: touched[name] for name in others}
        where = " and the ".join(place for place, change in places.items() if change is not None)
        raise AdapterError(
            f"The adapter changes the {where} of a base that keeps both in one matrix ({tied.embedding}); merged into "
            "it, the change would act in both places, which is not the model that was trained.\n"
            f"  Pass --untie to write the head as a matrix of its own ({tied.head}, "
            f"{tensors[tied.embedding].nbytes:,} bytes more)."
        )
    if rows and tied.rows_together:
        touched.setdefault(tied.head, Touched()).tokens.extend(rows)
    touched.setdefault(tied.head, Touched())
    if embedding is not None and any(ref.shape != tensors[tied.embedding].shape for _, ref, _ in embedding.whole):
        _resize_apart(tied, touched, embedding, adapters)
    return tied


def _resize_apart(
    tied: TiedHead, touched: dict[str, Touched], embedding: Touched, adapters: Sequence[LoraAdapter]
) -> None:
    """Places written apart have the new rows too. Raises AdapterError where the adapter does not say which."""
    for position, ref, _ in embedding.whole:
        saved = adapters[position].settings.data.get("modules_to_save") or ()
        module = ref.name.removeprefix("base_model.model.").removesuffix(".weight")
        alone = [name for name, source in tied.aliases.items() if source == tied.embedding and name not in touched]
        if alone and any(f".{module}".endswith(f".{name}") for name in saved):
            raise AdapterError(
                f"{adapters[position].path} trained a resized {module} as a whole (modules_to_save), which the model "
                f"also uses as {', '.join(alone)}: their new rows are in no file. Merge the adapter with peft."
            )
    for name in (tied.head, *tied.aliases):
        if name in touched and not touched[name].whole:
            touched[name].whole.extend(embedding.whole)


def _one_tensor(place: Touched, embedding: Touched) -> bool:
    """Whether both are replaced by the same values and nothing else happens to the first."""
    whole = [ref for _, ref, _ in (*place.whole, *embedding.whole)]
    only = not (place.pairs or place.deltas or place.parameters or place.tokens) and place.whole and embedding.whole
    return bool(only) and all(same_bits(whole[0].read(), ref.read()) for ref in whole[1:])


def _one_change(head: Touched, embedding: Touched, tied: TiedHead) -> bool:
    """Whether the head is changed exactly as the embedding is."""
    if embedding.tokens and not tied.rows_together:
        return False
    if (
        bool(head.whole) != bool(embedding.whole)
        or len(head.pairs) != len(embedding.pairs)
        or head.parameters
        or head.deltas
        or embedding.deltas
    ):
        return False
    whole = [ref for _, ref, _ in (*head.whole, *embedding.whole)]
    same_whole = all(same_bits(whole[0].read(), ref.read()) for ref in whole[1:])
    return same_whole and all(
        torch.equal(a.module.a.read(), b.module.b.read().T) and torch.equal(a.module.b.read(), b.module.a.read().T)
        for a, b in zip(head.pairs, embedding.pairs)
        if b.module.embedding and not a.module.embedding
    )


def names_of(adapters: Sequence[LoraAdapter]) -> str:
    return ", ".join(str(adapter.path) for adapter in adapters)


def listed(title: str, items: Sequence[str]) -> str:
    rest = f"\n      … and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"{title}\n      " + "\n      ".join(items[:SHOWN]) + rest
