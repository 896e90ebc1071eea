"""extract_lora(): a fully fine-tuned model as an adapter of its base.

Each change of a matrix is cut to its `rank` largest singular values, the best approximation of that rank there is
(Eckart and Young), and every tensor's share of the change that is kept is reported. What pairs do not hold (norms,
biases, embeddings) is refused by name, saved as a whole or left out, as the user says.

A first pass over both models finds what differs, and so the names and shapes of the adapter's tensors; a second one
decomposes matrix by matrix and writes each pair as it comes. Memory is bounded by the largest tensor.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from weightport.adapters.arithmetic import arithmetic_dtype
from weightport.adapters.base.base_model import Base, open_base
from weightport.adapters.base.base_record import record_base
from weightport.adapters.decomposition import Rank, factors, rank_that_keeps
from weightport.adapters.reading.lora_tensors import is_finite
from weightport.checkpoints import TensorRef
from weightport.checkpoints.lazy_tensors import chunks, same_bits
from weightport.converters.name_spaces import NameSpace, name_space
from weightport.converters.stored_pieces import Assembled
from weightport.errors import ConfigurationError, CoverageError, NonFiniteError, UsageError
from weightport.writing import require_directory, whole_directory
from weightport.writing.outgoing import Outgoing
from weightport.writing.safetensors_shards import aligned, write_safetensors

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "extraction.json"
_PREFIX = "base_model.model."
OTHERS = ("refuse", "save", "leave")
KEEP = 0.99
"""The share of the squared change that a rank found by itself keeps."""


@dataclass(frozen=True)
class Extraction:
    """A finished extraction. `kept` is the share of the squared change that the adapter holds, by tensor, `ranks` the
    rank that holds it; `whole` are tensors saved as they are, `left` those whose changes were left out."""

    directory: Path
    kept: Mapping[str, float]
    ranks: Mapping[str, int]
    whole: tuple[str, ...]
    left: tuple[str, ...]
    share: float


def extract_lora(
    tuned: str | Path,
    base: str | Path,
    out: str | Path,
    rank: int | None,
    *,
    keep: float | None = None,
    others: str = "refuse",
    overwrite: bool = False,
    announce: Callable[[int], None] = lambda total: None,
    advance: Callable[[int], None] = lambda count: None,
) -> Extraction:
    """Write the difference of the model directories `tuned` and `base` to the folder `out` as a LoRA adapter.

    Linear and convolutional weights get pairs of `rank` (less where the weight is smaller), or of the least rank that
    holds the share `keep` of the weight's squared change (rank None; KEEP by default). `others`: what happens where
    biases, norms and embeddings have changed: "refuse" it, "save" them as whole tensors (modules_to_save), or "leave"
    their changes out. Raises CoverageError when the two are not of one architecture or others have changed,
    UsageError when nothing differs, NonFiniteError, OutputError.
    """
    _require_settings(rank, keep, others)
    wanted = None if rank is not None else float(KEEP if keep is None else keep)
    tuned, base, out = Path(tuned), Path(base), Path(out)
    inputs = [tuned, base]
    require_directory(out, overwrite=overwrite, inputs=inputs)
    before, after = open_base(base), open_base(tuned)
    names = _require_same_model(before, after)
    space = _running_names(before)
    announce(2 * sum(before.checkpoint[name].nbytes for name in names))
    pairs, other = _differences(before, after, names, space, rank or wanted or KEEP, advance)
    if not pairs and not other:
        raise UsageError(f"{tuned} and {base} hold the same weights: there is nothing to extract.")
    if other and others == "refuse":
        _refuse_others(tuned, other)
    saved = other if others == "save" else []
    if not pairs and not saved:
        raise UsageError(f"No matrix of a layer has changed between {base} and {tuned}: an adapter would be empty.")
    ranks = {pair.module: pair.rank.kept for pair in pairs}
    # Counters too: peft loads a module that is saved as a whole with all its buffers.
    plain = [name for name in after.checkpoint.tensors if _is_plain(space, name)]
    running = {_running_name(space, name): after.checkpoint[name] for name in plain}
    whole, modules = _whole_tensors([_running_name(space, name) for name in saved], ranks, running)
    tied, places = _tied_tensors(saved, space, after)
    with whole_directory(out, overwrite=overwrite, inputs=inputs) as folder:
        changes = _write(folder / WEIGHTS, pairs, {**whole, **tied}, advance)
        total, lost = (sum(values) for values in zip(*changes.values())) if changes else (0.0, 0.0)
        kept = {name: 1 - left / change if change else 1.0 for name, (change, left) in changes.items()}
        share = 1 - lost / total if total else 1.0
        turned = any(module in space.turned for module in ranks)
        config = _config(
            base, rank or max(ranks.values(), default=1), ranks, [*modules, *places], fan_in_fan_out=turned
        )
        (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        by_tensor = {pair.new.name: pair.rank.kept for pair in pairs}
        left = [name for name in other if name not in saved]
        record = {"rank": rank, "keep": wanted, "share": share, "kept": kept, "ranks": by_tensor}
        record |= {"whole": saved, "left": left}
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        record_base(folder, base)
    return Extraction(out, kept, by_tensor, tuple(saved), tuple(left), share)


def _require_settings(rank: int | None, keep: float | None, others: str) -> None:
    if rank is not None and rank < 1:
        raise UsageError(f"The rank is {rank}; expected at least 1, or auto.")
    if keep is not None and rank is not None:
        raise UsageError(f"--keep chooses the rank by itself, but the rank is {rank}: pass --rank auto.")
    if keep is not None and not 0 < keep <= 1:
        raise UsageError(f"--keep is {keep:g}; expected a share of more than 0 and at most 1.")
    if others not in OTHERS:
        raise UsageError(f"{others!r} is none of {', '.join(OTHERS)}.")


def _refuse_others(tuned: Path, names: Sequence[str]) -> None:
    more = f"\n      … and {len(names) - 10} more" if names[10:] else ""
    raise CoverageError(
        f"In {tuned} tensors have changed that pairs do not hold:\n      " + "\n      ".join(names[:10]) + more + "\n"
        "  Pass --others save to save them as they are (modules_to_save), or --others leave to leave the changes out."
    )


def _running_names(base: Base) -> NameSpace:
    """The names of the running model, which an adapter's must be. Raises CoverageError."""
    try:
        return name_space(base.path, {name: ref.shape for name, ref in base.checkpoint.tensors.items()})
    except ConfigurationError as error:
        raise CoverageError(
            f"An adapter names the modules of the running model, and these are not known: {error}"
        ) from error


def _is_plain(space: NameSpace, stored: str) -> bool:
    """Whether a stored tensor is one of the model's, as it is."""
    found = space.held().get(stored, ())
    return len(found) == 1 and space.pieces(found[0]) == Assembled.whole(stored, space.shapes[found[0]]).pieces


def _running_name(space: NameSpace, stored: str) -> str:
    """What the running model calls a stored tensor. Raises CoverageError for one that it keeps in another form."""
    if not _is_plain(space, stored):
        found = space.held().get(stored)
        what = f"keeps it within {', '.join(found)}" if found else "does not load it as it is"
        raise CoverageError(
            f"{stored} changed, and the running model {what}: a pair has no place for it. Ship the tuned model itself."
        )
    return space.held()[stored][0]


@dataclass(frozen=True)
class _Changed:
    """A weight whose change becomes a pair: the tuned tensor, the base's, whether they are [in, out], and the name of
    its module in the running model."""

    new: TensorRef
    old: TensorRef
    rank: Rank
    flipped: bool
    module: str

    def change(self) -> torch.Tensor:
        """What was added, as the matrix [out, in] that a pair approximates: float32."""
        return _change(self.new, self.old, flipped=self.flipped)

    def outgoing(self, done: Callable[[float, float], None]) -> tuple[Outgoing, Outgoing]:
        """A [rank, in, …] and B [out, rank, …], to be written in this order: the change is decomposed when A is
        written, and B forgotten when it is. `done` gets the squared norm of the change, and of what the rank leaves
        out."""
        outputs, *inputs = self.new.shape[::-1] if self.flipped else self.new.shape
        key = f"{_PREFIX}{self.module}"
        second: list[torch.Tensor] = []

        def blocks_of_a() -> Iterator[torch.Tensor]:
            found = factors(self.change(), self.rank)
            second.append(found.b)
            done(found.total, found.lost)
            yield from chunks(found.a, torch.float32)

        def blocks_of_b() -> Iterator[torch.Tensor]:
            yield from chunks(second.pop(), torch.float32)

        return (
            Outgoing(f"{key}.lora_A.weight", (self.rank.kept, *inputs), torch.float32, blocks_of_a),
            Outgoing(
                f"{key}.lora_B.weight",
                (outputs, self.rank.kept, *(1 for _ in inputs[1:])),
                torch.float32,
                blocks_of_b,
            ),
        )


def _differences(
    base: Base,
    tuned: Base,
    names: Sequence[str],
    space: NameSpace,
    rank: int | float,
    advance: Callable[[int], None],
) -> tuple[list[_Changed], list[str]]:
    """(what becomes a pair, names of what else has changed), in the base's order. `rank`: a share to keep where it is
    no integer. Raises NonFiniteError."""
    pairs: list[_Changed] = []
    saved: list[str] = []
    for name in names:
        old, new = base.checkpoint[name], tuned.checkpoint[name]
        advance(old.nbytes)
        if same_bits(old.read(), new.read()):
            advance(old.nbytes)  # of the second pass, which has nothing to do here
            continue
        if not is_finite(new.read()) or not is_finite(old.read()):
            raise NonFiniteError(f"{name} holds NaN or infinity in {tuned.path} or {base.path}.")
        running = _running_name(space, name)
        if _is_factorable(running, new, space):
            module = running.removesuffix(".weight")
            turned = module in space.turned
            if isinstance(rank, int):
                rank_of = Rank.fixed(rank, new.shape[0], math.prod(new.shape[1:]))
            else:
                rank_of = rank_that_keeps(_change(new, old, flipped=turned), rank)
            pairs.append(_Changed(new, old, rank_of, turned, module))
        else:
            saved.append(name)
            advance(old.nbytes)
    return pairs, saved


def _write(
    path: Path, pairs: Sequence[_Changed], whole: Mapping[str, TensorRef], advance: Callable[[int], None]
) -> dict[str, tuple[float, float]]:
    """Write the adapter's file; by weight, the squared norm of its change, and of what its pair leaves out."""
    found: dict[str, tuple[float, float]] = {}

    def done(pair: _Changed, total: float, left: float) -> None:
        found[pair.new.name] = (total, left)
        advance(pair.old.nbytes)

    tensors = [
        *(each for pair in pairs for each in pair.outgoing(partial(done, pair))),
        *(Outgoing.of(key, ref) for key, ref in whole.items()),
    ]
    write_safetensors(aligned(tensors), path)
    return found


def _require_same_model(base: Base, tuned: Base) -> list[str]:
    """The tensors of both, floating-point ones. Raises CoverageError listing what only one has, or has otherwise."""
    old, new = base.checkpoint.tensors, tuned.checkpoint.tensors
    different = [
        *(f"{name}: only in {base.path}" for name in old if name not in new),
        *(f"{name}: only in {tuned.path}" for name in new if name not in old),
        *(
            f"{name}: {list(old[name].shape)} and {list(new[name].shape)}"
            for name in old
            if name in new and old[name].shape != new[name].shape
        ),
    ]
    if different:
        shown = "\n      ".join(different[:10]) + (
            f"\n      … and {len(different) - 10} more" if different[10:] else ""
        )
        raise CoverageError(f"{tuned.path} is no fine-tuning of {base.path}:\n      {shown}")
    return [name for name, ref in old.items() if ref.dtype.is_floating_point]


def _is_factorable(name: str, ref: TensorRef, space: NameSpace) -> bool:
    """Whether a change of this tensor becomes a pair: a linear or plain convolutional layer's weight, not one that the
    model looks rows up in."""
    if not name.endswith(".weight") or len(ref.shape) not in (2, 4) or min(ref.shape[:2]) < 2:
        return False
    module = name.removesuffix(".weight")
    if re.fullmatch(r"(.*[._])?(\w*embed\w*|shared|wte|wpe|relative_attention_bias)", module):
        return False
    return not (name == space.head and name in (*space.bound, *space.bound.values()))


def _change(new: TensorRef, old: TensorRef, *, flipped: bool) -> torch.Tensor:
    """The change of a weight as the matrix [out, in]: float32, of the difference in float64 where that is wider."""
    wide = arithmetic_dtype(new.dtype, old.dtype)
    change = (new.read().to(wide) - old.read().to(wide)).to(torch.float32)
    return change.T if flipped else change.flatten(1)


def _whole_tensors(
    changed: Sequence[str], ranks: Mapping[str, int], tuned: Mapping[str, TensorRef]
) -> tuple[dict[str, TensorRef], list[str]]:
    """(tensors that are saved as they are by peft's keys, the modules that are saved as a whole).

    peft loads such a module with all its tensors, so unchanged ones come along. A bias beside a pair is saved alone.
    """
    modules = {name.rpartition(".")[0] for name in changed}
    names = tuple(tuned)
    found: dict[str, TensorRef] = {}
    for module in sorted(modules):
        if any(name.startswith(f"{module}.") and name.rpartition(".")[0] != module for name in names):
            raise CoverageError(
                f"{', '.join(name for name in changed if name.rpartition('.')[0] == module)} changed, and is a "
                "parameter of a module that holds other modules: an adapter has no place for it. "
                "Ship the tuned model itself."
            )
        for name in names:
            if name.rpartition(".")[0] == module and name not in changed and module not in ranks:
                found[_PREFIX + name] = tuned[name]
    for name in changed:
        module, _, leaf = name.rpartition(".")
        key = f"{module}.base_layer.{leaf}" if module in ranks else name
        found[_PREFIX + key] = tuned[name]
    return found, sorted(modules)


def _tied_tensors(changed: Sequence[str], space: NameSpace, tuned: Base) -> tuple[dict[str, TensorRef], list[str]]:
    """A changed token embedding under every further name that it has in the running model, where peft wraps each
    place: (tensors by peft's keys, modules)."""
    places = {
        name: pieces[0].stored
        for name in space.tied
        if name.endswith(".weight") and len(pieces := space.pieces(name)) == 1 and pieces[0].stored in changed
    }
    tensors = {_PREFIX + name: tuned.checkpoint[stored] for name, stored in places.items()}
    return tensors, [name.removesuffix(".weight") for name in places]


def _config(
    path: Path, rank: int, ranks: Mapping[str, int], saved: list[str], *, fan_in_fan_out: bool
) -> dict[str, Any]:
    lowered = {re.escape(name): value for name, value in ranks.items() if value != rank}
    with_pair = [module for module in saved if module in ranks]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": str(path),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": fan_in_fan_out,
        # Biases of layers that also have a pair are trained beside it; everything else is a module of its own.
        "bias": "lora_only" if with_pair else "none",
        "target_modules": sorted(ranks),
        "rank_pattern": lowered,
        "alpha_pattern": dict(lowered),
        "modules_to_save": [module for module in saved if module not in ranks] or None,
        "inference_mode": True,
    }


def largest_loss(extraction: Extraction) -> tuple[str, float] | None:
    """The tensor of which the rank keeps least, and the share that it keeps."""
    found = min(extraction.kept.items(), key=lambda item: item[1], default=None)
    return found if found is not None and math.isfinite(found[1]) else None
