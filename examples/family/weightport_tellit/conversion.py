"""Tellit checkpoints: where the model is in the file, its configuration, and what stands beside the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightport.checkpoints import TensorRef
from weightport.checkpoints.sources import MAIN, Sources
from weightport.converters.family import OriginalForm, SourceModel
from weightport.converters.native import NativeTensors, loadable_tensors
from weightport.converters.processor import ImageUse, Processor
from weightport.converters.rules import RuleTable
from weightport.errors import ConfigurationError
from weightport.tokenizers.provenance import Provenance, VocabularyFile
from weightport_tellit.options import TellitOptions
from weightport_tellit.rules import tellit_rules

if TYPE_CHECKING:
    from transformers import GitConfig

    from weightport.converters.plan import Plan
    from weightport.writing.outgoing import Outgoing

_MARK = "model.text.attn_norms"
# What the file says of sizes that show in no shape, beside those that do.
_HEADS = ("image_heads", "heads")


class TellitConversion:
    """The files that Tellit's trainer saves: {"sizes": …, "words": …, "model": state dict}."""

    name = "tellit"
    title = "Tellit"
    original_form: OriginalForm = "torch"

    def recognises(self, names: Mapping[str, TensorRef]) -> bool:
        return _MARK in names

    def read(self, sources: Sources, options: TellitOptions) -> SourceModel:
        checkpoint = sources.main
        document = checkpoint.document if isinstance(checkpoint.document, Mapping) else {}
        sizes, words = document.get("sizes"), document.get("words")
        if not isinstance(sizes, Mapping) or not all(isinstance(sizes.get(name), int) for name in _HEADS):
            raise ConfigurationError(f"{checkpoint.path} does not say how many heads the model has (sizes).")
        tensors = checkpoint.section("model")
        config = _config(tensors, sizes)
        if not isinstance(words, list) or len(words) != config.vocab_size:
            raise ConfigurationError(
                f"{checkpoint.path} has words for {len(words or ())} of {config.vocab_size} rows of the embedding."
            )
        return SourceModel(
            family=self.name,
            layout="tellit",
            title=f"{self.title} of width {config.hidden_size}",
            tensors=tensors,
            rules=tellit_rules(config),
            config=config,
            sections={MAIN: "model"},
            options={"sizes": dict(sizes), "words": list(map(str, words))},
        )

    def targets(self, config: GitConfig) -> NativeTensors:
        from transformers import GitForCausalLM

        return loadable_tensors(GitForCausalLM, config)

    def build_processor(self, model: SourceModel, sources: Sources, options: TellitOptions) -> Processor | None:
        if not options.processor:
            return None
        words = "\n".join(model.options["words"]).encode()
        content = VocabularyFile("words", hashlib.sha256(words).hexdigest(), origin=None)
        made = _processor(model, lower_case=options.lower_case)
        return Processor(made, Provenance(sources.main.path.name, (content,)))

    def image_use(self, config: GitConfig, height: int, width: int) -> ImageUse:
        vision = config.vision_config
        rows, columns = height // vision.patch_size, width // vision.patch_size
        return ImageUse(rows, columns, vision.image_size // vision.patch_size, placeholders=0)

    def write_companions(self, model: SourceModel, plan: Plan, folder: Path, options: TellitOptions) -> None:
        config: Any = model.config
        config.architectures = ["GitForCausalLM"]
        config.dtype = plan.dtype
        config.save_pretrained(folder)

    def rules_of(self, config: GitConfig, layout: str) -> RuleTable:
        return tellit_rules(config)

    def original_document(
        self, config: GitConfig, options: Mapping[str, Any], model: Mapping[str, Outgoing]
    ) -> Mapping[str, Any]:
        return {"sizes": options.get("sizes"), "words": options.get("words"), "model": model}

    def write_original_companions(
        self, directory: Path, config: GitConfig, options: Mapping[str, Any], folder: Path
    ) -> None:
        """One file holds everything."""


CONVERSION = TellitConversion()


def _config(tensors: Mapping[str, TensorRef], sizes: Mapping[str, int]) -> GitConfig:
    from transformers import GitConfig

    patches, positions = tensors["image.patches.weight"].shape, tensors["image.pos"].shape
    words, text = tensors["text.tokens.weight"].shape, tensors["text.positions.weight"].shape
    layers = sum(name.startswith("image.blocks.") and name.endswith(".norm1.weight") for name in tensors)
    vision = {
        "hidden_size": patches[0],
        "patch_size": patches[-1],
        "image_size": round((positions[1] - 1) ** 0.5) * patches[-1],
        "intermediate_size": 4 * patches[0],
        "num_hidden_layers": layers,
        "num_attention_heads": sizes["image_heads"],
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    return GitConfig(
        vision_config=vision,
        vocab_size=words[0],
        hidden_size=words[1],
        intermediate_size=4 * words[1],
        num_hidden_layers=tensors["text.attn_norms"].shape[0],
        num_attention_heads=sizes["heads"],
        max_position_embeddings=text[0],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        tie_word_embeddings=False,
    )


def _processor(model: SourceModel, *, lower_case: bool) -> Any:
    from transformers import BertTokenizer, GitProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = model.config.vision_config.image_size
    words = {word: place for place, word in enumerate(model.options["words"])}
    # Tellit has no token for masking; BERT's tokenizer would add one.
    tokenizer = BertTokenizer(
        vocab=words, do_lower_case=lower_case, mask_token="[UNK]", model_input_names=["input_ids", "attention_mask"]
    )
    size = {"height": side, "width": side}
    images = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    return GitProcessor(images, tokenizer)
