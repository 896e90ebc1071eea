from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from weightport.modeling.ofa.image_processing_ofa import TASK_PRESETS, OFAImageProcessor


def original(image: Image.Image, size: int, mean=(0.5,) * 3, std=(0.5,) * 3) -> np.ndarray:
    """The original's torchvision transforms, as the PIL and float32 operations that they are."""
    resized = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized).astype(np.float32).transpose(2, 0, 1) / np.float32(255)
    return (pixels - np.array(mean, np.float32)[:, None, None]) / np.array(std, np.float32)[:, None, None]


def noise(mode: str, width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return (
        Image.fromarray(values, "RGBA").convert(mode) if mode != "P" else Image.fromarray(values[..., 0]).convert("P")
    )


@pytest.mark.parametrize("size", [17, 48, 64])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize("shape", [(57, 83), (200, 90), (1, 5), (1, 1)])
def test_every_kind_of_image_equals_the_original_bit_for_bit(mode, size, shape):
    image = noise(mode, *shape)
    pixels = OFAImageProcessor(size=size)(image, return_tensors="np")["pixel_values"]
    assert pixels.dtype == np.float32
    assert pixels.shape == (1, 3, size, size)
    np.testing.assert_array_equal(pixels[0], original(image, size))


def test_transparency_is_dropped_and_not_composited():
    image = Image.new("RGBA", (4, 4), (10, 200, 30, 0))
    pixels = OFAImageProcessor(size=4)(image, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(pixels[0], original(Image.new("RGB", (4, 4), (10, 200, 30)), 4))


def test_arrays_and_tensors_of_either_layout_give_the_same_as_the_image():
    image = noise("RGB", 20, 30)
    array = np.asarray(image)
    processor = OFAImageProcessor(size=16)
    kinds = [image, array, array.transpose(2, 0, 1), torch.tensor(array), torch.tensor(array).permute(2, 0, 1)]
    for kind in [*kinds, [image], [[image]]]:
        pixels = processor(kind, return_tensors="pt")["pixel_values"]
        np.testing.assert_array_equal(pixels[0].numpy(), original(image, 16))
    grey = noise("L", 20, 30)
    for kind in (np.asarray(grey), np.asarray(grey)[..., None], np.asarray(image.convert("RGBA"))):
        expected = grey if kind.shape[-1] != 4 else image
        np.testing.assert_array_equal(processor(kind, return_tensors="np")["pixel_values"][0], original(expected, 16))


def test_a_numpy_image_one_pixel_high_keeps_its_colours():
    array = np.asarray(noise("RGB", 5, 1))
    pixels = OFAImageProcessor(size=8)(array, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(pixels[0], original(Image.fromarray(array), 8))


def test_images_of_different_shapes_become_one_batch():
    images = [noise("RGB", 20, 30), noise("L", 7, 3)]
    pixels = OFAImageProcessor(size=16)(images, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(pixels, np.stack([original(image, 16) for image in images]))


def test_imagenet_statistics_are_an_option():
    image = noise("RGB", 20, 30)
    processor = OFAImageProcessor.for_task("image_classification", size=16)
    expected = original(image, 16, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    np.testing.assert_array_equal(processor(image, return_tensors="np")["pixel_values"][0], expected)


@pytest.mark.parametrize(
    ("width", "height", "inner"), [(200, 100, (96, 192)), (100, 200, (192, 96)), (100, 100, (192, 192))]
)
def test_ocr_keeps_the_aspect_and_repeats_the_edges_around_the_centre(width, height, inner):
    image = noise("RGB", width, height)
    pixels = OFAImageProcessor.for_task("ocr", size=192)(image, return_tensors="np")["pixel_values"][0]
    rows, columns = inner
    top, left = (192 - rows) // 2, (192 - columns) // 2
    middle = image.resize((columns, rows), Image.Resampling.BICUBIC)
    expected = np.asarray(middle).astype(np.float32).transpose(2, 0, 1) / np.float32(255)
    expected = (expected - np.float32(0.5)) / np.float32(0.5)
    np.testing.assert_array_equal(pixels[:, top : top + rows, left : left + columns], expected)
    np.testing.assert_array_equal(pixels[:, 0, left : left + columns], expected[:, 0])
    np.testing.assert_array_equal(pixels[:, top : top + rows, -1], expected[:, :, -1])


def test_ocr_never_makes_a_side_shorter_than_64_pixels():
    image = noise("RGB", 300, 2)
    pixels = OFAImageProcessor.for_task("ocr", size=128)(image, return_tensors="np")["pixel_values"][0]
    assert len({row.tobytes() for row in pixels.transpose(1, 0, 2)}) == 64


@pytest.mark.parametrize("task", TASK_PRESETS)
def test_every_preset_makes_its_own_size(task):
    pixels = OFAImageProcessor.for_task(task)(noise("RGB", 20, 30), return_tensors="np")["pixel_values"]
    assert pixels.shape == (1, 3, TASK_PRESETS[task]["size"], TASK_PRESETS[task]["size"])


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="no preset for 'captions'"):
        OFAImageProcessor.for_task("captions")


def test_settings_survive_saving(tmp_path):
    OFAImageProcessor.for_task("ocr", size=96).save_pretrained(tmp_path)
    loaded = OFAImageProcessor.from_pretrained(tmp_path)
    assert loaded.keep_aspect_ratio
    assert dict(loaded.size) == {"height": 96, "width": 96}
