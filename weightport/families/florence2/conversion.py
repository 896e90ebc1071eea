"""The Florence-2 family: which checkpoints are Florence-2's, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightport.adapters.reading.lora_dumps import has_adapter, merge_dump
from weightport.checkpoints import Checkpoint, TensorRef
from weightport.checkpoints.sources import MAIN, Sources
from weightport.checkpoints.types import NamedTensors
from weightport.converters.dropping import given_up
from weightport.converters.family import OriginalForm, SourceModel
from weightport.converters.rules import RuleTable
from weightport.errors import ConfigurationError
from weightport.families.florence2 import configuration, layouts
from weightport.families.florence2.companions import companion, source_files
from weightport.families.florence2.embeddings import check_logits_bias, read_embedding
from weightport.families.florence2.image_token import choose
from weightport.families.florence2.options import Florence2Options
from weightport.families.florence2.rules import florence2_rules

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from weightport.converters.native import NativeTensors
    from weightport.converters.plan import Plan
    from weightport.converters.processor import ImageUse, Processor
    from weightport.writing.outgoing import Outgoing

LAYOUT = "remote-code"


class Florence2Conversion:
    """Folders and files written for Florence-2's remote code: releases, forks, training dumps."""

    name = "florence2"
    title = "Florence-2"
    original_form: OriginalForm = "folder"

    def recognises(self, names: Mapping[str, TensorRef]) -> bool:
        return layouts.is_florence2(names)

    def read(self, sources: Sources, options: Florence2Options) -> SourceModel:
        """The model in the checkpoint. Raises WeightportError naming what does not fit."""
        checkpoint = sources.main
        found = layouts.locate(checkpoint, ema=options.ema)
        tensors, merged = _without_adapter(found, checkpoint, options)
        config = companion(checkpoint, "config.json")
        if config is None:
            raise ConfigurationError(
                f"No config.json beside {checkpoint.path}: heads, groups, windows and strides do not show in the "
                "tensors.\n  Put the config.json of the model that was trained into the folder."
            )
        embedding = read_embedding(tensors)
        check_logits_bias(tensors, embedding.rows)
        sizes = configuration.read_sizes(tensors, config, embedding)
        image = choose(checkpoint, options, embedding.rows)
        native = configuration.native_config(
            sizes, tied=embedding.tied, image_token_id=image.id, appended=image.appended
        )
        average = "The file also holds averaged weights (EMA); --ema converts those instead."
        return SourceModel(
            family=self.name,
            layout=LAYOUT,
            title=f"{self.title} {configuration.size_name(sizes)} ({'tied' if embedding.tied else 'untied'} head)",
            tensors=tensors,
            rules=florence2_rules(native, tensors),
            config=native,
            sections={MAIN: found.prefix},
            options={
                "config": config,
                "files": source_files(checkpoint),
                "rows": embedding.rows,
                "image_token": image.record,
                "prefix": found.prefix,
            },
            unread=found.unread,
            notes=(embedding.because, image.note, *sizes.notes, *merged, *([average] if found.has_ema else [])),
        )

    def targets(self, config: PreTrainedConfig) -> NativeTensors:
        """What Florence2ForConditionalGeneration loads."""
        from transformers import Florence2ForConditionalGeneration

        from weightport.converters.native import loadable_tensors

        return loadable_tensors(Florence2ForConditionalGeneration, config)

    def build_processor(self, model: SourceModel, sources: Sources, options: Florence2Options) -> Processor | None:
        """Florence2Processor; None without a tokenizer."""
        from weightport.families.florence2.companions import build_processor

        return build_processor(model, sources.main, options)

    def image_use(self, config: PreTrainedConfig, height: int, width: int) -> ImageUse:
        """Features of the vision tower's last stage; with their average they take the places of <image> tokens."""
        from weightport.converters.processor import ImageUse
        from weightport.families.florence2.images import feature_grid, image_vectors

        vision = config.vision_config
        rows, columns = feature_grid(vision, height, width)
        return ImageUse(rows, columns, vision.max_position_embeddings, image_vectors(vision, height, width))

    def write_companions(self, model: SourceModel, plan: Plan, folder: Path, options: Florence2Options) -> None:
        """Write config.json and generation_config.json into `folder`."""
        from weightport.families.florence2.companions import write

        write(model, plan, folder)

    def rules_of(self, config: PreTrainedConfig, layout: str) -> RuleTable:
        """The rule table of a converted model: the released files' set of names."""
        return florence2_rules(config)

    def write_original_companions(
        self, directory: Path, config: PreTrainedConfig, options: Mapping[str, Any], folder: Path
    ) -> None:
        """Write config.json, tokenizer and image settings as the remote code reads them."""
        from weightport.families.florence2.original import write_companions

        write_companions(directory, config, options, folder)

    def original_document(
        self, config: PreTrainedConfig, options: Mapping[str, Any], model: Mapping[str, Outgoing]
    ) -> Mapping[str, Any]:
        """pytorch_model.bin is the state dict itself."""
        return model


CONVERSION = Florence2Conversion()


def _without_adapter(
    found: layouts.Found, checkpoint: Checkpoint, options: Florence2Options
) -> tuple[NamedTensors, tuple[str, ...]]:
    """The model's tensors, a LoRA adapter that is still in the file merged into them. What the user gave up is not
    merged, and stays for the plan to record."""
    tensors = found.tensors
    if not has_adapter(tensors):
        return tensors, ()
    dropped = given_up(tensors, options.drop, found.prefix)
    settings = companion(checkpoint, "adapter_config.json")
    merged, notes = merge_dump(tensors.without(dropped), settings, str(checkpoint.path))
    return NamedTensors([*merged.values(), *(tensors[name] for name in dropped)]), notes
