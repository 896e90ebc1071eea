"""The BLIP-2 family: which checkpoints are LAVIS's, and what they and their two companions mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from weightport.checkpoints import TensorRef
from weightport.checkpoints.sources import MAIN, Sources
from weightport.converters.family import OriginalForm, SourceModel
from weightport.converters.rules import RuleTable
from weightport.errors import ConfigurationError, UsageError
from weightport.families.blip2 import configuration, layouts, sources
from weightport.families.blip2.layouts import LANGUAGE, Kind, Tower
from weightport.families.blip2.options import Blip2Options
from weightport.families.blip2.rules import PositionTable, blip2_rules

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from weightport.converters.native import NativeTensors
    from weightport.converters.plan import Plan
    from weightport.converters.processor import ImageUse, Processor
    from weightport.families.blip2.tokenizers import SpecialIds

LAYOUTS: Mapping[Kind, str] = {"opt": "OPT", "t5": "T5", "itm": "stage 1"}
HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.shared.weight"


def kind_of(config: Any) -> Kind:
    """The kind of model that a native configuration is of."""
    if config.qformer_config.use_qformer_text_input:
        return "itm"
    return cast("Kind", config.text_config.model_type)


def tower_of(config: Any) -> Tower:
    """The vision encoder that a native configuration is of."""
    return "clip" if config.vision_config.model_type == "clip_vision_model" else "eva"


class Blip2Conversion:
    """Files that LAVIS wrote: released ones, and those of its trainer."""

    name = "blip2"
    title = "BLIP-2"
    original_form: OriginalForm = "torch"
    frozen: Mapping[str, str] = dict.fromkeys(
        LANGUAGE.values(), "the language model, which LAVIS takes from its own folder and does not train"
    )

    def recognises(self, names: Mapping[str, TensorRef]) -> bool:
        return layouts.is_blip2(names)

    def read(self, given: Sources, options: Blip2Options) -> SourceModel:
        """The model in its sources. Raises WeightportError naming what does not fit."""
        found = layouts.locate(given.main)
        whole = sources.gather(given, found)
        tensors = whole.combined.tensors
        vision = configuration.read_vision(tensors, found, options)
        qformer = configuration.read_qformer(tensors, options, _bert(options))
        if whole.embedding is not None:
            folder = str(given[sources.LLM].path)
            configuration.check_projection(tensors, found.kind, whole.embedding.shape[1], folder)
        rows = whole.embedding.shape[0] if whole.embedding is not None else qformer.vocabulary
        special = _special_ids(found.kind, rows, given, options)
        exact = options.exact or vision.tower == "clip"
        if options.portable and not exact:
            raise UsageError(
                "--portable: this model becomes transformers' own class, which needs no code beside it. Leave the "
                "option out, or give --exact, which writes weightport's own class."
            )
        config = configuration.native_config(found.kind, vision, qformer, whole.language_config, special, exact=exact)
        surplus = {
            name: "a block of the file that LAVIS does not build"
            for name in tensors
            if name.startswith(vision.surplus)
        }
        rounded = options.llm_dtype == "bf16-as-lavis"
        return SourceModel(
            family=self.name,
            layout=LAYOUTS[found.kind],
            title=_title(self.title, found, vision.image_size),
            tensors=tensors.without(surplus),
            rules=blip2_rules(
                found.kind, vision.tower, PositionTable(vision.grid, vision.target_grid), rounded=rounded
            ),
            config=config,
            origins=whole.combined.origins,
            sections={MAIN: found.section},
            unused={**whole.unused, **surplus},
            options={**found.settings, "llm_dtype": options.llm_dtype},
            unread=found.unread,
            notes=_notes(vision, exact=exact),
        )

    def targets(self, config: PreTrainedConfig) -> NativeTensors:
        """What the native class loads; of T5 also the head, which is no copy of the embedding here."""
        from weightport.converters.native import NativeTensors, loadable_tensors
        from weightport.families.blip2.companions import architecture

        kind = kind_of(config)
        native = loadable_tensors(architecture(config), config)
        if kind != "t5" or HEAD in native.shapes:
            return native
        return NativeTensors({**native.shapes, HEAD: native.shapes[EMBEDDING]}, native.buffers)

    def build_processor(self, model: SourceModel, given: Sources, options: Blip2Options) -> Processor | None:
        """Blip2Processor; None where none is asked for."""
        from weightport.families.blip2.companions import build_processor

        return build_processor(kind_of(model.config), model, given, options)

    def image_use(self, config: PreTrainedConfig, height: int, width: int) -> ImageUse:
        """Patches of a picture; the queries' vectors take the places of <image> tokens."""
        from weightport.converters.processor import ImageUse

        vision: Any = config.vision_config
        limit = vision.image_size // vision.patch_size
        queries: Any = config.num_query_tokens
        return ImageUse(height // vision.patch_size, width // vision.patch_size, limit, queries)

    def write_companions(self, model: SourceModel, plan: Plan, folder: Path, options: Blip2Options) -> None:
        """Write config.json, generation_config.json and, for --portable, the model's code into `folder`."""
        from weightport.families.blip2.companions import write

        write(kind_of(model.config), model, plan, folder, portable=options.portable)

    def rules_of(self, config: PreTrainedConfig, layout: str) -> RuleTable:
        """The rule table of a converted model. LAVIS reads a vision encoder of the model's own image size, so that
        none is resized on the way back."""
        return blip2_rules(kind_of(config), tower_of(config))

    def original_document(self, config: PreTrainedConfig, options: Mapping[str, Any], model: Any) -> Any:
        """What LAVIS loads, with its configuration's section of the model as far as it was kept."""
        kept = {key: value for key, value in options.items() if key != "llm_dtype"}
        return {"model": model, "config": {"model": kept}}

    def write_original_companions(
        self, directory: Path, config: PreTrainedConfig, options: Mapping[str, Any], folder: Path
    ) -> None:
        """One file holds everything that was trained."""


def _bert(options: Blip2Options) -> Mapping[str, Any]:
    from weightport.families.blip2.tokenizers import configuration_in, folder_of

    if options.qformer_tokenizer is None:
        return {}
    return configuration_in(folder_of(options.qformer_tokenizer, "--qformer-tokenizer"))


def _special_ids(kind: Kind, rows: int, given: Sources, options: Blip2Options) -> SpecialIds:
    from weightport.families.blip2.companions import vocabulary_folder
    from weightport.families.blip2.tokenizers import RELEASED, load_tokenizer, special_ids

    found = vocabulary_folder(kind, given, options)
    if found is not None:
        folder, _ = found
        return special_ids(kind, load_tokenizer(kind, folder), rows, folder)
    if (kind, rows) not in RELEASED:
        raise ConfigurationError(
            f"An embedding of {rows} rows is of no release: only the tokenizer tells the ids of <image> and of the "
            "end. Leave out --vocab none."
        )
    return RELEASED[kind, rows]


def _title(family: str, found: layouts.Found, image_size: int) -> str:
    with_what = {"opt": "with OPT", "t5": "with Flan-T5", "itm": "for image-text retrieval"}[found.kind]
    return f"{family} {with_what} at {image_size} px"


def _notes(vision: configuration.VisionSizes, *, exact: bool) -> tuple[str, ...]:
    notes = []
    if vision.image_size % vision.patch:
        notes.append(
            f"Pictures of {vision.image_size} px are no whole number of patches of {vision.patch} px; the model takes "
            f"{vision.target_grid * vision.patch} px."
        )
    if vision.grid != vision.target_grid:
        notes.append(
            f"The vision encoder's positions are resized from {vision.grid}² to {vision.target_grid}², as LAVIS does."
        )
    if not exact:
        notes.append(
            "transformers has one epsilon for all norms of the vision encoder: that of the last one is "
            f"{configuration.VISION_EPS:g} instead of {configuration.LN_VISION_EPS:g}, which changes logits by about "
            "1e-5. --exact writes weightport's own class, which has both."
        )
    return tuple(notes)


CONVERSION = Blip2Conversion()
