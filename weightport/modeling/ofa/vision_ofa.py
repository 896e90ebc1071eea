"""Image towers of OFA: transformers' ResNet, cut after its third stage, or a small CLIP-like vision transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, ResNetModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.resnet.modeling_resnet import ResNetBottleNeckLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_ofa import OFAConfig, OFAVisionConfig
from .layers_ofa import OFADropPath, eager_attention_forward


class OFAFrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics, scale and shift are constants: buffers, never trained."""

    weight: torch.Tensor
    bias: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, num_features: int, eps: float):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # One multiplication and one addition, as the original computes it where gradients are wanted: float32 rounding
        # decides on which side of zero the following ReLU sees a value.
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return hidden_states * scale[:, None, None] + shift[:, None, None]


class OFAVisionAttention(nn.Module):
    """Multi-head attention between the patches of an image."""

    def __init__(self, config: OFAVisionConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_dropout
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.dropout if self.training else 0.0
        output, weights = attention_interface(
            self, query, key, value, None, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.out_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class OFAVisionLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer of the vision transformer."""

    def __init__(self, config: OFAVisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = OFAVisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states), **kwargs)[0]
        return hidden_states + self.fc2(self.activation_fn(self.fc1(self.layer_norm2(hidden_states))))


class OFAVisionModel(PreTrainedModel):
    """CLIP-like vision transformer without class token and without a final norm."""

    config_class = OFAVisionConfig
    config: OFAVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["OFAVisionLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: OFAVisionConfig):
        super().__init__(config)
        self.grid_size = config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False
        )
        # Row 0 belongs to CLIP's class token, which OFA dropped; the checkpoint still carries it.
        self.position_embedding = nn.Embedding(self.grid_size**2 + 1, config.hidden_size)
        self.pre_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList([OFAVisionLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    def _positions(self, rows: int, columns: int) -> torch.Tensor:
        table = self.position_embedding.weight[1:]
        if (rows, columns) == (self.grid_size, self.grid_size):
            return table
        grid = table.view(1, self.grid_size, self.grid_size, -1).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(grid, size=(rows, columns), mode="bilinear", align_corners=False)
        return grid.flatten(2)[0].transpose(0, 1)

    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutput:
        """Features [batch, hidden_size, rows, columns] of images [batch, channels, height, width]."""
        patches = self.patch_embedding(pixel_values)
        rows, columns = patches.shape[-2:]
        hidden_states = self.pre_layer_norm(patches.flatten(2).transpose(1, 2) + self._positions(rows, columns))
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states.transpose(1, 2).unflatten(2, (rows, columns)))


class OFAResNetModel(ResNetModel):
    """[`ResNetModel`]; having no attention, it follows whatever attention implementation the whole model uses."""

    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True


def build_vision_tower(config: OFAConfig) -> PreTrainedModel:
    """The image tower `config.vision_config` describes, with OFA's batch norms and stochastic depth if a ResNet.

    Both towers return features [batch, channels, rows, columns] as `last_hidden_state`; see `vision_channels`.
    """
    vision: Any = config.vision_config
    if vision.model_type == OFAVisionConfig.model_type:
        return OFAVisionModel(vision)
    tower = OFAResNetModel(vision)
    for parent, name, norm in list(batch_norms(tower)):
        norm.eps = config.batch_norm_eps
        if config.freeze_batch_norm:
            setattr(parent, name, OFAFrozenBatchNorm2d(norm.num_features, norm.eps))
    if config.resnet_drop_path_rate > 0.0:
        _add_drop_path(tower, config.resnet_drop_path_rate)
    for module in tower.modules():
        if isinstance(module, nn.ReLU):
            # What it is given is a batch norm's output or a sum, which nothing else reads.
            module.inplace = True
    return tower


def vision_channels(config: OFAConfig) -> int:
    """Number of channels of the image tower's features."""
    vision: Any = config.vision_config
    return vision.hidden_size if vision.model_type == OFAVisionConfig.model_type else vision.hidden_sizes[-1]


def batch_norms(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.BatchNorm2d]]:
    """Every trainable batch norm below `module`, with its parent and its name there."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                yield parent, name, child


def _add_drop_path(tower: ResNetModel, rate: float) -> None:
    """Stochastic depth on the branch of every bottleneck, rising linearly from 0 inside each stage."""
    encoder: Any = tower.encoder
    for stage in encoder.stages:
        bottlenecks = [layer for layer in stage.layers if isinstance(layer, ResNetBottleNeckLayer)]
        for bottleneck, layer_rate in zip(bottlenecks, torch.linspace(0, rate, len(bottlenecks), device="cpu")):
            bottleneck.layer.append(OFADropPath(layer_rate.item()))


__all__ = ["OFAVisionModel"]
