"""The families that weightport knows: the built-in ones, and those of installed packages, through one door.

Another package offers a family through the entry point group `weightport.families`. A declaration is imported when it
is asked for by name or when a checkpoint is to be recognised, never because a file names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from weightport.errors import CheckpointError, FamilyError, UnknownFamilyError
from weightport.families.declaration import INTERFACE, Family
from weightport.families.signature import Signature
from weightport.model_directory import check_model_directory

if TYPE_CHECKING:
    from weightport.checkpoints import Checkpoint
    from weightport.finetuning.evaluation.retrieval import RetrievalStage
    from weightport.finetuning.family import Family as TrainingStage

GROUP = "weightport.families"

BUILT_IN = {
    "ofa": "weightport.families.ofa:FAMILY",
    "florence2": "weightport.families.florence2:FAMILY",
    "paligemma2": "weightport.families.paligemma2:FAMILY",
    "blip2": "weightport.families.blip2:FAMILY",
    "moondream2": "weightport.families.moondream2:FAMILY",
}
"""A new built-in family is a folder, and a line here."""

NATIVE = "a native "
"""How the kinds of signatures begin that are what a conversion gives."""

STRANGERS = (
    Signature("BART (fairseq)", r"(model\.)?encoder\.sentence_encoder\..+|(model\.)?encoder\.layers\.0\.fc1\.weight"),
    Signature("a LoRA adapter", r".+\.lora_A\.(.+\.)?weight"),
    Signature(
        "a variant of moondream2 (2025), which is no model by itself: port-moondream2 SOURCE OUT --variant-file FILE "
        "merges it into its base",
        r"text_model\.transformer\.h\.\d+\.(mixer|mlp)\..+\.parametrizations\.weight\.0\.A",
    ),
)
"""Checkpoints that people hand over and no family converts: for error messages."""


@dataclass(frozen=True)
class Offer:
    """A family that can be had: its name, who offers it, and how its declaration is imported."""

    name: str
    package: str
    load: Callable[[], object]


class FamilyRegistry:
    """Families by name, the built-in ones first. Declarations are loaded once, when they are needed."""

    def __init__(self, built_in: Mapping[str, str], group: str | None = GROUP) -> None:
        self._built_in = dict(built_in)
        self._group = group
        self._loaded: dict[str, Family] = {}

    @property
    def offers(self) -> tuple[Offer, ...]:
        """What can be had, without loading it. Raises FamilyError where two packages offer one name."""
        found = [Offer(name, "weightport", _importer(reference)) for name, reference in self._built_in.items()]
        for point in sorted(entry_points(group=self._group), key=lambda each: each.name) if self._group else ():
            package = point.dist.name if point.dist else point.value
            if any(offer.name == point.name for offer in found):
                raise FamilyError(f"{package} offers a family {point.name!r}, which there is already: uninstall one.")
            found.append(Offer(point.name, package, point.load))
        return tuple(found)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(offer.name for offer in self.offers)

    def __iter__(self) -> Iterator[Family]:
        return (self[name] for name in self.names)

    def __getitem__(self, name: str) -> Family:
        """The family called `name`. Raises UnknownFamilyError, FamilyError for a declaration that cannot be used."""
        if name not in self._loaded:
            offer = next((each for each in self.offers if each.name == name), None)
            if offer is None:
                raise UnknownFamilyError(f"There is no family {name!r}; there are {', '.join(self.names)}.")
            self._loaded[name] = _declared(offer)
        return self._loaded[name]

    def of_model_type(self, model_type: object) -> Family | None:
        """The family whose native model has this `model_type` in config.json."""
        return next((family for family in self if model_type in family.model_types), None)

    def check_converted(self, directory: Path) -> None:
        """Raise CheckpointError, saying what to do, unless `directory` can be a native model: it is not there, an
        adapter, an original checkpoint that is not converted yet, or has no config.json. No weights are read, and of a
        directory with a record of its conversion no family is asked whether it is an original."""
        known = not directory.exists() or self.is_recorded(directory)
        family = None if known else self.original(directory)
        if family is not None:
            raise CheckpointError(
                f"{directory} holds an original checkpoint of {family.title}, not a converted one. Convert it first: "
                f"{family.command} {directory} OUT"
            )
        check_model_directory(directory)

    @staticmethod
    def is_recorded(directory: Path) -> bool:
        """Whether the directory has a record of its conversion."""
        from weightport.converters.record import FILE

        return (directory / FILE).is_file()

    def original(self, path: Path) -> Family | None:
        """The family of an original checkpoint; None for anything else."""
        from weightport.checkpoints import open_checkpoint

        try:
            return self.recognised(open_checkpoint(path))
        except CheckpointError:
            return None

    def training_of(self, directory: Path) -> TrainingStage:
        """The training stage for the model in `directory`. Raises as `of_directory`, and FamilyError without one."""
        from weightport.checkpoints.formats.sharded import read_json

        return self.of_directory(directory).training_of(read_json(directory / "config.json"))

    def retrieval_of(self, directory: Path) -> RetrievalStage | None:
        """The stage for a model in `directory` that finds texts by pictures; None for other models. Raises as
        `of_directory`."""
        from weightport.checkpoints.formats.sharded import read_json

        return self.of_directory(directory).retrieval_of(read_json(directory / "config.json"))

    def of_directory(self, directory: Path) -> Family:
        """The family of a native model directory, by its config.json. Raises CheckpointError for what is none,
        UnknownFamilyError for a model of no family."""
        family = self.of_converted(directory)
        if family is None:
            known = ", ".join(name for each in self for name in each.model_types)
            path = directory / "config.json"
            raise UnknownFamilyError(f"{path} has the model_type {_model_type(path)!r}; known are {known}.")
        return family

    def of_converted(self, directory: Path) -> Family | None:
        """The family of a native model directory; None for a model of no family. Raises CheckpointError for what is no
        native directory."""
        self.check_converted(directory)
        return self.of_model_type(_model_type(directory / "config.json"))

    def looks_like(self, names: Iterable[str]) -> str | None:
        """The kind of checkpoint that tensors with these names are, or None."""
        known = tuple(names)
        kinds = (family.looks_like(known) for family in self)
        strangers = (signature.kind for signature in STRANGERS if signature.fits(known))
        return next((kind for kind in kinds if kind), None) or next(strangers, None)

    def recognised(self, checkpoint: Checkpoint) -> Family | None:
        """The family that recognises the checkpoint, None where none does."""
        return next((family for family in self if family.recognises(checkpoint)), None)

    def recognise(self, checkpoint: Checkpoint, name: str | None = None) -> Family:
        """The family of the checkpoint. Raises UnknownFamilyError, also when it is not the one asked for."""
        if not checkpoint:
            why = _pickled(checkpoint)
            raise UnknownFamilyError(f"{checkpoint.path} holds no tensors, so it is not a model's checkpoint.{why}")
        if name is not None and self[name].recognises(checkpoint):
            return self[name]
        matching = self.recognised(checkpoint)
        if name is None and matching is not None:
            return matching
        kind = matching.title if matching is not None else self.looks_like(checkpoint)
        if kind is not None and kind.startswith(NATIVE):
            raise UnknownFamilyError(
                f"{checkpoint.path} is {kind} already: there is nothing to convert. `weightport generate "
                f"{checkpoint.path} IMAGE` tries it, `weightport export {checkpoint.path} TARGET` gives the original "
                "format back."
            )
        wanted = self[name].title if name is not None else " or ".join(family.title for family in self)
        shown = ", ".join(list(checkpoint)[:3])
        raise UnknownFamilyError(
            f"{checkpoint.path} is not a checkpoint of {wanted}: it looks like {kind or 'none that weightport knows'} "
            f"({len(checkpoint)} tensors: {shown}, …).\n"
            "  `weightport inspect` lists what is in it."
        )


def _model_type(path: Path) -> object:
    from weightport.checkpoints.formats.sharded import read_json

    config = read_json(path)
    return config.get("model_type") if isinstance(config, dict) else None


def _pickled(checkpoint: Checkpoint) -> str:
    """What to say of an .npz that holds nothing but pickled objects."""
    if checkpoint.format != "npz" or not checkpoint.document:
        return ""
    return (
        f"\n  What it holds ({', '.join(list(checkpoint.document)[:3])}) are pickled Python objects, which only "
        "executing the file could read. Where you trust it, save its arrays by name with numpy.savez."
    )


def _importer(reference: str) -> Callable[[], object]:
    module, _, attribute = reference.partition(":")
    return lambda: getattr(import_module(module), attribute)


def _declared(offer: Offer) -> Family:
    try:
        family = offer.load()
    except Exception as error:
        raise FamilyError(f"The family {offer.name!r} of {offer.package} cannot be loaded: {error!r}.") from error
    if not isinstance(family, Family):
        raise FamilyError(f"The family {offer.name!r} of {offer.package} is no weightport Family, but {family!r}.")
    if family.interface != INTERFACE:
        raise FamilyError(
            f"The family {offer.name!r} of {offer.package} was written for version {family.interface} of the family "
            f"interface; this weightport has version {INTERFACE}."
        )
    if family.name != offer.name:
        raise FamilyError(f"{offer.package} offers {offer.name!r}, but its family calls itself {family.name!r}.")
    return family


@cache
def registry() -> FamilyRegistry:
    """The families of this installation."""
    return FamilyRegistry(BUILT_IN)
