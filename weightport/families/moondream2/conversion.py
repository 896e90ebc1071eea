"""The moondream2 family: which checkpoints are moondream2's, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightport.checkpoints import TensorRef
from weightport.checkpoints.sources import MAIN, Sources
from weightport.converters.family import OriginalForm, SourceModel
from weightport.converters.rules import RuleTable
from weightport.errors import WeightportError
from weightport.families.moondream2 import companions, configuration, layouts
from weightport.families.moondream2.options import MoondreamOptions
from weightport.families.moondream2.revisions import UNDECIDED, Decision, Evidence, Keys, decide
from weightport.families.moondream2.rules import moondream_rules
from weightport.families.moondream2.variants import MergedVariant, merge_variant

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from weightport.checkpoints import Checkpoint
    from weightport.converters.native import NativeTensors
    from weightport.converters.plan import Plan
    from weightport.converters.processor import ImageUse, Processor

VARIANT = "variant"
"""The source beside the checkpoint."""
RELEASED_IMAGE_ID = 50295
"""The first id behind the released tokenizer of 2024, where no tokenizer tells."""


class MoondreamConversion:
    """Folders and files of every dated revision, and what the project's training scripts save."""

    name = "moondream2"
    title = "moondream2"
    original_form: OriginalForm = "folder"

    def recognises(self, names: Mapping[str, TensorRef]) -> bool:
        return layouts.is_moondream2(names)

    def read(self, sources: Sources, options: MoondreamOptions) -> SourceModel:
        """The model in the checkpoint. Raises WeightportError naming what does not fit."""
        checkpoint = sources.main
        found = layouts.locate(checkpoint)
        beside = companions.read_beside(checkpoint)
        sizes = configuration.read_sizes(found.tensors, found.keys)
        variant = None
        if VARIANT in sources:
            variant = merge_variant(found, sources[VARIANT], options.dtype)
            found = replace(found, tensors=variant.tensors)
            beside = replace(beside, config=configuration.with_mlp(beside.config, sizes.mlp, variant.grown))
            sizes = replace(sizes, mlp=sizes.mlp + variant.grown)
        region = configuration.region_of(found.tensors)
        decision = decide(
            Evidence(
                keys=found.keys,
                merge=configuration.merge_of(sizes, found.keys, region),
                region=region,
                config=beside.config,
                code=beside.code,
                has_new_tokens=companions.has_new_tokens(checkpoint),
            ),
            options.revision,
        )
        revision = decision.revision
        source, note = companions.vocabulary_source(checkpoint, revision, options)
        image_id, end, end_ids, added = _tokens(source, sizes.rows, revision.end_text)
        special = companions.special_ids(revision, beside.config, end, sizes.rows)
        reasoning = companions.reasoning_config(revision, beside.config, sizes.rows)
        config = configuration.native_config(
            sizes, beside.config, found.tensors, revision, special, image_id, reasoning
        )
        merged = variant.note if variant is not None else None
        missing = (
            "There is no tokenizer beside the weights: the directory has no processor. --vocab names one."
            if source is None and options.vocabulary is None
            else None
        )
        return SourceModel(
            family=self.name,
            layout=found.keys,
            title=f"{self.title} {revision.name}{_size(sizes)}{' with a variant' if variant else ''}",
            tensors=found.tensors,
            rules=moondream_rules(config, found.keys),
            config=config,
            sections={MAIN: found.prefix},
            options={
                "revision": revision.name,
                "files": companions.source_files(checkpoint) | _config_of(beside, variant),
                "image_token_added": added,
                "end_ids": end_ids,
            },
            unused={} if variant is None else dict.fromkeys(sources[VARIANT], "merged into the tensors of the model"),
            notes=tuple(each for each in (_because(decision), merged, note, missing) if each is not None),
        )

    def targets(self, config: PreTrainedConfig) -> NativeTensors:
        """What MoondreamForConditionalGeneration loads."""
        from weightport.converters.native import loadable_tensors
        from weightport.modeling.moondream.modeling_moondream import MoondreamForConditionalGeneration

        return loadable_tensors(MoondreamForConditionalGeneration, config)

    def build_processor(self, model: SourceModel, sources: Sources, options: MoondreamOptions) -> Processor | None:
        """MoondreamProcessor; None without a tokenizer."""
        return companions.build_processor(model, sources.main, options)

    def image_use(self, config: PreTrainedConfig, height: int, width: int) -> ImageUse:
        """Patches of one view; further views are averaged to the same grid."""
        from weightport.converters.processor import ImageUse

        vision: Any = config.vision_config
        rows, columns = height // vision.patch_size, width // vision.patch_size
        return ImageUse(rows, columns, vision.image_size // vision.patch_size, rows * columns)

    def write_companions(self, model: SourceModel, plan: Plan, folder: Path, options: MoondreamOptions) -> None:
        """Write config.json and generation_config.json into `folder`."""
        companions.write(model, plan, folder, portable=options.portable)

    def rules_of(self, config: PreTrainedConfig, layout: str) -> RuleTable:
        """The rule table of a converted model: that of its record, else of what its configuration is like."""
        keys: Keys = "2025" if config.feature_merge == "tiles" else "2024"
        return moondream_rules(config, layout if layout in layouts.MARKS else keys)  # type: ignore[arg-type]

    def original_document(self, config: PreTrainedConfig, options: Mapping[str, Any], model: Any) -> Any:
        """A .pt or .bin is the state dict itself."""
        return model

    def write_original_companions(
        self, directory: Path, config: PreTrainedConfig, options: Mapping[str, Any], folder: Path
    ) -> None:
        """Write config.json and tokenizer as the original's code reads them."""
        from weightport.families.moondream2.original import write_companions

        write_companions(directory, config, options, folder)


CONVERSION = MoondreamConversion()


def about(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Which revision a checkpoint is of, and why; or what keeps it from being converted."""
    options = MoondreamOptions(vocabulary=companions.NO_VOCABULARY, revision=UNDECIDED)
    try:
        return CONVERSION.read(Sources({MAIN: checkpoint}), options).notes
    except WeightportError as error:
        return (str(error),)


def _tokens(source: str | Path | None, rows: int, end_text: str | None) -> tuple[int, int | None, list[int], bool]:
    """(the id of `<image>`, of the end token, ids that end an answer, whether `<image>` is added to the tokenizer).

    Early revisions end an answer in words, any of whose pieces stops generation.
    """
    if source is None:
        return (RELEASED_IMAGE_ID if rows > RELEASED_IMAGE_ID else rows), None, [], True
    from weightport.families.moondream2.tokenizer import (
        END,
        IMAGE_TOKEN,
        build_tokenizer,
        check_fit,
        image_token_id,
        read_vocabulary,
    )

    vocabulary = read_vocabulary(source)
    check_fit(vocabulary, rows)
    image_id = image_token_id(vocabulary)
    ends = []
    if end_text is not None:
        ends = build_tokenizer(vocabulary, image_id, 0)(end_text, add_special_tokens=False)["input_ids"]
    return image_id, vocabulary.ids[END], ends, IMAGE_TOKEN not in vocabulary.ids


def _config_of(beside: companions.Beside, variant: MergedVariant | None) -> dict[str, Any]:
    """The config.json that fits a model with a variant, where there is one."""
    return {"config.json": dict(beside.config)} if variant is not None and beside.config else {}


def _size(sizes: configuration.Sizes) -> str:
    """What tells a model of other sizes than the released."""
    return "" if (sizes.width, sizes.vision_width) == (2048, 1152) else f" of width {sizes.width}"


def _because(decision: Decision) -> str:
    return f"Revision {decision.revision.name}: {decision.because}."
