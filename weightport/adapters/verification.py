"""The proof of a merge: base + adapter run in peft against the merged directory, and every weight against peft's own.

This is the one part of merging that builds models, so it is run where they fit in memory.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightport.adapters.combination import SUM
from weightport.adapters.merging import Written, quantized_layers
from weightport.adapters.quantized import is_quantized_layer, nf4_round_trip
from weightport.errors import ParityError
from weightport.extras import install_command

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODELS_AT_ONCE = 2.5
"""Models in float32 that stand in memory during the check, with what running them takes."""

_ROUNDING_NOISE, _ARITHMETIC_NOISE = 4.0, 48.0
"""What may move an output, relative to its scale and growing with the root of the depth: units of the stored dtype's
eps for the rounding of the weights (0.2 to 0.7 were measured on small random models), and of float32's for the
arithmetic, which adds the same terms in another order in the two models (parity/noise.py has the measurements)."""


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
    """How far the merged model lies from base + adapter. `weights` counts those compared with peft's own merge; of
    their elements, the furthest lies `weight_steps` roundings of the stored dtype away."""

    seams: tuple[SeamDifference, ...]
    weights: int
    weight_steps: float
    inputs: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """As plain data, for merge.json."""
        return {
            "inputs": list(self.inputs),
            "seams": [asdict(seam) for seam in self.seams],
            "weights": self.weights,
            "weight_steps": self.weight_steps,
        }


def why_not_verified(written: Written, available: int | None = None) -> str | None:
    """Why the check cannot run here; None when it can. `available`: bytes of free memory."""
    absent = [name for name in ("transformers", "peft") if find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed ({install_command('adapters')})"
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


def verify_merge(written: Written) -> Verification:
    """Run base + adapters in peft and the merged directory, both in float32, on the same inputs. Raises
    ParityError."""
    with _quiet():
        tuned = _tuned(written)
        arguments = sample_inputs(tuned.get_base_model(), written.base)
        expected = _outputs(tuned, arguments)
        weights = _merged_by_peft(tuned, written)
        del tuned
        model = load_model(written.folder)
        found = _outputs(model, arguments)
    result = Verification(
        tuple(_compare(expected, found, written, _depth(model.config))),
        *_compare_weights(weights, model, written),
        tuple(arguments),
    )
    _require(result, expected, found)
    return result


def load_model(directory: Path) -> PreTrainedModel:
    """The model of a directory in float32, by the architecture its configuration names; no code of it is executed."""
    import transformers

    from weightport.parity.families import FAMILIES
    from weightport.parity.loading import load_native

    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if any(family.model_type == config.model_type for family in FAMILIES.values()):
        return load_native(directory, torch.float32)
    name = (config.architectures or ["AutoModel"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ParityError(f"transformers has no {name}, so the merge in {directory} cannot be run. Pass --no-verify.")
    model: PreTrainedModel = model_class.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False)
    return model.eval()


def _tuned(written: Written) -> Any:
    """Base and adapters in peft, each adapter as strong as the merge made it."""
    from peft import PeftModel

    model = load_model(written.base)
    if written.options.quantized_base:
        kind = written.options.quantized_base
        _quantize(model, kind, quantized_layers(written.adapters, kind))
    if written.plan.resized is not None:
        model.resize_token_embeddings(written.plan.resized[1], mean_resizing=False)
    names = [f"adapter_{place}" for place in range(len(written.adapters))]
    tuned = PeftModel.from_pretrained(model, written.adapters[0].folder, names[0], autocast_adapter_dtype=False)
    for adapter, name in zip(written.adapters[1:], names[1:]):
        tuned.load_adapter(adapter.folder, name, autocast_adapter_dtype=False)
    tuned.float()
    combination = written.options.combination
    if len(names) > 1 and combination.kind != SUM:
        tuned.add_weighted_adapter(
            names,
            list(written.weights),
            "combined",
            combination.kind,
            svd_rank=combination.svd_rank,
            density=combination.density,
            majority_sign_method=combination.majority_sign,
        )
        tuned.set_adapter("combined")
        return tuned.float().eval()
    for module in tuned.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            scaling.update({n: scaling[n] * w for n, w in zip(names, written.weights) if n in scaling})
    tuner: Any = tuned.base_model
    tuner.set_adapter(names if len(names) > 1 else names[0])
    return tuned.eval()


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


def sample_inputs(model: PreTrainedModel, directory: Path) -> dict[str, torch.Tensor]:
    """Arguments of a forward pass: an image and a prompt through the directory's processor where it has one, else
    token ids (an image alone for models that take nothing else)."""
    found = _processed(model, directory)
    if not found:
        found = _plain_inputs(model)
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" not in found:
        found["decoder_input_ids"] = _tokens(model, 7)
    return found


def _processed(model: PreTrainedModel, directory: Path) -> dict[str, torch.Tensor]:
    if not any((directory / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        return {}
    from PIL import Image
    from transformers import AutoProcessor

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, 80, 3), generator=generator, dtype=torch.uint8)
    prompt = {"florence2": "<CAPTION>", "paligemma": "<image>caption en"}.get(model.config.model_type, "what is this?")
    try:
        processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
        batch = processor(text=prompt, images=Image.fromarray(pixels.numpy()), return_tensors="pt")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        # A directory with an image processor alone, or one that takes other arguments: token ids do as well.
        return {}
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def _plain_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    if model.main_input_name == "pixel_values" and not hasattr(model.config, "vocab_size"):
        channels, size = getattr(model.config, "num_channels", 3), getattr(model.config, "image_size", 64)
        side = size if isinstance(size, int) else size[0]
        return {"pixel_values": torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": _tokens(model, 12)}


def _tokens(model: PreTrainedModel, length: int) -> torch.Tensor:
    """Token ids [1, length], of the lower half of the vocabulary: special tokens for images stand at its end."""
    embedding: Any = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    return torch.randint(min(4, rows - 1), max(rows // 2, 5), (1, length), generator=torch.Generator().manual_seed(0))


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


def _merged_by_peft(tuned: Any, written: Written) -> dict[str, torch.Tensor]:
    """The weights of peft's own merge in float32, but for tied places that it cannot merge apart."""
    merged = tuned.merge_and_unload().state_dict()
    untied = written.plan.untied
    left_out = {untied.head, untied.embedding, *untied.aliases} if untied is not None else set()
    return {name: weight for name, weight in merged.items() if name not in left_out}


def _compare_weights(
    weights: Mapping[str, torch.Tensor], model: PreTrainedModel, written: Written
) -> tuple[int, float]:
    """(weights compared, largest distance in roundings of the stored dtype)."""
    changed = {out.name: out.dtype for out in written.plan.outputs if out.edit is not None}
    furthest, compared = 0.0, 0
    for name, found in model.state_dict().items():
        reference = weights.get(name)
        if reference is None or name not in changed or reference.shape != found.shape:
            continue
        compared += 1
        # float32 products and sums of peft's merge are themselves some roundings away.
        eps = max(torch.finfo(changed[name]).eps, 16 * torch.finfo(torch.float32).eps)
        step = eps * reference.abs().clamp(min=float(reference.abs().mean()) + torch.finfo(torch.float32).tiny)
        furthest = max(furthest, float(((found - reference).abs() / step).max()))
    return compared, furthest


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
