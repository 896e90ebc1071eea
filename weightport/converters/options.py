"""What a user may ask of a conversion: the options that all have, and how a family declares its own.

A family's options are a frozen dataclass that extends ConversionOptions; the commands are generated from its fields.
Nothing heavy is imported here: a command line's help is made of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from weightport.errors import UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CommandOption:
    """How a field of a family's options stands on the command line. `choices` are all values that it may have."""

    flag: str
    help: str
    metavar: str | None = None
    choices: tuple[str, ...] = ()


def option(flag: str, default: Any, help: str, *, metavar: str | None = None, choices: tuple[str, ...] = ()) -> Any:
    """A field of a family's options: False makes a switch, anything else an option that takes a value."""
    return field(default=default, metadata={"option": CommandOption(flag, help, metavar, choices)})


@dataclass(frozen=True)
class ConversionOptions:
    """What every conversion can be asked for.

    `dtype` is the floating-point dtype of the output (None: each tensor keeps its own). `drop` are patterns of source
    tensors to leave out. `max_shard_bytes` bounds a weight file.
    """

    dtype: torch.dtype | None = None
    drop: tuple[str, ...] = ()
    allow_nonfinite: bool = False
    overwrite: bool = False
    max_shard_bytes: int = 5 * 10**9

    @property
    def paths(self) -> tuple[str, ...]:
        """What a family's options name that may be a folder or a file here: inputs, which no output replaces."""
        values = (getattr(self, each.name) for each, _ in declared_options(type(self)))
        return tuple(value for value in values if isinstance(value, str) and value)


def declared_options(kind: type[ConversionOptions]) -> Iterator[tuple[Field[Any], CommandOption]]:
    """The family's own options: fields that stand on the command line."""
    for each in fields(kind):
        if "option" in each.metadata:
            yield each, each.metadata["option"]


def options_of(
    kind: type[ConversionOptions], title: str, given: dict[str, Any], common: ConversionOptions
) -> ConversionOptions:
    """The options of a family: `common`, and of `given` (by field name, of any family) what the user did set.

    Raises UsageError for one that this family does not have, which would be ignored, and for a value that it does not
    know.
    """
    own = {each.name: each for each, _ in declared_options(kind)}
    flags = {each.name: declared for each, declared in declared_options(kind)}
    for name, value in given.items():
        if name not in own:
            known = ", ".join(declared.flag for declared in flags.values()) or "none"
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} means nothing for a checkpoint of {title}, whose own options are {known}.")
        choices = flags[name].choices
        if choices and value not in choices and value != own[name].default:
            raise UsageError(f"{flags[name].flag} is one of {', '.join(choices)}, not {value!r}.")
    shared = {each.name: getattr(common, each.name) for each in fields(ConversionOptions)}
    return kind(**shared, **given)


def default_of(each: Field[Any]) -> Any:
    """The default of a field, None where it has none."""
    return None if each.default is MISSING else each.default
