"""The second proof of a merge: base + adapter run in peft against the merged directory, every weight against peft's.

This is the one part of merging that builds models, so it is run where they fit in memory.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightport.adapters.merging.combination import SUM
from weightport.adapters.merging.merge import Written, quantized_layers
from weightport.adapters.merging.module_names import ModuleNames
from weightport.adapters.merging.quantized import is_quantized_layer, nf4_round_trip
from weightport.adapters.reading.lora_tensors import LoraAdapter
from weightport.adapters.verification.peft_loading import load_adapter
from weightport.adapters.verification.sample_inputs import sample_inputs
from weightport.checkpoints import open_checkpoint
from weightport.converters.name_spaces import NameSpace, name_space
from weightport.devices import settle_arithmetic
from weightport.errors import AdapterError, ConfigurationError, ParityError
from weightport.extras import install_command

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODELS_AT_ONCE = 2.5
"""Models in float32 that stand in memory during the check, with what running them takes."""

_ROUNDING_NOISE, _ARITHMETIC_NOISE = 4.0, 48.0
"""What may move an output, relative to its scale and growing with the root of the depth: units of the stored dtype's
eps for the rounding of the weights (0.2 to 0.7 were measured on small random models), and of float32's for the
arithmetic, which adds the same terms in another order in the two models (parity/noise.py has the measurements)."""


class UnverifiableError(ParityError):
    """The check cannot run the models: nothing is known of the merge, good or bad."""


@dataclass(frozen=True)
class SeamDifference:
    """The largest difference of one output, and the root mean square of what base + adapter gave."""

    seam: str
    difference: float
    scale: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.allowed


@dataclass(frozen=True)
class Verification:
    """How far the merged model lies from base + adapter. Of `changed` stored tensors `weights` were compared with
    peft's own merge; of their elements, the furthest lies `weight_steps` roundings of the stored dtype away.
    `unchecked`: what was not compared, or did not run on the inputs, with the reason."""

    seams: tuple[SeamDifference, ...]
    changed: int
    weights: int
    weight_steps: float
    inputs: tuple[str, ...]
    unchecked: Mapping[str, str]

    def record(self) -> dict[str, Any]:
        """As plain data, for merge.json."""
        return {
            "inputs": list(self.inputs),
            "seams": [asdict(seam) for seam in self.seams],
            "changed": self.changed,
            "unchecked": dict(self.unchecked),
            "weights": self.weights,
            "weight_steps": self.weight_steps,
        }


def why_not_verified(written: Written, available: int | None = None) -> str | None:
    """Why the check cannot run here; None when it can. `available`: bytes of free memory."""
    absent = [name for name in ("transformers", "peft") if find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed ({install_command('adapters')})"
    others = [adapter.settings.method for adapter in written.adapters if adapter.deltas]
    if others and (len(written.adapters) > 1 or written.weights[0] != 1):
        return f"peft has neither weights nor sums for {others[0]} adapters"
    rank, sides = written.options.combination.svd_rank, [min(o.shape[:2]) for o in written.plan.outputs if o.edit]
    if len(written.adapters) > 1 and rank is not None and sides and rank > min(sides):
        return f"peft runs no --svd-rank {rank} on weights that have the rank {min(sides)}"
    needed = int(sum(math.prod(out.shape) for out in written.plan.outputs) * 4 * MODELS_AT_ONCE)
    available = available_memory() if available is None else available
    if needed > available:
        return f"it would take {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are free"
    return None


def available_memory() -> int:
    """Bytes of memory that a new process can use without swapping: the system's, or less under a control group."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    system = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 1 << 62)
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    texts = [path.read_text().strip() for path in limits if path.is_file()]
    return min([system, *(int(text) for text in texts if text.isdigit())])


def verify_merge(written: Written, prompt: str | None = None) -> Verification:
    """Run base + adapters in peft and the merged directory, both in float32, on the same inputs, made of the family's
    `prompt` where it has one. Raises
    UnverifiableError where the model takes none of the inputs that can be made for it, AdapterError where peft does
    not take the adapter, ParityError for a difference; what cannot be compared is in `unchecked`, never a verdict."""
    changed = {out.name: out.dtype for out in written.plan.outputs if out.edit is not None}
    apart = _tied_in_training(written)
    with _quiet(), ExitStack() as stack:
        names = ModuleNames({}, _space_of(written))
        held = names.space.held() if names.space is not None else {}
        try:
            loaded = _tuned(written, names, stack)
        except (AdapterError, ParityError):
            raise
        except Exception as error:
            # Adapters that peft loads alone and does not run together.
            raise UnverifiableError(f"peft does not run these adapters together ({_first_line(error)})") from error
        if loaded.missing:
            reason = f"peft did not load {len(loaded.missing)} keys of the adapter, {loaded.missing[0]} among them"
            return Verification((), len(changed), 0, 0.0, (), dict.fromkeys(changed, reason))
        tuned = loaded.model
        try:
            arguments = sample_inputs(tuned.get_base_model(), written.base, prompt)
            expected = _outputs(tuned, arguments)
        except Exception as error:
            # Code of any architecture, called with inputs that were made without knowing it.
            raise UnverifiableError(
                f"{type(tuned.get_base_model()).__name__} does not run on sample inputs ({_first_line(error)})"
            ) from error
        weights = dict(tuned.merge_and_unload().state_dict())
        del tuned, loaded
        model = load_model(written.folder)
        ran = _running_modules(model)
        found = _outputs(model, arguments)
    comparable = {name: dtype for name, dtype in changed.items() if name not in apart}
    steps, unchecked = _compare_weights(weights, model.state_dict(), comparable, held)
    unchecked |= dict.fromkeys(apart, "peft merges it into both of two tied places (its outputs were compared)")
    compared = len(changed) - len(unchecked)
    for name in changed:
        idle = [of for of in held.get(name, ()) if not _has_run(of, model, ran)]
        if idle and name not in unchecked:
            unchecked[name] = f"{idle[0]} does not run on these inputs (its values are peft's)"
    result = Verification(
        tuple(_compare(expected, found, written, _depth(model.config))),
        len(changed),
        compared,
        steps,
        tuple(arguments),
        unchecked,
    )
    _require(result, expected, found)
    return result


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]


def _tied_in_training(written: Written) -> list[str]:
    """The tensors that are written apart, and that base and adapter hold as one in peft: rows that are trained in all
    tied places at once, and a pair on the head beside them. peft runs them rightly, and merges them wrongly."""
    untied = written.plan.untied
    if untied is None or not untied.rows_together or not any(t.tokens for t in written.plan.touched.values()):
        return []
    return [name for name in (untied.embedding, untied.head) if name in written.plan.touched]


def _space_of(written: Written) -> NameSpace | None:
    """The names of the merged model."""
    try:
        return name_space(written.folder, {out.name: out.shape for out in written.plan.outputs})
    except ConfigurationError:
        return None


def _running_modules(model: torch.nn.Module) -> set[str]:
    """Names of the modules that have run so far: filled as a forward pass goes."""
    ran: set[str] = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, inputs, output, name=name: ran.add(name))
    return ran


def _has_run(name: str, model: torch.nn.Module, ran: set[str]) -> bool:
    """Whether the module of a tensor ran; of MultiheadAttention the parts are used without being called."""
    owner = name.rpartition(".")[0]
    above = owner.rpartition(".")[0]
    return owner in ran or (above in ran and isinstance(model.get_submodule(above), torch.nn.MultiheadAttention))


def load_model(directory: Path) -> PreTrainedModel:
    """The model of a directory in float32, by the architecture its configuration names; no code of it is executed."""
    import transformers

    from weightport import modeling  # noqa: F401 - registers the families that transformers lacks

    settle_arithmetic()
    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    name = (config.architectures or ["AutoModel"])[0]
    own = transformers.AutoModelForImageTextToText if type(config).__module__.startswith("weightport.") else None
    model_class = own or getattr(transformers, name, None)
    if model_class is None:
        raise ParityError(f"transformers has no {name}, so the merge in {directory} cannot be run. Pass --no-verify.")
    model: PreTrainedModel = model_class.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False)
    return model.eval()


@dataclass(frozen=True)
class _Tuned:
    """Base and adapters in peft, and the keys of the adapters that peft has found no place for."""

    model: Any
    missing: tuple[str, ...]


def _tuned(written: Written, names: ModuleNames, stack: ExitStack) -> _Tuned:
    """Base and adapters in peft, each adapter as strong as the merge made it."""
    model = load_model(written.base)
    if written.options.quantized_base:
        kind = written.options.quantized_base
        _quantize(model, kind, quantized_layers(written.adapters, kind))
    if written.plan.resized is not None:
        model.resize_token_embeddings(written.plan.resized[1], mean_resizing=False)
    if written.plan.untied is not None and not _tied_in_training(written):
        _untie(model)
    labels = [f"adapter_{place}" for place in range(len(written.adapters))]
    folders = [_under_todays_names(adapter, names, stack) for adapter in written.adapters]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tuned: Any = model
        for folder, label in zip(folders, labels):
            tuned = load_adapter(tuned, folder, label, autocast_adapter_dtype=False)
    missing = [str(w.message) for w in said if "missing adapter keys" in str(w.message)]
    if missing:
        # A warning names all keys in one text.
        listed = [key.strip(" '\"") for text in missing for key in text.partition("[")[2].partition("]")[0].split(",")]
        return _Tuned(tuned, tuple(key for key in listed if key) or tuple(missing))
    tuned.float()
    combination = written.options.combination
    if len(labels) > 1 and combination.kind != SUM:
        tuned.add_weighted_adapter(
            labels,
            list(written.weights),
            "combined",
            combination.kind,
            svd_rank=combination.svd_rank,
            density=combination.density,
            majority_sign_method=combination.majority_sign,
        )
        tuned.set_adapter("combined")
        return _Tuned(tuned.float().eval(), ())
    for module in tuned.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            scaling.update({n: scaling[n] * w for n, w in zip(labels, written.weights) if n in scaling})
    tuner: Any = tuned.base_model
    tuner.set_adapter(labels if len(labels) > 1 else labels[0])
    return _Tuned(tuned.eval(), ())


def _under_todays_names(adapter: LoraAdapter, names: ModuleNames, stack: ExitStack) -> Path:
    """The adapter's folder; of one with names of an earlier transformers, a copy with those that peft finds today."""
    renamed = {m.module: (names.current(f"{m.module}.weight") or "").removesuffix(".weight") for m in adapter.modules}
    settings = adapter.settings
    if all(old == new for old, new in renamed.items()) or not all(renamed.values()) or settings.target_parameters:
        return adapter.folder
    from safetensors.torch import save_file

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weightport-adapter-")))
    tensors = {}
    for key, ref in open_checkpoint(adapter.files[1]).items():
        module = next((old for old in renamed if f".{old}." in key), None)
        tensors[key if module is None else key.replace(module, renamed[module], 1)] = ref.read().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    exact = {
        "target_modules": sorted(renamed.values()),
        "rank_pattern": {re.escape(new): settings.rank(old) for old, new in renamed.items()},
        "alpha_pattern": {re.escape(new): settings.alpha(old) for old, new in renamed.items()},
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps({**settings.data, **exact}), encoding="utf-8")
    return folder


def _untie(model: PreTrainedModel) -> None:
    """Give every tied place a parameter of its own, so that peft changes and merges the places apart."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                setattr(module, name, torch.nn.Parameter(parameter.detach().clone()))
            seen.add(id(parameter))
    model.all_tied_weights_keys = {}
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


@torch.no_grad()
def _quantize(model: PreTrainedModel, kind: str, layers: frozenset[str] | None) -> None:
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if not isinstance(module, (torch.nn.Linear, Conv1D)):
            continue
        weight = module.weight
        if is_quantized_layer(f"{name}.weight", tuple(weight.shape), layers):
            flipped = isinstance(module, Conv1D)
            stored = weight.to(model.config.dtype or torch.float32)
            weight.copy_(nf4_round_trip(stored, double=kind == "nf4-double", flipped=flipped))


@torch.no_grad()
def _outputs(model: Any, arguments: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor that a forward pass gives, by name: hidden states of each layer, features, logits."""
    outputs = model(**arguments, output_hidden_states=True)
    return {
        name: value.double()
        for key, found in outputs.items()
        if "cache" not in key and "past" not in key
        for name, value in _flattened(key, found)
        if value.is_floating_point() and value.numel()
    }


def _flattened(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (tuple, list)):
        for place, item in enumerate(value):
            yield from _flattened(f"{name}.{place}", item)


def _depth(config: Any) -> int:
    """Residual blocks of the model: two a layer, three in decoders that look at an encoder."""
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", 0) or 0
    return 3 * max(layers, getattr(text, "encoder_layers", 0) + getattr(text, "decoder_layers", 0), 1)


def _coarsest(written: Written) -> torch.dtype:
    """The widest rounding among the changed tensors."""
    changed = [out.dtype for out in written.plan.outputs if out.edit is not None and out.dtype.is_floating_point]
    return max(changed, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _compare(
    expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], written: Written, depth: int
) -> Iterator[SeamDifference]:
    rounding = _ROUNDING_NOISE * torch.finfo(_coarsest(written)).eps
    noise = max(rounding, _ARITHMETIC_NOISE * torch.finfo(torch.float32).eps) * math.sqrt(1 + depth)
    for seam, reference in expected.items():
        if seam not in found or found[seam].shape != reference.shape:
            continue
        scale = float(reference.square().mean().sqrt())
        difference = float((found[seam] - reference).abs().max())
        yield SeamDifference(seam, difference, scale, noise * max(scale, 1e-6))


def _compare_weights(
    weights: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    changed: Mapping[str, torch.dtype],
    held: Mapping[str, Sequence[str]],
) -> tuple[float, dict[str, str]]:
    """(largest distance from peft's merge in roundings of the stored dtype, stored tensors that were not compared)."""
    furthest = 0.0
    unchecked: dict[str, str] = {}
    for stored, dtype in changed.items():
        names = held.get(stored, ())
        lacking = [n for n in names if n not in found or n not in weights or weights[n].shape != found[n].shape]
        if lacking or not names:
            what = lacking[0] if lacking else "its name in the running model"
            unchecked[stored] = f"peft's merge has no {what} of this shape"
            continue
        for name in names:
            reference = weights[name].float()
            # float32 products and sums of peft's merge are themselves some roundings away.
            eps = max(torch.finfo(dtype).eps if dtype.is_floating_point else 0.0, 16 * torch.finfo(torch.float32).eps)
            step = eps * reference.abs().clamp(min=float(reference.abs().mean()) + torch.finfo(torch.float32).tiny)
            furthest = max(furthest, float(((found[name].float() - reference).abs() / step).max()))
    return furthest, unchecked


def _require(result: Verification, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    failed = [seam for seam in result.seams if not seam.passed]
    if not result.seams:
        raise ParityError(f"The merged model gives {sorted(found)}, base and adapter give {sorted(expected)}.")
    if failed:
        first = failed[0]
        raise ParityError(
            f"The merged model is not base + adapter: {first.seam} is {first.difference:.2e} off, "
            f"{first.allowed:.1e} are explained by rounding ({len(failed)} of {len(result.seams)} seams). "
            "Nothing was written."
        )
    if result.weight_steps > 1:
        raise ParityError(
            f"A merged weight lies {result.weight_steps:.1f} roundings from peft's own merge; at most one is "
            "explained. Nothing was written."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither progress bars nor advice of the libraries while the block runs."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def worst(seams: Sequence[SeamDifference]) -> SeamDifference:
    """The seam with the largest difference relative to what is allowed."""
    return max(seams, key=lambda seam: seam.difference / seam.allowed)
