"""Changes of training pictures: decided by seed, epoch and sample, and never of what is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from drawn_data import draw, draw_jsonl, write_lines
from tiny_processes import killed_at
from tiny_runs import job_of, losses, run, still

from weightport.errors import RecipeError
from weightport.finetuning.augmentation import CHANGES, Augmentation, Epoch
from weightport.finetuning.data import open_data
from weightport.finetuning.data.samples import Objects, Sample
from weightport.finetuning.data.settings import DataSettings

PICTURE = draw(3, (96, 64))
SAMPLE = Sample("a.jsonl, line 1", None, "", "", ())

CHANGED = {
    "training.learning_rate": 1e-3,
    "training.per_device_train_batch_size": 1,
    "training.max_steps": 6,
    "training.save_strategy": "steps",
    "training.save_steps": 2,
    "training.save_total_limit": None,
    "training.logging_steps": 1,
    "training.dataloader_num_workers": 0,
    "batch.augment": list(CHANGES),
}


def changed(names: tuple[str, ...], *, seed: int = 1, epoch: int = 0, index: int = 0) -> np.ndarray:
    counter = Epoch()
    counter.begin(epoch)
    return np.asarray(Augmentation(names, seed, counter)(index, SAMPLE, PICTURE)[1]).astype(int)


@pytest.mark.parametrize("name", CHANGES)
def test_change_is_the_same_again_and_another_in_another_epoch_sample_and_seed(name: str) -> None:
    first = changed((name,))
    assert first.shape == (64, 96, 3)
    assert (changed((name,)) == first).all()
    for key in ("seed", "epoch", "index"):
        drawn = [changed((name,), **{key: number}) for number in range(10, 22)]
        assert any((each != drawn[0]).any() for each in drawn[1:]), f"the {key} changes nothing"


def test_change_does_not_depend_on_which_others_are_made() -> None:
    # What is made last sees what the others made of the picture, and draws what it draws alone.
    alone = [(changed(("flip",), index=index) != np.asarray(PICTURE)).any() for index in range(12)]
    after = [(changed(("color", "flip"), index=i) != changed(("color",), index=i)).any() for i in range(12)]
    assert alone == after and True in alone and False in alone


def test_boxes_of_a_mirrored_picture_are_around_the_same_pixels() -> None:
    left = 3 + 3
    sample = Sample("a", None, "", "", (), Objects(("square",), ((left, 4.0, left + 10, 16.0),), PICTURE.size))
    mirrored = 0
    for index in range(8):
        found, picture = Augmentation(("flip",), 0, Epoch())(index, sample, PICTURE)
        assert found.objects is not None
        x0, y0, x1, y1 = map(int, found.objects.boxes[0])
        assert (np.asarray(picture)[y0:y1, x0:x1] == 255).all()
        mirrored += x0 != left
    assert 0 < mirrored < 8


def test_killed_and_resumed_run_sees_the_pictures_of_an_uninterrupted_one(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    plain = run(tiny("florence2"), "caption", pairs, tmp_path / "plain", more={**CHANGED, "batch.augment": []})
    whole = run(tiny("florence2"), "caption", pairs, tmp_path / "whole", more=CHANGED)
    assert losses(whole.history) != losses(plain.history)
    killed_at(job_of(tiny("florence2"), "caption", pairs, tmp_path / "killed", more=CHANGED), 4)
    resumed = run(tiny("florence2"), "caption", pairs, tmp_path / "killed", resume=True, more=CHANGED)
    assert losses(resumed.history) == losses(whole.history)
    weights = [(each.directory / "model.safetensors").read_bytes() for each in (whole, resumed)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("persistent", [pytest.param(False, marks=pytest.mark.slow), True])
def test_workers_know_the_epoch(persistent: bool, tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    # Workers that stay draw fewer random numbers: without dropout that changes nothing.
    fixed = {**CHANGED, **still(tiny("florence2"))}
    here = run(tiny("florence2"), "caption", pairs, tmp_path / "here", more=fixed)
    more = {**fixed, "training.dataloader_num_workers": 1, "training.dataloader_persistent_workers": persistent}
    there = run(tiny("florence2"), "caption", pairs, tmp_path / "there", more=more)
    assert losses(there.history) == losses(here.history)


def test_what_is_measured_is_not_changed(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    still = {**CHANGED, "training.learning_rate": 0.0, "training.max_steps": 1, "evaluation.samples": 2}
    found = [
        run(
            tiny("florence2"), "caption", pairs, tmp_path / str(number), eval_data=pairs,
            more={**still, "batch.augment": names},
        ).metrics
        for number, names in enumerate(([], list(CHANGES)))
    ]  # fmt: skip
    assert found[0] == found[1]


def test_kept_features_and_changed_pictures_exclude_each_other(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    more = {**CHANGED, "batch.augment": ["color"], "model.cache_features": True, "model.freeze": ["vision"]}
    with pytest.raises(RecipeError, match=r"--cache-features keeps .* batch\.augment \(color\) changes pictures"):
        run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more=more)
    assert not (tmp_path / "run").exists()


def test_change_that_would_make_answers_wrong_is_refused(
    tiny: Callable[[str], Path], boxes: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"there is no change 'colour' of pictures. There are\s+color"):
        run(tiny("florence2"), "detection", boxes, tmp_path / "run", more={"batch.augment": ["colour"]})
    with pytest.raises(RecipeError, match=r"batch\.augment=rotate: .* has boxes, which would no longer fit"):
        run(tiny("florence2"), "detection", boxes, tmp_path / "run", more={"batch.augment": ["color", "rotate"]})
    words = draw_jsonl(tmp_path / "words", 2)
    write_lines(words, [{"image": f"{n}.png", "prefix": "where?", "suffix": "cat<loc_3><loc_9>"} for n in range(2)])
    with pytest.raises(RecipeError, match=r"batch\.augment=flip: .*line 1 says places in its text"):
        run(tiny("florence2"), "docvqa", words, tmp_path / "run", more={"batch.augment": ["flip"]})
    assert len(open_data(words, DataSettings())) == 2
