"""AP and F1 of boxes against a direct run of pycocotools and cases computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from metric_cases import boxed

from weightport.errors import DataError
from weightport.finetuning.metrics import METRICS

# Drawn once: (picture, class, box[, score]).
NAMES = ("dog", "cat", "red car")
EXPECTED = [
    (1, 2, (69, 16, 98, 60)), (1, 0, (29, 19, 68, 49)), (2, 0, (75, 5, 100, 60)), (3, 1, (76, 49, 127, 105)),
    (3, 1, (53, 64, 112, 94)), (3, 0, (35, 77, 83, 127)), (4, 2, (73, 34, 97, 47)), (4, 1, (61, 11, 89, 68)),
    (5, 0, (2, 37, 35, 92)), (5, 0, (13, 76, 53, 84)), (5, 1, (40, 46, 54, 76)), (5, 0, (38, 55, 60, 94)),
    (6, 0, (80, 42, 115, 70)), (6, 2, (2, 47, 24, 93)),
]  # fmt: skip
FOUND = [
    (1, 2, (65, 20, 93, 62), 0.26), (1, 2, (71, 19, 101, 62), 0.4), (3, 1, (80, 51, 124, 105), 0.1),
    (3, 1, (74, 48, 132, 106), 0.78), (3, 1, (54, 68, 110, 94), 0.68), (3, 0, (35, 80, 87, 131), 0.1),
    (5, 0, (6, 41, 30, 93), 0.72), (5, 0, (1, 40, 33, 87), 0.31), (5, 1, (17, 75, 50, 79), 0.98),
    (5, 1, (43, 47, 59, 80), 0.68), (5, 1, (43, 45, 55, 81), 0.72), (5, 0, (33, 56, 64, 94), 0.02),
    (6, 0, (79, 44, 110, 74), 0.06), (6, 2, (6, 47, 21, 93), 0.19), (6, 2, (6, 46, 23, 94), 0.1),
]  # fmt: skip

WHOLE, MOST, LESS = (0, 0, 10, 10), (0, 0, 10, 7.2), (0, 0, 10, 4)
"""IoU of MOST with WHOLE 0.72, of LESS with WHOLE 0.4."""


def test_ap_is_that_of_a_direct_run_of_pycocotools():
    # pycocotools 2.0.11 on the same boxes in COCO JSON files, read by COCO() and loadRes(); classes one by one.
    pictures = range(1, 7)
    predictions = boxed(
        *(
            (
                [(NAMES[c], box) for p, c, box, _ in FOUND if p == picture],
                [(NAMES[c], box) for p, c, box in EXPECTED if p == picture],
            )
            for picture in pictures
        ),
        scores=[[score for p, _, _, score in FOUND if p == picture] for picture in pictures],
    )
    scores = METRICS["ap"].score(predictions)
    assert scores.value == pytest.approx(0.27154015401540155, abs=1e-12)
    assert scores.details == pytest.approx(
        {
            "ap50": 0.5359735973597359,
            "ap75": 0.2601760176017602,
            "ap/dog": 0.2388778877887789,
            "ap/cat": 0.2702970297029703,
            "ap/red car": 0.30544554455445544,
        },
        abs=1e-12,
    )


def test_ap_without_scores_by_hand():
    # Thresholds .50 to .70: both right, AP 1. From .75 on the first of two is right: precision 1 up to recall 0.5, at
    # 51 of COCO's 101 recall points.
    scores = METRICS["ap"].score(boxed(([("dog", WHOLE)], [("dog", WHOLE)]), ([("dog", MOST)], [("dog", WHOLE)])))
    assert scores.value == pytest.approx((5 * 1 + 5 * 51 / 101) / 10)
    assert scores.details["ap50"] == pytest.approx(1.0)
    assert scores.details["ap75"] == pytest.approx(51 / 101)


def test_box_f1_by_hand():
    # One right of two found; one missed of two expected.
    scores = METRICS["box-f1"].score(boxed(([("dog", MOST)], [("dog", WHOLE)]), ([("dog", LESS)], [("dog", WHOLE)])))
    assert scores.value == 0.5
    assert scores.details == {"box-precision": 0.5, "box-recall": 0.5}
    assert scores.per_sample == [1.0, 0.0]


@pytest.mark.parametrize("metric", ["ap", "box-f1"])
def test_labels_meet_whatever_their_case_and_outer_spaces(metric):
    assert METRICS[metric].score(boxed(([(" Red Car ", WHOLE)], [("red car", WHOLE)]))).value == pytest.approx(1.0)


def test_an_expected_box_is_taken_only_once():
    scores = METRICS["box-f1"].score(boxed(([("dog", WHOLE), ("dog", WHOLE)], [("dog", WHOLE)])))
    assert scores.details == {"box-precision": 0.5, "box-recall": 1.0}


def test_boxes_with_higher_scores_choose_first():
    # The wide box overlaps both expected ones by half and more, the left one most; the other fits the left one only.
    left, right, wide = (0, 0, 10, 10), (2, 0, 12, 10), (0.5, 0, 11, 10)
    narrow = (0, 0, 7, 10)
    predictions = boxed(
        ([("dog", wide), ("dog", narrow)], [("dog", left), ("dog", right)]),
        scores=[[0.1, 0.9]],
    )
    assert METRICS["box-f1"].score(predictions).value == 1.0
    reversed_scores = boxed(
        ([("dog", wide), ("dog", narrow)], [("dog", left), ("dog", right)]),
        scores=[[0.9, 0.1]],
    )
    assert METRICS["box-f1"].score(reversed_scores).value == 0.5


def test_a_box_of_another_label_is_wrong():
    scores = METRICS["box-f1"].score(boxed(([("cat", WHOLE)], [("dog", WHOLE)])))
    assert scores.value == 0.0


def test_a_class_expected_nowhere_lowers_f1_and_as_in_coco_not_ap():
    predictions = boxed(([("dog", WHOLE), ("unicorn", WHOLE)], [("dog", WHOLE)]))
    assert METRICS["ap"].score(predictions).value == pytest.approx(1.0)
    assert METRICS["box-f1"].score(predictions).value == pytest.approx(2 / 3)


@pytest.mark.parametrize("metric", ["ap", "box-f1"])
def test_no_box_found_is_zero_and_no_failure(metric):
    predictions = boxed(([], [("dog", WHOLE)]))
    assert METRICS[metric].score(predictions).value == 0.0
    unread = [replace(predictions[0], found=None), *boxed(([], []))]
    assert METRICS[metric].score(unread).value == 0.0


@pytest.mark.parametrize("metric", ["ap", "box-f1"])
def test_a_picture_without_objects_is_right_when_nothing_is_found(metric):
    predictions = boxed(([("dog", WHOLE)], [("dog", WHOLE)]), ([], []))
    assert METRICS[metric].score(predictions).value == pytest.approx(1.0)


def test_a_found_box_without_area_is_a_false_positive():
    assert METRICS["box-f1"].score(boxed(([("dog", (5, 5, 5, 5))], [("dog", WHOLE)]))).value == 0.0
    assert METRICS["ap"].score(boxed(([("dog", (5, 5, 5, 5))], [("dog", WHOLE)]))).value == 0.0


@pytest.mark.parametrize("metric", ["ap", "box-f1"])
@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ([], "no predictions"),
        (boxed(([("dog", WHOLE)], [])), "expects no box in any picture"),
        (boxed(([], [("dog", (5, 5, 5, 9))])), "picture 1: the expected box .* no area"),
        ([replace(p, expected=None) for p in boxed(([], []))], "picture 1: the data set gives no boxes"),
        ([replace(p, found=None) for p in boxed(([], [("dog", WHOLE)]))], "no boxes were read from the answers"),
    ],
)
def test_what_cannot_be_scored_is_an_error_and_no_number(metric, predictions, message):
    with pytest.raises(DataError, match=message):
        METRICS[metric].score(predictions)


def test_ap_prints_nothing(capfd):
    METRICS["ap"].score(boxed(([("dog", WHOLE)], [("dog", WHOLE)])))
    assert capfd.readouterr() == ("", "")
