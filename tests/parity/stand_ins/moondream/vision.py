"""Crops normalised in bfloat16, and a vision encoder whose layers are no modules that are called."""

import numpy as np
import torch

from .layers import layer_norm


def prepare_crops(image, config, device):
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB").resize((4, 4)))] * 2))
    return pixels.permute(0, 3, 1, 2).to(device=device, dtype=torch.bfloat16).div_(255.0).sub_(0.5).div_(0.5), (1, 1)


def vision_encoder(crops, w, config):
    x = w["patch_emb"](crops.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(len(crops), 4, 12))
    x = x + w.pos_emb
    for block in w["blocks"]:
        x = x + block["fc"](layer_norm(x, block["ln1"]))
    return layer_norm(x, w["post_ln"])


def vision_projection(whole, tiles, w, config):
    return w["proj"](torch.cat([whole, tiles], dim=-1))
