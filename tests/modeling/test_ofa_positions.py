"""Positions of OFA against values worked out by hand from the published formulas."""

from __future__ import annotations

import math

import pytest
import torch

from weightport.modeling.ofa.positions_ofa import (
    BEYOND_CODE_WINDOW,
    code_position_ids,
    image_relative_buckets,
    patch_position_ids,
    text_relative_buckets,
)


def text_bucket(distance: int, size: int) -> int:
    return text_relative_buckets(size)[distance + 1023].item()


@pytest.mark.parametrize("distance", range(-8, 9))
def test_near_text_distances_have_a_bucket_each(distance):
    assert text_bucket(distance, 16) == distance + 15


# size 16: mid 8; sign * (ceil(log(|r| / 8) / log(1023 / 8) * 7) + 8) + 15
@pytest.mark.parametrize(
    ("distance", "bucket"),
    [(9, 15 + 9), (15, 15 + 9), (16, 15 + 10), (100, 15 + 12), (1023, 15 + 15), (-17, 15 - 10), (-1023, 0)],
)
def test_far_text_distances_share_buckets_logarithmically(distance, bucket):
    assert text_bucket(distance, 16) == bucket
    exact = math.copysign(math.ceil(math.log(abs(distance) / 8) / math.log(1023 / 8) * 7) + 8, distance) + 15
    assert bucket == exact


@pytest.mark.parametrize("size", [3, 8, 16, 32, 256])
def test_text_buckets_fit_a_table_of_twice_the_size_less_one(size):
    buckets = text_relative_buckets(size)
    assert buckets.min() >= 0
    assert buckets.max() <= 2 * size - 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_default_dtype_does_not_move_a_bucket_boundary(dtype):
    expected = text_relative_buckets(256)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(text_relative_buckets(256), expected)
    finally:
        torch.set_default_dtype(before)


def test_text_buckets_are_real_numbers_under_a_meta_device():
    with torch.device("meta"):
        buckets = text_relative_buckets(16)
    assert buckets.device.type == "cpu"


def test_patch_ids_step_by_the_bucket_size_from_row_to_row():
    assert patch_position_ids(2, 3, 42).tolist() == [1, 2, 3, 43, 44, 45]


def test_image_buckets_count_query_minus_key():
    # A grid of 4: rows and columns differ by -3..3, so a table row is (dr + 3) * 7 + dc + 3.
    upper_left, lower_right = torch.tensor([1]), torch.tensor([4 + 2 + 1])
    assert image_relative_buckets(upper_left, upper_left, 4).item() == 3 * 7 + 3
    assert image_relative_buckets(lower_right, upper_left, 4).item() == (1 + 3) * 7 + 2 + 3
    assert image_relative_buckets(upper_left, lower_right, 4).item() == (-1 + 3) * 7 - 2 + 3


def test_the_start_of_a_code_sequence_has_rows_of_its_own():
    ids = torch.tensor([0, 1])
    assert image_relative_buckets(ids, ids, 4).tolist() == [[51, 49], [50, 24]]


def test_code_ids_walk_the_window_and_end_beyond_it():
    # 16 pixels are a window of 2 x 2 codes.
    assert code_position_ids(torch.arange(6), 16, 42).tolist() == [0, 1, 2, 43, 44, BEYOND_CODE_WINDOW]


def test_code_ids_stay_inside_a_small_table():
    assert code_position_ids(torch.tensor([9]), 16, 4).item() == 16
