"""Image processor of moondream2, for transformers 5. Pillow, NumPy and torch only: torchvision is never needed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# The longer side from which the revisions of crops look at a picture more than once.
SMALL_IMAGE_THRESHOLD = 512


class MoondreamImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    views (`str`, *optional*, defaults to `self.views`):
        `"none"`: one view of the whole picture. `"grid"`: up to 2 x 2 crops beside it, without overlap. `"tiles"`: up
        to `max_tiles` crops beside it, which overlap.
    max_tiles (`int`, *optional*, defaults to `self.max_tiles`):
        Tiles of a picture at most.
    """

    views: str | None
    max_tiles: int | None


def crop_grid(height: int, width: int, side: int, threshold: int = SMALL_IMAGE_THRESHOLD) -> tuple[int, int]:
    """(rows, columns) of crops of `side` pixels that a picture is resized to in 2024-05-20 to 2024-08-26; (1, 1) for
    a single view.

    The shape nearest in aspect ratio, then in size, the first of equals. As the original's code has it, sizes compare
    a shape's height with the picture's width and its width with the picture's height.
    """
    if max(height, width) < threshold:
        return 1, 1
    shapes = [(rows, columns) for rows in (1, 2) for columns in (1, 2)]

    def distance(shape: tuple[int, int]) -> tuple[float, int]:
        rows, columns = shape
        return (
            abs(columns / rows - width / height),
            abs(rows * side - width) + abs(columns * side - height),
        )

    return min(shapes, key=distance)


def tile_grid(height: int, width: int, window: int, most: int) -> tuple[int, int]:
    """(rows, columns) of tiles for a picture of these sizes less the outer margins, as in 2025.

    A side that fits into one `window` makes a single tile. Where covering the picture takes more than `most` tiles,
    both counts shrink by the same factor; else there are as many as `most` allows at the picture's aspect ratio.
    """
    if height <= window or width <= window:
        return 1, 1
    least_rows, least_columns = math.ceil(height / window), math.ceil(width / window)
    if least_rows * least_columns > most:
        factor = math.sqrt(most / (least_rows * least_columns))
        return max(1, math.floor(least_rows * factor)), max(1, math.floor(least_columns * factor))
    rows = max(least_rows, math.floor(math.sqrt(most * height / width)))
    columns = max(least_columns, math.floor(math.sqrt(most * width / height)))
    if rows * columns > most:
        if columns > rows:
            columns = most // rows
        else:
            rows = most // columns
    return max(1, rows), max(1, columns)


class MoondreamImageProcessor(PilBackend):
    r"""Turns pictures into `pixel_values`, and `image_grids` where a picture has several views.

    A picture is converted to RGB as Pillow does it (transparency is dropped, not composited) and squashed to `size`.

    * `views="none"`: `pixel_values` float32 [pictures, 3, height, width].
    * otherwise `pixel_values` float32 [pictures, views, 3, height, width], the whole picture first, then its crops row
      by row, then zeros; `image_grids` int64 [pictures, 2], (rows, columns) of crops, zeros for none.

    Args:
        size (`dict`, defaults to 378 x 378): of a view.
        views (`str`, defaults to `"none"`): see [`MoondreamImageProcessorKwargs`].
        max_tiles (`int`, defaults to 12), patch_size (`int`, defaults to 14), overlap_margin (`int`, defaults to 4):
            of overlapping tiles; a tile's outer `overlap_margin` patches lie in its neighbour too.
        normalize_dtype (`str`, defaults to `"float32"`): type that pixels are normalised in, step by step: float16 in
            the revisions up to 2025-04-14, bfloat16 in 2025-06-21.
        image_seq_length (`int`, defaults to 729): vectors that the model makes of a picture.
    """

    valid_kwargs = MoondreamImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grids"]

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 378, "width": 378}
    default_to_square = True
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    views = "none"
    max_tiles = 12
    patch_size = 14
    overlap_margin = 4
    normalize_dtype = "float32"
    image_seq_length = 729

    def __init__(self, **kwargs: Any):
        own = ("patch_size", "overlap_margin", "normalize_dtype", "image_seq_length")
        settings = {name: kwargs.pop(name) for name in own if name in kwargs}
        super().__init__(**kwargs)
        for name, value in settings.items():
            setattr(self, name, value)
        if self.views not in ("none", "grid", "tiles"):
            raise ValueError(f"views is {self.views!r}; it is one of none, grid, tiles.")
        if self.normalize_dtype not in DTYPES:
            raise ValueError(f"normalize_dtype is {self.normalize_dtype!r}; it is one of {', '.join(DTYPES)}.")

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> ImageInput:
        return super()._prepare_images_structure(_with_channels(images), expected_ndims)

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """One picture of any kind as an array [3, height, width]."""
        if do_convert_rgb and isinstance(image, Image.Image):
            image = image.convert("RGB")
        array = super().process_image(image, do_convert_rgb=False, input_data_format=input_data_format, **kwargs)
        if not do_convert_rgb:
            return array
        return np.repeat(array, 3, axis=0) if array.shape[0] == 1 else array[:3]

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | None,
        *args: Any,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: Any = None,
        image_std: Any = None,
        views: str | None = None,
        max_tiles: int | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        height, width = size["height"], size["width"]
        pictures, grids = [], []
        for image in images:
            whole, crops, grid = self._views(
                image, (height, width), resample, views or self.views, max_tiles or self.max_tiles, do_resize
            )
            pictures.append((whole, crops))
            grids.append(grid)

        def finished(array: np.ndarray) -> torch.Tensor:
            pixels = torch.from_numpy(np.ascontiguousarray(array))
            return self._normalized(pixels, do_rescale, rescale_factor, do_normalize, image_mean, image_std)

        if (views or self.views) == "none":
            data: dict[str, Any] = {"pixel_values": [finished(whole).numpy() for whole, _ in pictures]}
            return BatchFeature(data, tensor_type=return_tensors)
        most = 1 + max(rows * columns for rows, columns in grids)
        batch = torch.zeros(len(pictures), most, 3, height, width)
        for row, ((whole, crops), (rows, columns)) in enumerate(zip(pictures, grids)):
            if whole is None:
                # The whole view of this period is made of the resized picture's normalised pixels.
                pixels = finished(crops)
                batch[row, 0] = torch.nn.functional.interpolate(
                    pixels[None], size=(height, width), mode="bilinear", align_corners=False
                )[0]
                crops = _cut(pixels, rows, columns, (height, width), (height, width))
            else:
                batch[row, 0] = finished(whole)
                crops = [finished(crop) for crop in crops]
            for place, crop in enumerate(crops, start=1):
                batch[row, place] = crop
        data = {"pixel_values": list(batch.numpy()), "image_grids": [list(grid) for grid in grids]}
        return BatchFeature(data, tensor_type=return_tensors)

    def _views(
        self,
        image: np.ndarray,
        size: tuple[int, int],
        resample: PILImageResampling | None,
        views: str,
        max_tiles: int,
        do_resize: bool,
    ) -> tuple[Any, Any, tuple[int, int]]:
        """(whole view, crops, grid of crops) before normalisation. Of a `"grid"` of several crops the whole view is
        None, and the crops are one resized picture."""

        def resized(height: int, width: int) -> np.ndarray:
            if not do_resize or image.shape[-2:] == (height, width):
                return image
            return self.resize(image, SizeDict(height=height, width=width), resample=resample)

        height, width = size
        if views == "none":
            return resized(height, width), [], (0, 0)
        if views == "grid":
            rows, columns = crop_grid(image.shape[-2], image.shape[-1], height)
            if rows * columns == 1:
                return resized(height, width), [], (0, 0)
            return None, resized(rows * height, columns * width), (rows, columns)
        margin = self.overlap_margin * self.patch_size
        window = height - 2 * margin
        rows, columns = tile_grid(image.shape[-2] - 2 * margin, image.shape[-1] - 2 * margin, window, max_tiles)
        large = resized(rows * window + 2 * margin, columns * window + 2 * margin)
        return resized(height, width), _cut(large, rows, columns, (height, width), (window, window)), (rows, columns)

    def _normalized(
        self,
        pixels: torch.Tensor,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
    ) -> torch.Tensor:
        """float32, rounded after each step to `normalize_dtype`."""
        dtype = DTYPES[self.normalize_dtype]
        values = pixels.to(dtype)
        if do_rescale:
            # torchvision multiplies; the revisions of 2025 divide.
            values = values * rescale_factor if dtype == torch.float32 else values / round(1 / rescale_factor)
        if do_normalize:
            mean, std = (torch.tensor(each, dtype=dtype)[:, None, None] for each in (image_mean, image_std))
            values = (values - mean) / std
        return values.float()


def _cut(image: Any, rows: int, columns: int, size: tuple[int, int], stride: tuple[int, int]) -> list[Any]:
    """Crops of `size` from [3, height, width], `stride` apart, row by row."""
    return [
        image[:, row * stride[0] : row * stride[0] + size[0], column * stride[1] : column * stride[1] + size[1]]
        for row in range(rows)
        for column in range(columns)
    ]


def _with_channels(images: Any) -> Any:
    """`images` with a channel dimension on every grey array [height, width], which the library takes for no image."""
    if isinstance(images, (list, tuple)):
        return [_with_channels(image) for image in images]
    return images[None] if getattr(images, "ndim", 3) == 2 else images


__all__ = ["MoondreamImageProcessor", "crop_grid", "tile_grid"]
