from __future__ import annotations

import pytest
import torch

from weightport.modeling.ofa.boxes_ofa import dequantize_boxes, parse_bins, parse_regions, quantize_boxes


def test_bins_are_the_originals_rounding_of_the_resized_box():
    # 640 x 480 squashed to 512 x 512: x * 0.8 / 512 * 999 = 15.609, 468.281; y / 480 * 999 = 41.625, 978.1875.
    assert quantize_boxes([[10, 20, 300, 470]], (640, 480), (512, 512)).tolist() == [[16, 42, 468, 978]]


def test_bins_span_max_image_size_and_not_the_resized_image():
    # At 256 pixels the whole image ends at 256 / 512 * 999 = 499.5, which rounds half to even.
    assert quantize_boxes([[0, 0, 100, 50]], (100, 100), (256, 256)).tolist() == [[0, 0, 500, 250]]
    assert quantize_boxes([0, 0, 100, 50], (100, 100), (256, 256), 40, 256).tolist() == [[0, 0, 39, 20]]


def test_a_box_outside_the_image_is_clipped_to_bins_that_exist():
    assert quantize_boxes([[-5, -5, 900, 900]], (640, 480), (512, 512)).tolist() == [[0, 0, 999, 999]]


def test_boxes_come_back_to_half_a_bin_for_any_image_shape():
    generator = torch.Generator().manual_seed(0)
    for width, height in [(640, 480), (33, 1000), (1, 1), (4000, 3000)]:
        boxes = torch.rand(50, 4, generator=generator) * torch.tensor([width, height, width, height])
        bins = quantize_boxes(boxes, (width, height), (512, 512))
        back = dequantize_boxes(bins, (width, height), (512, 512))
        half_a_bin = torch.tensor([width, height, width, height]) / 999 / 2
        assert ((back - boxes).abs() <= half_a_bin * 1.001).all()


def test_boxes_stay_inside_the_image():
    # Bin 999 of an image resized to 256 lies at twice its width.
    assert dequantize_boxes([[999] * 4], (100, 60), (256, 256)).tolist() == [[100, 60, 100, 60]]


def test_four_bins_make_a_box_and_a_rest_is_dropped():
    assert parse_bins("<bin_1> <bin_2><bin_3> and <bin_4> <bin_5>") == [[1, 2, 3, 4]]
    assert parse_bins("a dog") == []


def test_regions_are_four_bins_and_what_follows():
    answer = "<bin_1><bin_2><bin_3><bin_4> red car<bin_5> <bin_6> <bin_7> <bin_8> dog"
    assert parse_regions(answer) == [([1, 2, 3, 4], "red car"), ([5, 6, 7, 8], "dog")]


@pytest.mark.parametrize("boxes", [[1, 2, 3], [[1, 2, 3]], [[[1, 2, 3, 4]]]])
def test_boxes_of_another_shape_are_refused(boxes):
    with pytest.raises(ValueError, match="Expected boxes"):
        quantize_boxes(boxes, (10, 10), (512, 512))


def test_an_empty_image_is_refused():
    with pytest.raises(ValueError, match="width, height"):
        quantize_boxes([[1, 2, 3, 4]], (0, 10), (512, 512))
