"""Metrics of JSON answers against cases computed by hand."""

from __future__ import annotations

import json
import math

import pytest
from metric_cases import answered

from weightport.errors import DataError
from weightport.finetuning.metrics import METRICS

MENU = '{"menu": [{"name": "tea", "price": 3}, {"name": "rice", "price": 5}], "total": 8}'


def score(metric: str, *pairs: tuple):
    return METRICS[metric].score(answered(*pairs))


def test_json_valid_is_the_share_of_documents_that_parse():
    answers = ['{"a": 1}', "[]", '{"a": 1', "", "{'a': 1}", '{"a": NaN}', '{"a": 1} and more', "[" * 100_000]
    scores = score("json-valid", *((answer, "{}") for answer in answers))
    assert scores.per_sample == [1, 1, 0, 0, 0, 0, 0, 0]
    assert scores.value == 0.25


def test_exact_match_json_sees_values_and_not_layout():
    expected = '{"dime": 3, "penny": [1, 2]}'
    same = json.dumps({"penny": [1, 2.0], "dime": 3}, indent=2)
    others = [
        '{"dime": 3, "penny": [2, 1]}',
        '{"dime": "3", "penny": [1, 2]}',
        '{"dime": 3}',
        '{"dime": 3, "penny": [1, 2]',
    ]
    assert score("exact-match-json", (same, expected), *((other, expected) for other in others)).per_sample == [
        1,
        0,
        0,
        0,
        0,
    ]


def test_exact_match_json_does_not_take_true_for_one():
    assert score("exact-match-json", ('{"a": true}', '{"a": 1}')).value == 0.0


def test_json_f1_counts_fields_over_all_samples_and_not_their_mean():
    # Sample 1: 4 of 5 fields right, 5 answered. Sample 2: not JSON, 1 expected. Micro F1 = 2*4 / (5 + 6).
    wrong_price = MENU.replace('"price": 5', '"price": 6')
    scores = score("json-f1", (wrong_price, MENU), ("none", '{"total": 8}'))
    assert scores.value == pytest.approx(2 * 4 / 11)
    assert scores.details["json-precision"] == pytest.approx(4 / 5)
    assert scores.details["json-recall"] == pytest.approx(4 / 6)
    assert scores.per_sample == pytest.approx([4 / 5, 0.0])


def test_json_f1_does_not_mind_the_order_of_a_list_but_its_repetitions():
    assert score("json-f1", ('{"a": [2, 1]}', '{"a": [1, 2]}')).value == 1.0
    assert score("json-f1", ('{"a": [1, 1]}', '{"a": [1, 2]}')).value == pytest.approx(0.5)


def test_json_f1_tells_the_same_value_at_another_path_apart():
    assert score("json-f1", ('{"a": {"x": 1}}', '{"b": {"x": 1}}')).value == 0.0


def test_json_f1_does_not_take_a_list_of_one_for_its_element():
    assert score("json-f1", ('{"a": 1}', '{"a": [1]}')).value == 0.0


def test_json_f1_of_empty_objects_is_perfect():
    assert score("json-f1", ("{}", "{}")).value == 1.0


def test_json_f1_takes_the_nearest_reference():
    assert score("json-f1", ('{"a": 1}', ['{"a": 2, "b": 3}', '{"a": 1}'])).value == 1.0


def test_json_edit_ignores_layout_of_json_and_measures_broken_json_as_text():
    expected = '{"a": 12}'
    scores = score(
        "json-edit", ('{\n  "a": 12\n}', expected), ('{"a": 13}', expected), ('{"a": 12', expected), ("", expected)
    )
    # Canonical '{"a":12}' has 8 characters; the broken answer misses one of the 9 that stand in the reference.
    assert scores.per_sample == pytest.approx([0.0, 1 / 8, 1 / 9, 1.0])


def test_count_error_adds_the_errors_of_all_classes():
    pairs = [
        ('{"dime": 2, "penny": 1}', '{"dime": 3}'),  # dime 1, penny (named by sample 3) 1
        ("none", '{"dime": 4}'),  # dime 4
        ('{"penny": 2, "euro": 5, "dime": "two"}', '{"penny": 2}'),  # euro 5
    ]
    scores = score("count-error", *pairs)
    assert scores.per_sample == [2.0, 4.0, 5.0]
    assert scores.details == pytest.approx(
        {"count-error/dime": 5 / 3, "count-error/penny": 1 / 3, "count-error/(other)": 5 / 3}
    )
    assert scores.value == pytest.approx(sum(scores.details.values()))


def test_count_error_stays_finite_when_a_model_runs_on_writing_digits():
    scores = score("count-error", ('{"dime": ' + "9" * 4000 + "}", '{"dime": 1}'), ('{"dime": 1e999}', '{"dime": 1}'))
    assert math.isfinite(scores.value)


@pytest.mark.parametrize("metric", ["exact-match-json", "json-f1", "json-edit", "count-error"])
def test_a_reference_that_is_no_json_is_named(metric):
    with pytest.raises(DataError, match=r"val\.jsonl, line 2.*JSON references.*a dog"):
        score(metric, ("{}", "{}"), ("{}", "a dog"))


def test_count_error_refuses_references_that_are_no_counts():
    with pytest.raises(DataError, match="count-error needs answers like"):
        score("count-error", ("{}", '{"name": "tea"}'))
