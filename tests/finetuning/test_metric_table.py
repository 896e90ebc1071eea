"""What holds for every metric, and the figures of several together."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from metric_cases import answered, boxed

from weightport.errors import DataError, UsageError
from weightport.finetuning.data.samples import Objects
from weightport.finetuning.evaluation.predictions import Prediction
from weightport.finetuning.metrics import METRICS, headline, metric_named, score_all
from weightport.finetuning.metrics.ranking import recall

TEXTS = [name for name, metric in METRICS.items() if metric.needs == "text"]
CHINESE = [("一件红色的连衣裙",) * 2, ("男士纯棉短袖T恤",) * 2]
ENGLISH = [("a red dog runs on the grass",) * 2, ("two cats sleep in one box",) * 2]
COUNTS = [('{"dime": 3, "penny": 10}',) * 2, ('{"quarter": 2, "dime": 1}',) * 2]


@pytest.mark.parametrize("name", [name for name in TEXTS if "json" not in name and name != "count-error"])
@pytest.mark.parametrize("pairs", [CHINESE, ENGLISH, CHINESE + ENGLISH], ids=["zh", "en", "mixed"])
def test_perfect_answers_reach_the_best_value(name, pairs):
    assert METRICS[name].score(answered(*pairs)).value == pytest.approx(METRICS[name].best)


@pytest.mark.parametrize("name", TEXTS)
def test_perfect_json_reaches_the_best_value(name):
    assert METRICS[name].score(answered(*COUNTS)).value == pytest.approx(METRICS[name].best)


@pytest.mark.parametrize("name", ["ap", "box-f1"])
def test_perfect_boxes_reach_the_best_value(name):
    boxes = [("dog", (1, 2, 30, 40)), ("dog", (50, 60, 80, 90)), ("cat", (0, 0, 200, 200))]
    assert METRICS[name].score(boxed((boxes, boxes), (boxes[:1], boxes[:1]))).value == pytest.approx(
        METRICS[name].best
    )


@pytest.mark.parametrize("name", TEXTS)
def test_no_predictions_are_an_error_and_never_nan(name):
    with pytest.raises(DataError, match="no predictions"):
        METRICS[name].score([])


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("references", [(), ("",), (" \n",)])
def test_a_sample_without_a_reference_is_named(name, references):
    with pytest.raises(DataError, match=r"val\.jsonl, line 1: there is no reference"):
        METRICS[name].score(answered(("a dog", references), *COUNTS))


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("text", ["", " ", "。！", "\x00", "😀" * 3, "a" * 5000])
def test_any_answer_gets_a_finite_value_and_none_better_than_best(name, text):
    metric = METRICS[name]
    scores = metric.score(answered((text, COUNTS[0][1]), COUNTS[1]))
    assert all(math.isfinite(value) for value in (scores.value, *scores.details.values()))
    assert scores.value < metric.best if metric.higher_is_better else scores.value > metric.best
    assert scores.per_sample is None or len(scores.per_sample) == 2


def test_an_unknown_metric_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"no metric 'bleu'.*anls.*bleu-4.*box-f1"):
        metric_named("bleu")
    with pytest.raises(UsageError, match="no metric 'bleu'"):
        score_all(["exact-match", "bleu"], [])


def test_score_all_gives_every_figure_by_name():
    figures = score_all(["bleu-4", "exact-match", "json-f1"], answered(*COUNTS))
    assert list(figures) == [
        "bleu-4", "bleu-1", "bleu-2", "bleu-3", "bleu-brevity-penalty",
        "exact-match",
        "json-f1", "json-precision", "json-recall",
    ]  # fmt: skip
    assert all(type(value) is float for value in figures.values())


def test_no_two_metrics_share_the_name_of_a_figure():
    texts, boxes = answered(*COUNTS), boxed(([("dog", (1, 2, 30, 40))],) * 2)
    names = [
        figure
        for name, metric in METRICS.items()
        if metric.needs != "ranks"
        for figure in score_all([name], texts if metric.needs == "text" else boxes)
    ]
    names += ["recall", *recall([0], [0]).details, "recall-contrast", *recall([0], [0], "-contrast").details]
    assert len(names) == len(set(names))


def test_a_metric_says_how_many_samples_it_needs():
    assert {name for name, metric in METRICS.items() if metric.fewest > 1} == {"cider-d", "cider-d-words"}
    with pytest.raises(DataError, match="cider-d is undefined for 1 sample: it needs at least 2"):
        score_all(["cider-d"], answered(ENGLISH[0]))


def test_the_table_loads_without_the_libraries_of_the_finetune_extra():
    libraries = ["rapidfuzz", "sacrebleu", "rouge_score", "pycocotools", "jieba", "nltk"]
    code = (
        "import sys\n"
        f"for name in {libraries}: sys.modules[name] = None\n"
        "from weightport.finetuning.metrics import score_all\n"
        "from weightport.finetuning.evaluation.predictions import Prediction\n"
        "answer = [Prediction(0, 'p', 'k', '', 'yes', ('yes',))]\n"
        "assert score_all(['exact-match'], answer) == {'exact-match': 1.0}\n"
        "from weightport.errors import UsageError\n"
        "try: score_all(['anls'], answer)\n"
        "except UsageError as error: print(error)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "rapidfuzz" in shown
    assert "pip install '.[finetune]' in weightport's checkout" in shown


def test_every_figure_beside_a_metrics_own_is_a_known_detail() -> None:
    boxes = Objects(("cat",), ((0.0, 0.0, 4.0, 4.0),), (8, 8))
    predictions = [
        Prediction(n, "p", f"{n}.png", "q", '{"cat": 1}', ('{"cat": 1}', f'{{"dog": {n}}}'), boxes, boxes)
        for n in range(2)
    ]
    answers = [name for name, metric in METRICS.items() if metric.needs != "ranks"]
    figures = score_all(answers, predictions)
    assert list(headline(figures)) == answers and len(figures) > len(answers)
