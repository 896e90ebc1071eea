"""adapter_config.json as data: which modules a LoRA adapter touches, and how strongly."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from weightport.converters.lora_patterns import of_ending, of_layer, of_saved, require_bounded, require_pattern, shown
from weightport.errors import AdapterError


@dataclass(frozen=True)
class LoraSettings:
    """The settings of a peft LoRA adapter, as its adapter_config.json states them."""

    data: Mapping[str, Any]

    @property
    def use_rslora(self) -> bool:
        return bool(self.data.get("use_rslora"))

    @property
    def default_rank(self) -> int:
        return int(self.data.get("r", 8))

    @property
    def default_alpha(self) -> float:
        alpha: float = self.data.get("lora_alpha", 8)
        return alpha

    def rank(self, module: str) -> int:
        """The rank of a module's pair: rank_pattern's first match, else r."""
        return int(self.patterned("rank_pattern", module, self.default_rank))

    def alpha(self, module: str) -> float:
        """The alpha of a module's pair: alpha_pattern's first match, else lora_alpha."""
        alpha: float = self.patterned("alpha_pattern", module, self.default_alpha)
        return alpha

    def scaling(self, module: str) -> float:
        """What B·A is multiplied with: alpha / rank, with rank-stabilised LoRA alpha / √rank."""
        rank = self.rank(module)
        alpha = float(self.alpha(module))
        return alpha / rank**0.5 if self.use_rslora else alpha / rank

    @cached_property
    def patterns(self) -> tuple[tuple[str, str], ...]:
        """Every regular expression of the settings: (as it is written, as it is matched)."""
        data = self.data
        whole = [data.get(field) for field in ("target_modules", "exclude_modules")]
        layers = data.get("layers_pattern") or ()
        return (
            *((pattern, of_ending(pattern)) for field in _ENDINGS for pattern in data.get(field) or ()),
            *((pattern, pattern) for pattern in whole if isinstance(pattern, str)),
            *((name, of_saved(name)) for name in data.get("modules_to_save") or ()),
            *((name, of_layer(name)) for name in ([layers] if isinstance(layers, str) else layers)),
        )

    def require_bounded(self, names: Iterable[str], where: str) -> None:
        """Raises AdapterError when matching the patterns with these module names takes too long."""
        require_bounded(self.patterns, names, where)

    def patterned(self, field: str, module: str, default: Any) -> Any:
        """The value of the first pattern in `field` (rank_pattern, alpha_pattern) that `module` matches."""
        return next((value for pattern, value in self._endings[field] if pattern.match(module)), default)

    @cached_property
    def _endings(self) -> dict[str, list[tuple[re.Pattern[str], Any]]]:
        """rank_pattern and alpha_pattern, compiled: an adapter may have one entry a module."""
        return {
            field: [(re.compile(of_ending(key)), value) for key, value in (self.data.get(field) or {}).items()]
            for field in _ENDINGS
        }


def parse_settings(data: Any, where: str) -> LoraSettings:
    """Validate the adapter_config.json of pairs that are all there is to the adapter. Raises AdapterError for another
    method than LoRA, and for DoRA and trained biases."""
    settings = parse_lora_settings(data, where)
    if data.get("use_dora"):
        raise AdapterError(
            f"{where} asks for DoRA (use_dora), which depends on the norms of the base's weights; not supported."
        )
    if data.get("bias") not in (None, "none"):
        raise AdapterError(
            f"{where} trains biases (bias: {data['bias']!r}); only adapters with bias: 'none' are known."
        )
    return settings


def parse_lora_settings(data: Any, where: str) -> LoraSettings:
    """Validate an adapter_config.json. Raises AdapterError for another method than LoRA, or another model."""
    if not isinstance(data, Mapping):
        raise AdapterError(f"{where} should hold a JSON object; found {type(data).__name__}.")
    kind = data.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{where} is of the kind {shown(kind)}; LORA adapters are known.")
    if data.get("layer_replication"):
        raise AdapterError(
            f"{where} replicates layers (layer_replication); the native model has the original's layers."
        )
    require_fields(data, where)
    return LoraSettings(data)


def require_fields(data: Mapping[str, Any], where: str) -> None:
    """Raises AdapterError for a field of another type than peft writes, or a pattern that is none. null stands for a
    field that is not set, but where only a number makes sense."""
    for field, check, expected in _FIELDS:
        value = data.get(field)
        absent = value is None and (field not in data or field not in _NUMBERS)
        if not absent and not check(value):
            raise AdapterError(f"{where}: {field} is {shown(value)}; expected {expected}.")
    for raw, framed in LoraSettings(data).patterns:
        require_pattern(raw, framed, where)


_ENDINGS = ("rank_pattern", "alpha_pattern")
_NUMBERS = ("r", "lora_alpha")
# What methods other than LoRA call the biases of the layers they change.
_OWN_BIASES = tuple(f"{method}_only" for method in ("vera", "miss", "c3a", "gralora", "delora", "vblora", "randlora"))
_SURROGATE = re.compile("[\ud800-\udfff]")
_LARGEST_RANK, _LARGEST_ALPHA, _LONGEST_PATH = 1 << 31, 1e30, 4096


def _rank(value: Any) -> bool:
    return type(value) is int and 1 <= value < _LARGEST_RANK


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that an adapter may be scaled by."""
    # NaN compares as false.
    return type(value) in (int, float) and abs(value) < _LARGEST_ALPHA


def _index(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST_RANK


def _text(value: Any) -> bool:
    # JSON can hold half of a surrogate pair, which no file or terminal takes.
    return isinstance(value, str) and not _SURROGATE.search(value)


def _name(value: Any) -> bool:
    return _text(value) and len(value) <= _LONGEST_PATH


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(check(item) for item in value)


def _object_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(_text(key) and check(item) for key, item in value.items())


def _either(*checks: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(check(value) for check in checks)


_FIELDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("r", _rank, f"a rank of at least 1 and less than {_LARGEST_RANK:,}"),
    ("lora_alpha", is_number, f"a number of less than {_LARGEST_ALPHA:g}"),
    ("rank_pattern", _object_of(_rank), "an object: ranks by module name"),
    ("alpha_pattern", _object_of(is_number), "an object: numbers by module name"),
    ("target_modules", _either(_text, _list_of(_text)), "module names or a regular expression"),
    ("exclude_modules", _either(_text, _list_of(_text)), "module names or a regular expression"),
    ("target_parameters", _list_of(_text), "parameter names"),
    ("modules_to_save", _list_of(_text), "module names"),
    ("layers_to_transform", _either(_index, _list_of(_index)), "layer numbers"),
    ("layers_pattern", _either(_text, _list_of(_text)), "names of lists of layers"),
    (
        "trainable_token_indices",
        _either(_list_of(_index), _object_of(_list_of(_index))),
        "rows of the embedding, or such lists by module name",
    ),
    ("use_bdlora", lambda value: isinstance(value, Mapping), "an object"),
    ("bias", lambda value: value in ("none", "all", "lora_only", *_OWN_BIASES), "none, all or lora_only"),
    ("base_model_name_or_path", _name, "the name or the path of a model"),
    *((flag, _flag, "true or false") for flag in (
        "use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying")),
)  # fmt: skip
