"""Configuration of OFA (One For All) and OFA-CN, for transformers 5."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig

# The part of every OFA ResNet that does not depend on its depth: torchvision's v1.5 bottlenecks, cut after stage 3.
RESNET_TRUNK = {"embedding_size": 64, "hidden_sizes": [256, 512, 1024], "layer_type": "bottleneck"}
# `resnet18` and `resnet34` of OFA are bottleneck networks too (their BasicBlock is unreachable).
RESNET_DEPTHS = {
    "resnet18": [2, 2, 2],
    "resnet34": [3, 4, 6],
    "resnet50": [3, 4, 6],
    "resnet101": [3, 4, 23],
    "resnet152": [3, 8, 36],
}


@strict
class OFAVisionConfig(PreTrainedConfig):
    r"""Configuration of the CLIP-like vision transformer that OFA can use in place of a ResNet (`ViT-B/16`).

    It has no class token and no final norm. The defaults are OFA's `ViT-B/16`, of which nine layers are kept.

    Args:
        hidden_size (`int`, defaults to 768): width of a patch.
        intermediate_size (`int`, defaults to 3072): width of the feed-forward layers.
        num_hidden_layers (`int`, defaults to 9): number of transformer layers.
        num_attention_heads (`int`, defaults to 12): attention heads of a layer.
        num_channels (`int`, defaults to 3): channels of an image.
        image_size (`int`, defaults to 224): side in pixels the position embeddings were made for; they are resized
            bilinearly for any other image.
        patch_size (`int`, defaults to 16): side of a patch in pixels.
        hidden_act (`str`, defaults to `"quick_gelu"`): activation of the feed-forward layers.
        layer_norm_eps (`float`, defaults to 1e-5): epsilon of the layer norms.
        attention_dropout (`float`, defaults to 0.0): dropout of the attention probabilities.
        initializer_range (`float`, defaults to 0.02): standard deviation of newly initialised weights.
    """

    model_type = "ofa_vit"
    base_config_key = "vision_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 9
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float | int = 1e-5
    attention_dropout: float | int = 0.0
    initializer_range: float | int = 0.02


@strict
class OFAConfig(PreTrainedConfig):
    r"""Configuration of [`OFAModel`] and [`OFAForConditionalGeneration`].

    The defaults are OFA-base with the options that every released checkpoint was trained with.

    Args:
        vocab_size (`int`, defaults to 59457): tokens, image codes and location bins together (OFA-CN: 30325).
        d_model (`int`, defaults to 768): width of encoder and decoder.
        encoder_layers, decoder_layers (`int`, defaults to 6): number of layers.
        encoder_attention_heads, decoder_attention_heads (`int`, defaults to 12): attention heads of a layer.
        encoder_ffn_dim, decoder_ffn_dim (`int`, defaults to 3072): width of the feed-forward layers.
        max_position_embeddings (`int`, defaults to 1024): longest source text. The tables have two more rows, which
            the original carries without ever using them.
        decoder_max_position_embeddings (`int`, defaults to 1024): longest target.
        activation_function (`str`, defaults to `"gelu"`): a name of transformers, or fairseq's `gelu_fast`,
            `gelu_accurate`, `relu_squared`.
        dropout, attention_dropout, activation_dropout (`float`, defaults to 0.1, 0.0, 0.0): dropout of sub-layer
            outputs and embeddings, of attention probabilities, and after the activation.
        encoder_layerdrop, decoder_layerdrop (`float`, defaults to 0.0): probability of skipping a layer in training.
        encoder_drop_path_rate, decoder_drop_path_rate (`float`, defaults to 0.1): stochastic depth of the last layer,
            rising linearly from 0 at the first one.
        resnet_drop_path_rate (`float`, defaults to 0.0): the same inside every stage of the ResNet.
        token_bucket_size (`int`, defaults to 256): relative text distances are exact up to half of it, logarithmic
            beyond; tables have `2 * token_bucket_size - 1` rows.
        image_bucket_size (`int`, defaults to 42): largest number of patches along a side of an image.
        attn_scale_factor (`float`, defaults to 2.0): scores are scaled by `(head_dim * attn_scale_factor) ** -0.5`,
            because content and position terms are added.
        code_image_size (`int`, defaults to 128): side in pixels of a generated image; a code covers 8 x 8 pixels.
        scale_attn, scale_fc, scale_heads (`bool`, defaults to `True`): NormFormer's layer norm after attention, layer
            norm inside the feed-forward layer, and learned scale of each head.
        scale_resids (`bool`, defaults to `False`): learned scale of the residual branch around the feed-forward layer.
        layernorm_embedding, patch_layernorm_embedding, code_layernorm_embedding (`bool`, defaults to `True`): layer
            norm of the embedded text, image patches, and image codes.
        add_type_embedding (`bool`, defaults to `True`): learned embedding that tells text from patches.
        encoder_normalize_before, decoder_normalize_before (`bool`, defaults to `True`): pre-norm layers, with a layer
            norm after the last one.
        adapter_dim (`int`, *optional*): width of the bottleneck adapter behind every feed-forward layer (adapter
            tuning); none by default.
        entangle_position_embedding (`bool`, defaults to `False`): the encoder adds positions to its embeddings.
        disable_entangle (`bool`, defaults to `True`): unless set, the decoder adds positions to its embeddings,
            whatever `entangle_position_embedding` says (as the original does).
        scale_embedding (`bool`, defaults to `False`): embeddings are multiplied by `sqrt(d_model)`.
        interpolate_position (`bool`, defaults to `False`): images with more patches than an
            `orig_patch_image_size` one use resized position embeddings.
        orig_patch_image_size (`int`, defaults to 256): side in pixels of the image whose positions are resized.
        image_size (`int`, defaults to 480): side in pixels the checkpoint was trained with (for the image processor).
        num_bins (`int`, defaults to 1000): location tokens at the end of the vocabulary.
        code_dict_size (`int`, defaults to 8192): image-code tokens before the location tokens.
        vision_config (`dict` or `PreTrainedConfig`, defaults to OFA's ResNet-101): [`ResNetConfig`] (`model_type`
            `"resnet"`) or [`OFAVisionConfig`] (`"ofa_vit"`).
        batch_norm_eps (`float`, defaults to 1e-5): epsilon of the ResNet's batch norms (1e-3 if trained with sync_bn).
        freeze_batch_norm (`bool`, defaults to `False`): batch norms with constant statistics and constant scale.
        label_smoothing (`float`, defaults to 0.0): epsilon of the training loss.
        share_all_embeddings (`bool`, defaults to `True`): encoder and decoder share their token embeddings (only with
            `tie_word_embeddings`).
        tie_word_embeddings (`bool`, defaults to `True`): the output projection is the decoder's token embedding.
        init_std (`float`, defaults to 0.02): standard deviation of newly initialised weights.
    """

    model_type = "ofa"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="resnet",
            init_kwargs={**RESNET_TRUNK, "depths": RESNET_DEPTHS["resnet101"]},
        )
    }

    vocab_size: int = 59457
    d_model: int = 768
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_attention_heads: int = 12
    decoder_attention_heads: int = 12
    encoder_ffn_dim: int = 3072
    decoder_ffn_dim: int = 3072
    max_position_embeddings: int = 1024
    decoder_max_position_embeddings: int = 1024
    activation_function: str = "gelu"
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    encoder_layerdrop: float | int = 0.0
    decoder_layerdrop: float | int = 0.0
    encoder_drop_path_rate: float | int = 0.1
    decoder_drop_path_rate: float | int = 0.1
    resnet_drop_path_rate: float | int = 0.0
    token_bucket_size: int = 256
    image_bucket_size: int = 42
    attn_scale_factor: float | int = 2.0
    code_image_size: int = 128
    scale_attn: bool = True
    scale_fc: bool = True
    scale_heads: bool = True
    scale_resids: bool = False
    layernorm_embedding: bool = True
    patch_layernorm_embedding: bool = True
    code_layernorm_embedding: bool = True
    add_type_embedding: bool = True
    encoder_normalize_before: bool = True
    decoder_normalize_before: bool = True
    adapter_dim: int | None = None
    entangle_position_embedding: bool = False
    disable_entangle: bool = True
    scale_embedding: bool = False
    interpolate_position: bool = False
    orig_patch_image_size: int = 256
    image_size: int = 480
    num_bins: int = 1000
    code_dict_size: int = 8192
    vision_config: dict | PreTrainedConfig | None = None
    batch_norm_eps: float | int = 1e-5
    freeze_batch_norm: bool = False
    label_smoothing: float | int = 0.0
    share_all_embeddings: bool = True
    tie_word_embeddings: bool = True
    init_std: float | int = 0.02
    use_cache: bool = True
    is_encoder_decoder: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        if isinstance(self.vision_config, dict):
            self.vision_config = _vision_config(self.vision_config)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of the `@strict` validation: the sizes that have to fit each other."""
        for stack in ("encoder", "decoder"):
            heads = getattr(self, f"{stack}_attention_heads")
            if self.d_model % heads:
                raise ValueError(f"d_model ({self.d_model}) is not a multiple of {stack}_attention_heads ({heads})")


def _vision_config(values: dict) -> PreTrainedConfig:
    """The image tower's configuration; resolved here, so that it needs no registration of `ofa_vit`."""
    model_type = values.get("model_type", "resnet")
    if model_type == OFAVisionConfig.model_type:
        return OFAVisionConfig(**values)
    if model_type == "resnet":
        return AutoConfig.for_model(**{**RESNET_TRUNK, **values, "model_type": model_type})
    raise ValueError(f"vision_config has model_type {model_type!r}; an OFA image tower is 'resnet' or 'ofa_vit'")


__all__ = ["OFAConfig", "OFAVisionConfig"]
