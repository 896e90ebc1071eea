"""The PaliGemma family: which checkpoints are big_vision's, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightport.checkpoints import TensorRef
from weightport.checkpoints.formats.trainer_folder import FORMAT as TRAINER_FOLDER
from weightport.checkpoints.sources import MAIN, Sources
from weightport.converters.family import OriginalForm, SourceModel
from weightport.converters.rules import RuleTable
from weightport.families.paligemma2 import configuration, layouts
from weightport.families.paligemma2.options import PaliGemmaOptions
from weightport.families.paligemma2.rules import name_on_disk, paligemma_rules

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from weightport.converters.native import NativeTensors
    from weightport.converters.plan import Plan
    from weightport.converters.processor import ImageUse, Processor
    from weightport.writing.outgoing import Outgoing


class PaliGemmaConversion:
    """Files that big_vision wrote: released ones, the notebook's, and training states."""

    name = "paligemma2"
    title = "PaliGemma"
    original_form: OriginalForm = "npz"

    def recognises(self, names: Mapping[str, TensorRef]) -> bool:
        return layouts.is_paligemma(names)

    def read(self, sources: Sources, options: PaliGemmaOptions) -> SourceModel:
        """The model in the checkpoint. Raises WeightportError naming what does not fit."""
        found = layouts.locate(sources.main)
        sizes = configuration.read_sizes(found.tensors, found.towers)
        settings = configuration.settings_of(sizes, options)
        config = configuration.native_config(sizes, settings, pad_vocab=options.pad_vocab)
        step = [f"The step is {sources.main.path.name}."] if sources.main.format == TRAINER_FOLDER else []
        size = settings.variant or f"of width {sizes.text.width}"
        return SourceModel(
            family=self.name,
            layout=found.towers.name,
            title=f"{self.title} {sizes.generation} {size} at {sizes.image_size} px",
            tensors=found.tensors,
            rules=paligemma_rules(config, found.towers),
            config=config,
            sections={MAIN: found.prefix},
            options={
                "variant": settings.variant,
                "rows": sizes.rows,
                **{key: value for key, value in asdict(settings).items() if key not in ("variant", "notes")},
                "unread": dict(found.unread),
            },
            unread=found.unread,
            notes=(*step, *settings.notes),
        )

    def targets(self, config: PreTrainedConfig) -> NativeTensors:
        """What PaliGemmaForConditionalGeneration loads, in the names of the Hub's files."""
        from transformers import PaliGemmaForConditionalGeneration

        from weightport.converters.native import loadable_tensors

        return loadable_tensors(PaliGemmaForConditionalGeneration, config).renamed(name_on_disk)

    def build_processor(self, model: SourceModel, sources: Sources, options: PaliGemmaOptions) -> Processor | None:
        """PaliGemmaProcessor; None without a tokenizer."""
        from weightport.families.paligemma2.companions import build_processor

        return build_processor(model, sources.main, options)

    def image_use(self, config: PreTrainedConfig, height: int, width: int) -> ImageUse:
        """Patches of a picture, each of which takes the place of an <image> token."""
        from weightport.converters.processor import ImageUse

        vision: Any = config.vision_config
        rows, columns = height // vision.patch_size, width // vision.patch_size
        return ImageUse(rows, columns, vision.image_size // vision.patch_size, rows * columns)

    def write_companions(self, model: SourceModel, plan: Plan, folder: Path, options: PaliGemmaOptions) -> None:
        """Write config.json and generation_config.json into `folder`."""
        from weightport.families.paligemma2.companions import write

        write(model, plan, folder)

    def rules_of(self, config: PreTrainedConfig, layout: str) -> RuleTable:
        """The rule table of a converted model: stacked towers, as the releases have them, unless its record says
        otherwise."""
        return paligemma_rules(config, layouts.Towers.named(layout))

    def original_document(
        self, config: PreTrainedConfig, options: Mapping[str, Any], model: Mapping[str, Outgoing]
    ) -> Mapping[str, Any]:
        """An .npz holds arrays and nothing else."""
        return model

    def write_original_companions(
        self, directory: Path, config: PreTrainedConfig, options: Mapping[str, Any], folder: Path
    ) -> None:
        """One file holds everything."""


CONVERSION = PaliGemmaConversion()
