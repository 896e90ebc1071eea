"""A fairseq checkpoint around a state dict, in the flavour that every fairseq revision loads: `args` a Namespace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from weightport.families.ofa.configuration import OPTION_FACTS, RESNET_DEPTHS, SHAPE_FACTS
from weightport.writing.torch_archive import Instance

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from weightport.writing.outgoing import Outgoing


def document(config: PreTrainedConfig, options: Mapping[str, Any], model: Mapping[str, Outgoing]) -> dict[str, Any]:
    """What torch.save would be given. `options` are the record's (conversion.json, source.options), possibly empty."""
    return {
        "args": Instance("argparse", "Namespace", namespace(config, options)),
        "cfg": None,
        "model": model,
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "AdjustLabelSmoothedCrossEntropyCriterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {"best": None},
                "num_updates": 0,
            }
        ],
        "task_state": {},
        "extra_state": {"train_iterator": {"version": 2, "epoch": 1, "iterations_in_epoch": 0, "shuffle": True}},
        "last_optimizer_state": None,
    }


def namespace(config: PreTrainedConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """The flat options of a training run: those recorded at conversion, and the configuration's on top."""
    flat = {**options.get("task", {}), **options.get("model", {})}
    flat |= {fact.option: getattr(config, fact.field) for fact in SHAPE_FACTS}
    flat |= {fact.option: getattr(config, fact.field) for fact in OPTION_FACTS}
    flat |= {
        "no_scale_embedding": not config.scale_embedding,
        "activation_dropout": config.activation_dropout,
        "arch": flat.get("arch") or "ofa_base",
        "task": flat.get("task") or "caption",
        "criterion": "adjust_label_smoothed_cross_entropy",
        "bpe": flat.get("bpe") or ("bert" if options.get("language") == "zh" else "gpt2"),
        "resnet_type": _tower(config, flat.get("resnet_type")),
        "sync_bn": config.batch_norm_eps == 1e-3,
        "adapter": config.adapter_dim is not None,
        "adapter_dim": config.adapter_dim or 200,
        "freeze_resnet": bool(config.freeze_batch_norm),
        "code_image_size": config.code_image_size,
        "share_all_embeddings": config.share_all_embeddings,
        "share_decoder_input_output_embed": config.tie_word_embeddings,
        "decoder_embed_dim": config.d_model,
        "decoder_input_dim": config.d_model,
        "decoder_output_dim": config.d_model,
        "patch_image_size": config.image_size,
        "num_bins": config.num_bins,
        "code_dict_size": config.code_dict_size,
    }
    return flat


def _tower(config: PreTrainedConfig, recorded: str | None) -> str:
    vision = config.vision_config
    if vision.model_type == "ofa_vit":
        return recorded or "ViT-B/16"
    depths = tuple(vision.depths)
    if recorded is not None and RESNET_DEPTHS.get(recorded) == depths:
        return recorded
    return next((name for name, known in reversed(RESNET_DEPTHS.items()) if known == depths), "resnet101")
