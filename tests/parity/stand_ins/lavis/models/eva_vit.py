"""A vision encoder that is loaded as LAVIS loads it: whatever the file lacks stays random, and nobody is told."""

import torch
from torch import nn


def download_cached_file(url):
    raise RuntimeError("no network here: " + url)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        return x + self.fc(x)


class VisionTransformer(nn.Module):
    num_features = 6

    def __init__(self, img_size):
        super().__init__()
        self.patch_embed, self.blocks = nn.Conv2d(3, 6, 2, 2), nn.ModuleList([Block(6), Block(6)])
        self.pos_embed = nn.Parameter(torch.zeros(1, (img_size // 2) ** 2, 6))

    def forward(self, image):
        x = self.patch_embed(image).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x


def create_eva_vit_g(img_size, precision):
    model = VisionTransformer(img_size)
    stored = torch.load(download_cached_file("https://example.org/eva_vit_g.pth"), map_location="cpu")
    side = int(stored["pos_embed"].shape[1] ** 0.5)
    table = stored["pos_embed"].float().reshape(1, side, side, 6).permute(0, 3, 1, 2)
    table = nn.functional.interpolate(table, size=(img_size // 2, img_size // 2), mode="bicubic")
    model.load_state_dict(dict(stored, pos_embed=table.permute(0, 2, 3, 1).flatten(1, 2)), strict=False)
    return model.half() if precision == "fp16" else model
