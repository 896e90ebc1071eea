"""Image processor of OFA and OFA-CN, for transformers 5. PIL and NumPy only: torchvision is never needed."""

from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs

# What each task's data class of the original does to an image (data/*_data/*.py), with the sizes of its run scripts.
IMAGENET_STATISTICS = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
TASK_PRESETS: dict[str, dict[str, Any]] = {
    "caption": {"size": 480},
    "ofa_chinese_caption": {"size": 256},
    "vqa": {"size": 480},
    "visual_entailment": {"size": 480},
    "image_classification": {"size": 480, **IMAGENET_STATISTICS},
    "ocr": {"size": 480, "keep_aspect_ratio": True},
    "grounding": {"size": 512},
    "region_caption": {"size": 512},
    "pretraining": {"size": 384},
}
# ocr_resize of the original never makes a side shorter than this.
SHORTEST_SIDE = 64


class OFAImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    keep_aspect_ratio (`bool`, *optional*, defaults to `self.keep_aspect_ratio`):
        Fit the image into `size` and repeat its edges on both sides, as OFA does for OCR, instead of squashing it.
    """

    keep_aspect_ratio: bool | None


class OFAImageProcessor(PilBackend):
    r"""Turns images into `pixel_values`: float32 [batch, 3, height, width], RGB, by default in [-1, 1].

    An image is converted to RGB as PIL does it (transparency is dropped, not composited), squashed to `size` with
    PIL's antialiased bicubic filter, divided by 255 and normalised. Bit-identical with the original's pipeline.

    Args:
        size (`int` or `dict`, defaults to 480 x 480): the original trains captions, VQA and entailment at 480,
            grounding at 512, pre-training at 384; OFA-Chinese captions at 256. Other sizes are legal.
        image_mean, image_std (`list[float]`, default to 0.5): ImageNet's statistics were used for image classification
            only (`imagenet_default_mean_and_std` of the checkpoint's task options).
        keep_aspect_ratio (`bool`, defaults to `False`): for OCR, see [`OFAImageProcessorKwargs`]. The original puts
            the image at a random offset between the repeated edges; here it is centred, so that results repeat.
    """

    valid_kwargs = OFAImageProcessorKwargs
    model_input_names = ["pixel_values"]

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 480, "width": 480}
    default_to_square = True
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    keep_aspect_ratio = False

    @classmethod
    def for_task(cls, task: str, **kwargs: Any) -> "OFAImageProcessor":
        """The processor that the original trains and evaluates `task` with; `kwargs` override its settings."""
        if task not in TASK_PRESETS:
            raise ValueError(f"There is no preset for {task!r}. Choose one of {', '.join(TASK_PRESETS)}.")
        return cls(**{**TASK_PRESETS[task], **kwargs})

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> ImageInput:
        return super()._prepare_images_structure(_with_channels(images), expected_ndims)

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """One image of any kind as an array [channels, height, width]."""
        if do_convert_rgb and isinstance(image, Image.Image):
            image = image.convert("RGB")
        elif do_convert_rgb:
            array = image.cpu().numpy() if hasattr(image, "cpu") else np.asarray(image)
            image = _to_three_channels(array, input_data_format)
            input_data_format = ChannelDimension.FIRST
        return super().process_image(image, do_convert_rgb=False, input_data_format=input_data_format, **kwargs)

    def rescale(self, image: np.ndarray, scale: float, *args: Any, **kwargs: Any) -> np.ndarray:
        """`image * scale` in float32, by dividing: x / 255 and x * (1 / 255) differ in the last bit."""
        return image.astype(np.float32) / np.float32(1 / scale)

    def fit(self, image: np.ndarray, size: SizeDict, resample: PILImageResampling | None = None) -> np.ndarray:
        """`image` [channels, height, width] resized into the frame `size`, its edges repeated on both sides."""
        frame_height, frame_width = size["height"], size["width"]
        height, width = _fitted(image.shape[-2], image.shape[-1], frame_height, frame_width)
        image = self.resize(image, SizeDict(height=height, width=width), resample=resample)
        rows, columns = frame_height - height, frame_width - width
        margins = ((0, 0), (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2))
        return np.pad(image, margins, mode="edge")

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | None,
        *args: Any,
        keep_aspect_ratio: bool | None = False,
        **kwargs: Any,
    ) -> BatchFeature:
        if do_resize and keep_aspect_ratio:
            images, do_resize = [self.fit(image, size, resample) for image in images], False
        return super()._preprocess(images, do_resize, size, resample, *args, **kwargs)


def _fitted(height: int, width: int, max_height: int, max_width: int) -> tuple[int, int]:
    """Height and width of an image that fills one side of the frame (ocr_resize of the original, for any frame)."""
    scale = min(max_height / height, max_width / width)
    shortest = min(SHORTEST_SIDE, max_height, max_width)
    if max_width * height <= max_height * width:
        return max(shortest, int(height * scale)), max_width
    return max_height, max(shortest, int(width * scale))


def _with_channels(images: Any) -> Any:
    """`images` with a channel dimension on every grey array [height, width], which the library takes for no image."""
    if isinstance(images, (list, tuple)):
        return [_with_channels(image) for image in images]
    return images[None] if getattr(images, "ndim", 3) == 2 else images


def _to_three_channels(image: np.ndarray, input_data_format: str | ChannelDimension | None) -> np.ndarray:
    """An array [channels, height, width] of three channels: grey is repeated, alpha dropped, as PIL does."""
    if input_data_format is None:
        # Three channels before one: an RGB image may be one pixel high.
        channels = (3,) if 3 in (image.shape[0], image.shape[-1]) else (1, 4)
        input_data_format = infer_channel_dimension_format(image, num_channels=channels)
    if input_data_format == ChannelDimension.LAST:
        image = np.moveaxis(image, -1, 0)
    return np.repeat(image, 3, axis=0) if image.shape[0] == 1 else image[:3]


__all__ = ["OFAImageProcessor"]
