"""Boxes as OFA writes them: four location bins x0 y0 x1 y1 of the resized image."""

import re
from collections.abc import Sequence

import torch

BIN = "<bin_{}>"
BIN_PATTERN = re.compile(r"<bin_(\d+)>")


def quantize_boxes(
    boxes: Sequence[Sequence[float]] | torch.Tensor,
    image_size: tuple[int, int],
    resized: tuple[int, int],
    num_bins: int = 1000,
    max_image_size: int = 512,
) -> torch.Tensor:
    """Bins of `boxes`: int64 [boxes, 4], from 0 to num_bins - 1.

    Args:
        boxes: [boxes, 4], (x0, y0, x1, y1) in pixels of the image as it was before resizing.
        image_size: (width, height) of that image, as PIL's `Image.size`.
        resized: (width, height) of `pixel_values`.
        max_image_size: pixels of the resized image that all bins together span, whatever its own size.

    The original's arithmetic, in float32 and in its order (utils/transforms.py, refcoco_dataset.py). A box that leaves
    the image is clipped to it, where the original would have written a bin that does not exist.
    """
    pixels = _boxes(boxes)
    scaled = pixels * torch.tensor(_ratios(image_size, resized)) / max_image_size
    return (scaled * (num_bins - 1)).round().clamp(0, num_bins - 1).long()


def dequantize_boxes(
    bins: Sequence[Sequence[int]] | torch.Tensor,
    image_size: tuple[int, int],
    resized: tuple[int, int],
    num_bins: int = 1000,
    max_image_size: int = 512,
) -> torch.Tensor:
    """Boxes of `bins` [boxes, 4] in pixels of the image before resizing: float32 [boxes, 4], within the image.

    The inverse of `quantize_boxes`, exact to half a bin.
    """
    scaled = _boxes(bins) / (num_bins - 1) * max_image_size
    pixels = scaled / torch.tensor(_ratios(image_size, resized))
    return torch.minimum(pixels.clamp(min=0), torch.tensor(image_size * 2, dtype=torch.float32))


def parse_bins(text: str) -> list[list[int]]:
    """Every four bins in a row that `text` holds, whatever stands between them."""
    bins = [int(bin_) for bin_ in BIN_PATTERN.findall(text)]
    return [bins[start : start + 4] for start in range(0, len(bins) - 3, 4)]


def parse_regions(text: str) -> list[tuple[list[int], str]]:
    """(four bins, label) of every region of a detection answer: `<bin_…> <bin_…> <bin_…> <bin_…> label`, repeated."""
    four = rf"((?:{BIN_PATTERN.pattern}\s*){{4}})"
    regions = re.finditer(four + r"([^<]*)", text)
    return [(parse_bins(region.group(1))[0], region.group(region.lastindex or 0).strip()) for region in regions]


def _boxes(values: Sequence[Sequence[float]] | torch.Tensor) -> torch.Tensor:
    boxes = torch.as_tensor(values, dtype=torch.float32)
    if boxes.ndim == 1 and boxes.numel() == 4:
        boxes = boxes[None]
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"Expected boxes [boxes, 4] (x0, y0, x1, y1), found the shape {list(boxes.shape)}.")
    return boxes


def _ratios(image_size: tuple[int, int], resized: tuple[int, int]) -> list[float]:
    if len(image_size) != 2 or min(image_size) <= 0:
        raise ValueError(f"Expected image_size as (width, height) in pixels, found {image_size}.")
    return [float(new) / float(old) for new, old in zip(resized, image_size)] * 2


__all__ = ["dequantize_boxes", "parse_bins", "parse_regions", "quantize_boxes"]
