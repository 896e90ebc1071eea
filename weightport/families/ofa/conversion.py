"""The OFA family: which checkpoints are OFA's, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightport.checkpoints import Checkpoint, TensorRef, sections
from weightport.checkpoints.sources import MAIN, Sources
from weightport.converters.dropping import given_up
from weightport.converters.family import OriginalForm, SourceModel
from weightport.converters.rules import RuleTable
from weightport.errors import ConfigurationError
from weightport.families.ofa import configuration, layouts
from weightport.families.ofa.options import OFAOptions
from weightport.families.ofa.rules import fairseq_rules, port_rules

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from weightport.converters.native import NativeTensors
    from weightport.converters.plan import Plan
    from weightport.converters.processor import ImageUse, Processor
    from weightport.writing.outgoing import Outgoing

# Options that are kept in conversion.json: what the architecture and the task are. The rest is the trainer's own
# business (paths, machines, schedules) and does not belong into a published directory.
_KEPT_MODEL_OPTIONS = (
    "arch", "_name", "vocab_size", "label_smoothing", "sync_bn", "freeze_resnet", "resnet_type", "code_image_size",
    "share_all_embeddings", "share_decoder_input_output_embed", "no_scale_embedding", "relu_dropout",
    "activation_dropout", "encoder_embed_dim", "decoder_embed_dim", "decoder_input_dim", "decoder_output_dim",
    "encoder_learned_pos", "decoder_learned_pos", "pooler_activation_fn", "pooler_dropout", "pooler_classifier",
)  # fmt: skip
_KEPT_TASK_OPTIONS = (
    "task", "bpe", "num_bins", "code_dict_size", "patch_image_size", "orig_patch_image_size", "max_src_length",
    "max_tgt_length", "max_image_size", "imagenet_default_mean_and_std", "constraint_range", "prompt_type",
    "eval_args", "selected_cols", "max_source_positions", "max_target_positions",
)  # fmt: skip

PUBLISHED_IMAGE_SIZE = 480
"""Side of a picture in pixels in OFA's published scripts of captioning, VQA and classification."""
PATCH_SIZE = 16

_EXTRAS = {
    r"classification_heads.": "a classification head, which no forward pass of the generative model uses; --drop "
    "'classification_heads.**' leaves it out",
    r"_prompt_encoder.": "prefix tuning, which adds keys and values to every layer and has no native counterpart",
    r"phone": "speech input (MMSpeech), which is another model",
    r"audio": "speech input (MMSpeech), which is another model",
}


class OFAConversion:
    """fairseq checkpoints of OFA and OFA-CN, and directories of the existing transformers ports."""

    name = "ofa"
    title = "OFA"
    original_form: OriginalForm = "torch"

    def recognises(self, names: Mapping[str, TensorRef]) -> bool:
        return layouts.is_ofa(names)

    def read(self, sources: Sources, options: OFAOptions) -> SourceModel:
        """The model in the checkpoint. Raises WeightportError naming what does not fit."""
        checkpoint = sources.main
        found = layouts.locate(checkpoint, ema=options.ema)
        _refuse_extras(found.tensors, options, found.section)
        tensors = found.tensors
        model_options, task = found.model_options, found.task_options
        shapes = configuration.shape_values(tensors)
        values = {**shapes, **configuration.option_values(model_options)}
        if model_options is not None:
            configuration.check_options(shapes, model_options)
        values |= configuration.vision_values(tensors, model_options)
        values["adapter_dim"] = configuration.adapter_width(tensors)
        values["code_image_size"] = configuration.code_image_size(tensors, model_options)
        values |= _tying(tensors, model_options)
        language = _language(values["vocab_size"], task)
        values |= _task_values(task)
        assumed = _assumed_image_size(values)
        values |= assumed

        from weightport.modeling.ofa.configuration_ofa import OFAConfig

        config = OFAConfig(**values)
        return SourceModel(
            family=self.name,
            layout=found.layout,
            title=f"{'OFA-CN' if language == 'zh' else 'OFA'} {configuration.size_name(values)}",
            tensors=tensors,
            rules=port_rules(config) if found.layout == layouts.PORT else fairseq_rules(config),
            config=config,
            sections={MAIN: found.section},
            options={
                "model": _kept(model_options or {}, (*_KEPT_MODEL_OPTIONS, *_fact_options())),
                "task": _kept(task, _KEPT_TASK_OPTIONS),
                "language": language,
                "section": found.section,
            },
            unread=_unread(checkpoint, found.section),
            notes=(*_notes(found, options), *_image_note(assumed)),
        )

    def targets(self, config: PreTrainedConfig) -> NativeTensors:
        """What OFAForConditionalGeneration loads."""
        from weightport.converters.native import loadable_tensors
        from weightport.modeling.ofa.modeling_ofa import OFAForConditionalGeneration

        return loadable_tensors(OFAForConditionalGeneration, config)

    def build_processor(self, model: SourceModel, sources: Sources, options: OFAOptions) -> Processor | None:
        """OFAProcessor with the tokenizer of the vocabulary; None for --vocab none."""
        from weightport.families.ofa.companions import build_processor

        return build_processor(model, sources.main, options)

    def image_use(self, config: PreTrainedConfig, height: int, width: int) -> ImageUse:
        """Patches of the image tower; they stand before the text without placeholders."""
        from weightport.converters.processor import ImageUse
        from weightport.modeling.ofa.modeling_ofa import PATCH_STRIDE

        # The vision transformer leaves out a last patch that is not whole, the ResNet pads it.
        spare = 0 if config.vision_config.model_type == "ofa_vit" else PATCH_STRIDE - 1
        rows, columns = ((side + spare) // PATCH_STRIDE for side in (height, width))
        return ImageUse(rows, columns, config.image_bucket_size, placeholders=0)

    def write_companions(self, model: SourceModel, plan: Plan, folder: Path, options: OFAOptions) -> None:
        """Write config.json, generation_config.json and, for --portable, the model's code into `folder`."""
        from weightport.families.ofa.companions import write

        write(model, plan, folder, options)

    def rules_of(self, config: PreTrainedConfig, layout: str) -> RuleTable:
        """The rule table of a converted model; exports are always fairseq's layout."""
        return fairseq_rules(config)

    def original_document(
        self, config: PreTrainedConfig, options: Mapping[str, Any], model: Mapping[str, Outgoing]
    ) -> Mapping[str, Any]:
        """A fairseq checkpoint in the flavour with `args`, which every fairseq revision loads."""
        from weightport.families.ofa.original import document

        return document(config, options, model)

    def write_original_companions(
        self, directory: Path, config: PreTrainedConfig, options: Mapping[str, Any], folder: Path
    ) -> None:
        """A fairseq checkpoint is one file: nothing stands beside it."""


CONVERSION = OFAConversion()


def _refuse_extras(tensors: Mapping[str, TensorRef], options: OFAOptions, section: str) -> None:
    dropped = given_up(tensors, options.drop, section)
    for name in tensors:
        if name in dropped:
            continue
        for mark, what in _EXTRAS.items():
            if mark in name:
                same = [other for other in tensors if mark in other]
                raise ConfigurationError(
                    f"The checkpoint holds {len(same)} tensors of {what}:\n      "
                    + "\n      ".join(f"{other} {list(tensors[other].shape)}" for other in same[:8])
                    + (f"\n      … and {len(same) - 8} more" if len(same) > 8 else "")
                )


def _tying(tensors: Mapping[str, TensorRef], options: Mapping[str, Any] | None) -> dict[str, bool]:
    """Which embedding tables are one matrix: what the options say, and by OFA's defaults all three."""
    stated = options or {}
    shared = bool(stated.get("share_all_embeddings", True))
    tied = shared or bool(stated.get("share_decoder_input_output_embed", True))
    if "decoder.embed_tokens.weight" not in tensors:
        shared = True
    return {"share_all_embeddings": shared, "tie_word_embeddings": tied}


def _language(rows: int, task: Mapping[str, Any]) -> str:
    """zh or en: the tokenizer that training used, else the vocabulary's size (facts: CN 30325 rows, EN 59457)."""
    bpe = task.get("bpe")
    if bpe in ("bert", "gpt2"):
        return "zh" if bpe == "bert" and rows != 59457 else "en"
    return "zh" if rows == 30325 else "en"


def _task_values(task: Mapping[str, Any]) -> dict[str, Any]:
    stated = {"image_size": "patch_image_size", "num_bins": "num_bins", "code_dict_size": "code_dict_size"}
    return {field: int(task[option]) for field, option in stated.items() if task.get(option) is not None}


def _assumed_image_size(values: Mapping[str, Any]) -> dict[str, int]:
    """The side of pictures in pixels where no option tells it: that of OFA's fine-tunes, as far as positions go."""
    if "image_size" in values:
        return {}
    return {"image_size": min(PUBLISHED_IMAGE_SIZE, PATCH_SIZE * values["image_bucket_size"])}


def _image_note(assumed: Mapping[str, int]) -> tuple[str, ...]:
    if not assumed:
        return ()
    return (
        f"Nothing tells the size of the checkpoint's pictures: {assumed['image_size']} pixels are assumed "
        "(image_processor.size in processor_config.json).",
    )


def _fact_options() -> tuple[str, ...]:
    return tuple(
        fact.option for fact in (*configuration.SHAPE_FACTS, *configuration.OPTION_FACTS) if fact.option is not None
    )


def _kept(options: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {
        name: options[name]
        for name in dict.fromkeys(names)
        if name in options and isinstance(options[name], (bool, int, float, str, type(None)))
    }


def _unread(checkpoint: Checkpoint, section: str) -> dict[str, int]:
    """Bytes of the sections that are not the model: optimizer state, averaged weights."""
    taken = section.partition(".")[0]
    return {found.name: found.nbytes for found in sections(checkpoint) if found.name != taken} if section else {}


def _notes(found: layouts.Found, options: OFAOptions) -> tuple[str, ...]:
    notes = []
    if found.has_ema and not options.ema:
        notes.append(
            "The file also holds averaged weights (EMA), with which its training was evaluated; "
            "--ema converts those instead."
        )
    if options.ema:
        notes.append("Converted the averaged weights (extra_state.ema), as the original's --ema-eval does.")
    if found.model_options is None:
        notes.append(
            "The file holds no training options; those of OFA's published training scripts are assumed "
            "where shapes do not tell."
        )
    return tuple(notes)
