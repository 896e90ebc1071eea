"""Balanced, grouped and nearby orders of training samples, the same again after a kill and in every process."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from drawn_data import draw_jsonl, write_lines
from tiny_processes import killed_at, side_by_side
from tiny_runs import job_of, losses, run, still

from weightport.errors import RecipeError
from weightport.finetuning.augmentation import Epoch
from weightport.finetuning.data import open_data
from weightport.finetuning.data.settings import DataSettings
from weightport.finetuning.training.sampling import (
    WINDOW,
    BalancedSampler,
    GroupedSampler,
    NearbySampler,
    class_weights,
    pictures_of,
)

ANSWERS = ("cat", "cat", "cat", "cat", "cat", "dog", "cat", "cat")

GROUPED = {"batch.group_by_image": True, "model.cache_features": True}

SHORT = {
    "training.learning_rate": 1e-3,
    "training.per_device_train_batch_size": 2,
    "training.max_steps": 6,
    "training.save_strategy": "steps",
    "training.save_steps": 2,
    "training.save_total_limit": None,
    "training.logging_steps": 1,
    "training.dataloader_num_workers": 0,
}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven cats and a dog, on four pictures."""
    path = draw_jsonl(tmp_path_factory.mktemp("uneven"), len(ANSWERS))
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    changed = [{**row, "suffix": text, "image": f"{n % 4}.png"} for n, (row, text) in enumerate(zip(rows, ANSWERS))]
    return write_lines(path, changed)


def test_classes_are_drawn_equally_often_and_anew_in_each_epoch(uneven: Path) -> None:
    samples, epoch = open_data(uneven, DataSettings()), Epoch()
    sampler = BalancedSampler(class_weights(samples), 7, epoch)
    drawn: list[list[int]] = []
    for number in range(500):
        epoch.begin(number)
        drawn.append(list(sampler))
        assert len(drawn[-1]) == len(samples)
    counts = Counter(samples[index].suffix for each in drawn for index in each)
    # 4,000 draws of even chance: three standard deviations are 95.
    assert abs(counts["dog"] - 2000) < 95
    epoch.begin(3)
    assert list(sampler) == drawn[3] != drawn[4]


def test_classes_of_boxes_are_their_labels(boxes: Path) -> None:
    samples = open_data(boxes, DataSettings(form="detection"))
    # cat, dog, cat and dog, dog and cat: three of each.
    assert class_weights(samples) == pytest.approx([1 / 3] * 4)


def test_sample_without_weight_is_never_drawn() -> None:
    epoch = Epoch()
    drawn = set()
    for number in range(50):
        epoch.begin(number)
        drawn |= set(BalancedSampler(np.array([0.0, 1.0, 0.0, 0.5, 0.0]), 0, epoch))
    assert drawn == {1, 3}


def test_samples_of_one_picture_follow_each_other(uneven: Path) -> None:
    samples, epoch = open_data(uneven, DataSettings()), Epoch()
    pictures = pictures_of(samples)
    assert pictures.tolist() == [0, 1, 2, 3] * 2
    sampler = GroupedSampler(pictures, 7, epoch)
    orders = []
    for number in range(4):
        epoch.begin(number)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(8))
        seen = pictures[orders[-1]]
        assert all(seen[place] == seen[place + 1] for place in range(0, 8, 2))
    assert len({tuple(order) for order in orders}) > 1


def test_samples_of_a_window_are_drawn_together_and_each_once() -> None:
    count, epoch, orders = 5 * WINDOW + 77, Epoch(), []
    sampler = NearbySampler(count, 7, epoch)
    assert len(sampler) == count
    for number in range(3):
        epoch.begin(number)
        order = np.array(list(sampler))
        assert np.array_equal(np.sort(order), np.arange(count))
        # At any time, the last WINDOW draws came from two places of the files at most.
        for place in range(0, count - WINDOW, 100):
            drawn = np.sort(order[place : place + WINDOW])
            assert np.count_nonzero(np.diff(drawn) > WINDOW) <= 2
        assert np.mean(np.abs(np.diff(order))) > 100, "not shuffled"
        orders.append(order.tolist())
    assert orders[0] != orders[1] != orders[2]
    epoch.begin(1)
    assert list(sampler) == orders[1]
    for few in (0, 1, 5, WINDOW, WINDOW + 1):
        assert sorted(NearbySampler(few, 0, epoch)) == list(range(few))


@pytest.mark.parametrize(
    "settings",
    [{"batch.sampling": "balanced"}, GROUPED, pytest.param({"batch.sampling": "nearby"}, marks=pytest.mark.slow)],
    ids=["balanced", "grouped", "nearby"],
)
def test_order_is_the_same_after_a_kill_and_in_two_processes(
    settings: dict[str, object], tiny: Callable[[str], Path], uneven: Path, tmp_path: Path
) -> None:
    more = {**SHORT, **settings, **still(tiny("florence2"))}
    whole = run(tiny("florence2"), "docvqa", uneven, tmp_path / "whole", more=more)
    plain = run(tiny("florence2"), "docvqa", uneven, tmp_path / "plain", more={**SHORT, **still(tiny("florence2"))})
    assert losses(whole.history) != losses(plain.history)
    killed_at(job_of(tiny("florence2"), "docvqa", uneven, tmp_path / "killed", more=more), 2)
    resumed = run(tiny("florence2"), "docvqa", uneven, tmp_path / "killed", resume=True, more=more)
    assert losses(resumed.history) == losses(whole.history)
    one_each = {**more, "training.per_device_train_batch_size": 1}
    assert side_by_side(job_of(tiny("florence2"), "docvqa", uneven, tmp_path / "two", more=one_each), 2) == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(whole.history), abs=1e-6, rel=5e-7)


def test_data_with_nothing_to_balance_or_group_are_refused(
    tiny: Callable[[str], Path], pairs: Path, uneven: Path, tmp_path: Path
) -> None:
    def refused(data: Path, settings: dict[str, object], words: str) -> None:
        with pytest.raises(RecipeError, match=words):
            run(tiny("florence2"), "docvqa", data, tmp_path / "run", more={**SHORT, **settings})
        assert not (tmp_path / "run").exists()

    refused(pairs, {"batch.sampling": "balanced"}, r"each of the 4 answers in .* is there once")
    refused(uneven, {"batch.group_by_image": True}, r"it does nothing without\. Pass both")
    refused(uneven, {**GROUPED, "training.torch_compile": True}, r"torch_compile do not go together")
    refused(pairs, GROUPED, r"every sample of .* has a picture of its own")
    same = draw_jsonl(tmp_path / "same", 3, suffix="cat")
    refused(same, {"batch.sampling": "balanced"}, r"has one class, 'cat'. There is nothing to balance")
    near = {"batch.sampling": "nearby", "training.train_sampling_strategy": "sequential"}
    refused(uneven, near, r"batch\.sampling=nearby and training\.train_sampling_strategy=sequential are two orders")
    both = {"batch.sampling": "balanced", **GROUPED}
    refused(uneven, both, r"batch\.sampling=balanced and batch\.group_by_image are two orders of samples")
