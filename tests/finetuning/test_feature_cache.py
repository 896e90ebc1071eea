"""Runs with features of frozen parts on disk: the losses of runs without, and nothing computed or used wrongly."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_data import COLOURS, draw_jsonl, encoded, write_lines
from safetensors.torch import load_file, save_file
from tiny_runs import FIXED_RATE, assigned, job_of, losses, run, still

from weightport.errors import DataError, OutputError, RecipeError
from weightport.families.registry import registry
from weightport.finetuning.data.collation import FEATURE_LENGTHS, FEATURES, StoredFeatures
from weightport.finetuning.data.samples import Picture
from weightport.finetuning.features.cached_part import SharedStates
from weightport.finetuning.features.plan import FeaturePlan
from weightport.finetuning.features.store import STATES, FeatureStore, Layout, RecordFile, StoreWriter, open_store
from weightport.finetuning.setup.preparing import prepare
from weightport.finetuning.training.trainer import PortTrainer

FAST = {
    "training.num_train_epochs": 2,
    "training.learning_rate": 1e-3,
    "training.logging_steps": 1,
    "training.per_device_train_batch_size": 4,
    "training.save_strategy": "no",
    "training.eval_strategy": "no",
    "training.dataloader_num_workers": 0,
    **FIXED_RATE,
}
WHOLE_ENCODER = ["vision", "projector", "encoder", "embeddings"]
PICTURES = 3


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine answers to short and long questions about three pictures."""
    path = draw_jsonl(tmp_path_factory.mktemp("questions"), PICTURES)
    prompts = ("what?", "what colour is it, please?")
    rows = [{"image": f"{n % PICTURES}.png", "prefix": prompts[n % 2], "suffix": COLOURS[n % 6]} for n in range(9)]
    return write_lines(path, rows)


def trained(model: Path, data: Path, output: Path, *, cache: bool, **settings: Any) -> Any:
    more = {**FAST, **settings.pop("more", {})}
    recipe = settings.pop("recipe", "default")
    return run(model, recipe, data, output, model__cache_features=cache, more=more, **settings)


def both(model: Path, data: Path, folder: Path, **settings: Any) -> tuple[dict[int, float], dict[int, float], Any]:
    """(losses without features, losses with, the outcome with)."""
    without = trained(model, data, folder / "without", cache=False, **settings)
    with_ = trained(model, data, folder / "with", cache=True, **settings)
    return losses(without.history), losses(with_.history), with_


def part_in(outcome: Any) -> str:
    """The part that the run says it kept."""
    return next(note for note in outcome.notes if "features of the frozen" in note)


@pytest.mark.parametrize(
    ("model", "freeze", "part"),
    [
        ("ofa-cn", WHOLE_ENCODER, "encoder"),
        ("ofa-cn", ["vision"], "vision tower"),
        ("florence2", WHOLE_ENCODER, "encoder"),
        ("florence2", ["vision", "projector"], "projector"),
        ("florence2", ["vision"], "vision tower"),
        ("paligemma2", ["vision", "projector"], "projector"),
        ("paligemma2", ["vision"], "vision tower"),
        ("blip2", ["vision", "bridge"], "image vectors"),
        ("blip2", ["vision", "norm"], "vision encoder"),
        ("blip2-t5", ["vision", "bridge"], "image vectors"),
        ("moondream2", ["vision", "projector"], "projector"),
    ],
)
def test_losses_are_those_of_a_run_without_features(
    model: str, freeze: list[str], part: str, tiny: Callable[[str], Path], questions: Path, tmp_path: Path
) -> None:
    # Dropout acts in what is trained: its random numbers are the same too.
    without, with_, outcome = both(tiny(model), questions, tmp_path, model__freeze=freeze)
    assert len(without) == 6
    assert with_ == pytest.approx(without, rel=0, abs=2e-6)
    assert f"features of the frozen {part} are computed" in part_in(outcome)


def test_one_prompt_gives_the_same_bits(tiny: Callable[[str], Path], muge: Path, tmp_path: Path) -> None:
    without, with_, _ = both(tiny("ofa-cn"), muge, tmp_path, recipe="muge-caption", batch__image_size=64)
    assert with_ == without, "muge-caption's features are of one shape, and batches are full"


def test_mixed_precision_keeps_what_its_linear_layers_read(
    tiny: Callable[[str], Path], muge: Path, tmp_path: Path
) -> None:
    more = {"training.bf16": True, "training.fp16": False, "training.use_cpu": True, "batch.image_size": 64}
    without, with_, outcome = both(tiny("ofa-cn"), muge, tmp_path, recipe="muge-caption", more=more)
    assert "bfloat16" in part_in(outcome)
    assert with_ == without


def test_adapters_outside_the_frozen_part_learn_the_same(
    tiny: Callable[[str], Path], questions: Path, tmp_path: Path
) -> None:
    without, with_, outcome = both(
        tiny("florence2"), questions, tmp_path, model__method="lora", model__freeze=["vision", "projector"]
    )
    assert "frozen projector" in part_in(outcome)
    assert with_ == pytest.approx(without, rel=0, abs=2e-6)


def test_no_picture_is_read_while_training(
    tiny: Callable[[str], Path], questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = Picture.read
    monkeypatch.setattr(Picture, "read", lambda self, draft=None: read.append(self.key) or original(self, draft))
    trained(tiny("florence2"), questions, tmp_path / "run", cache=True, model__freeze=["vision"])
    assert len(read) == PICTURES + 2, "each picture once, one to try the batches and one to see the features' shape"


def test_answers_are_generated_from_pictures_all_the_same(
    tiny: Callable[[str], Path], questions: Path, tmp_path: Path
) -> None:
    settings = {"eval_data": questions, "model__freeze": ["vision"], "evaluation__generation": {"max_new_tokens": 4}}
    settings["more"] = still(tiny("florence2"))
    without = trained(tiny("florence2"), questions, tmp_path / "without", cache=False, **settings)
    with_ = trained(tiny("florence2"), questions, tmp_path / "with", cache=True, **settings)
    assert with_.metrics == pytest.approx(without.metrics)


def test_a_wrong_record_shows_in_the_losses(tiny: Callable[[str], Path], questions: Path, tmp_path: Path) -> None:
    settings = {"model__freeze": ["vision"], "model__feature_folder": str(tmp_path / "features")}
    right = trained(tiny("florence2"), questions, tmp_path / "right", cache=True, **settings)
    (states,) = (tmp_path / "features").glob(f"*/{STATES}")
    kept = np.fromfile(states, dtype=np.float32)
    np.concatenate([kept[len(kept) // PICTURES :], kept[: len(kept) // PICTURES]]).tofile(states)
    wrong = trained(tiny("florence2"), questions, tmp_path / "wrong", cache=True, **settings)
    assert "are used again" in part_in(wrong)
    assert losses(wrong.history) != pytest.approx(losses(right.history), rel=0, abs=2e-6)


def planned(model: Path, data: Path, folder: Path, **settings: Any) -> Any:
    """The plan of a run that is not begun."""
    more = {**FAST, "model.feature_folder": str(folder / "features"), **settings.pop("more", {})}
    job = job_of(model, "default", data, folder / "never", model__cache_features=True, more=more, **settings)
    return prepare(job).features


def test_the_key_changes_with_what_the_features_depend_on(
    tiny: Callable[[str], Path], questions: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny("florence2"), tmp_path / "model")
    data = shutil.copytree(questions.parent, tmp_path / "data") / questions.name
    first = planned(model, data, tmp_path, model__freeze=["vision"]).layout.key

    def key(**settings: Any) -> str:
        return str(planned(model, data, tmp_path, **{"model__freeze": ["vision"], **settings}).layout.key)

    assert key() == first
    assert key(training__learning_rate=1.0, batch__max_target_length=9) == first, "these change no feature"
    found = {
        "part": key(model__freeze=["vision", "projector"]),
        "size": key(batch__image_size=64),
        "attention": key(model__attention="eager"),
        "precision": key(training__bf16=True, training__use_cpu=True),
        "config": key(more={"model.config.vision_config.drop_path_rate": 0.0}),
    }
    encoder = {
        prompt: key(model__freeze=WHOLE_ENCODER, batch__prompt=prompt) for prompt in ("a {prefix}", "b {prefix}")
    }
    (data.parent / "0.png").write_bytes(encoded(5))
    found["picture"] = key()
    weights = load_file(model / "model.safetensors")
    weights["model.vision_tower.convs.0.conv.weight"][0, 0, 0, 0] += 1e-3
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    found["weights"] = key()
    keys = [first, *found.values(), *encoder.values()]
    assert len(set(keys)) == len(keys)


def test_features_that_a_stopped_run_left_are_computed_again(
    tiny: Callable[[str], Path], questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model__freeze": ["vision"], "model__feature_folder": str(tmp_path / "features")}
    original = RecordFile.write

    def stop(self: RecordFile, record: int, states: torch.Tensor) -> None:
        if record == PICTURES - 1:
            raise KeyboardInterrupt
        original(self, record, states)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(RecordFile, "write", stop)
        trained(tiny("florence2"), questions, tmp_path / "stopped", cache=True, **settings)
    assert [path.suffix for path in (tmp_path / "features").iterdir() if path.is_dir()] == [".partial"]
    assert not (tmp_path / "stopped").exists()

    right = trained(tiny("florence2"), questions, tmp_path / "right", cache=True, **settings)
    assert "are computed" in part_in(right)
    (states,) = (tmp_path / "features").glob(f"*/{STATES}")
    states.write_bytes(states.read_bytes()[:-1])
    again = trained(tiny("florence2"), questions, tmp_path / "again", cache=True, **settings)
    assert "are computed" in part_in(again), "a file that lost its end was used"
    assert losses(again.history) == losses(right.history)


def test_a_replaced_run_keeps_only_the_features_that_it_uses(
    tiny: Callable[[str], Path], questions: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    trained(tiny("florence2"), questions, output, cache=True, model__freeze=["vision"])
    again = trained(tiny("florence2"), questions, output, cache=True, model__freeze=["vision"], overwrite=True)
    assert "are used again" in part_in(again)
    trained(tiny("florence2"), questions, output, cache=True, model__freeze=["vision", "projector"], overwrite=True)
    assert len([path for path in (output / "features").iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model__freeze": []}, "nothing to keep"),
        ({"model__freeze": ["decoder"]}, "--freeze vision"),
        ({"model__freeze": ["vision"], "model__frozen_mode": "train"}, "stand still"),
        (
            {
                "model__freeze": ["vision"],
                "model__method": "lora",
                "lora__modules_to_save": ["conv1"],
            },
            "no adapter inside",
        ),
    ],
)
def test_parts_that_do_not_stand_still_are_refused(
    settings: dict[str, Any], message: str, tiny: Callable[[str], Path], questions: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        trained(tiny("florence2"), questions, tmp_path / "run", cache=True, **settings)
    assert not (tmp_path / "run").exists()


def test_what_attends_to_padding_is_not_kept(tiny: Callable[[str], Path], questions: Path, tmp_path: Path) -> None:
    plan = planned(tiny("florence2"), questions, tmp_path, model__freeze=WHOLE_ENCODER, batch__attend_padding=True)
    assert plan.part.name == "projector"


def test_too_little_disk_is_said_before_the_run(
    tiny: Callable[[str], Path], questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("weightport.finetuning.features.store.shutil.disk_usage", lambda path: usage(100))
    monkeypatch.setattr("weightport.finetuning.setup.preparing._require_space", lambda *given, **named: None)
    with pytest.raises(OutputError, match=r"--cache-features needs .* model\.feature_folder"):
        trained(tiny("florence2"), questions, tmp_path / "run", cache=True, model__freeze=["vision"])


def test_a_broken_picture_ends_the_run_or_is_left_out_as_ever(
    tiny: Callable[[str], Path], questions: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(questions.parent, tmp_path / "data") / questions.name
    (data.parent / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"annotations\.jsonl, line 2: .*(\n.*)*--skip-bad"):
        trained(tiny("florence2"), data, tmp_path / "run", cache=True, model__freeze=["vision"])
    settings = {"model__freeze": ["vision"], "data__skip_bad": 3, "more": {"training.per_device_train_batch_size": 5}}
    without, with_, outcome = both(tiny("florence2"), data, tmp_path, **settings)
    assert with_ == pytest.approx(without, rel=0, abs=2e-6)
    assert any("3 samples were left out" in note for note in outcome.notes)


def test_a_sample_without_a_picture_is_refused_by_name(
    tiny: Callable[[str], Path], questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weightport.finetuning.data.entries import EntrySamples
    from weightport.finetuning.data.samples import Sample

    bare = Sample("text.jsonl, line 5", None, "why?", "because", ("because",))
    original = EntrySamples.__getitem__
    monkeypatch.setattr(EntrySamples, "__getitem__", lambda self, i: bare if i == 4 else original(self, i))
    with pytest.raises(DataError, match=r"text\.jsonl, line 5: a sample without a picture"):
        trained(tiny("florence2"), questions, tmp_path / "run", cache=True, model__freeze=["vision"])


def test_two_processes_fill_and_read_one_store(tiny: Callable[[str], Path], questions: Path, tmp_path: Path) -> None:
    data = write_lines(questions.parent / "eight.jsonl", questions.read_bytes().splitlines()[:8])
    model = tiny("ofa-cn")
    settings = {**FAST, **still(model), "model.freeze": WHOLE_ENCODER}
    single = run(model, "default", data, tmp_path / "single", more=settings)
    halves = assigned({**settings, "training.per_device_train_batch_size": 2, "training.use_cpu": True})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--no-python", str(Path(sys.executable).with_name("port-finetune")), str(model), "-q"]
    command += ["--data", str(data), "-o", str(tmp_path / "two"), "--cache-features", *halves]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    assert losses(tmp_path / "two") == pytest.approx(losses(single.history), rel=0, abs=5e-6)
    (store,) = (path for path in (tmp_path / "two" / "features").iterdir() if path.is_dir())
    assert (np.fromfile(store / "lengths.bin", dtype=np.int32) > 0).all()


def test_every_beginning_holds_the_parts_that_it_runs_through() -> None:
    for family in (each.training for each in registry()):
        for part in family.cached:
            assert set(part.frozen) <= set(family.parts.prefixes)
        sizes = [len(part.frozen) for part in family.cached]
        assert sizes == sorted(sizes, reverse=True), "the longest beginning is chosen first"


def test_shorter_records_are_read_with_zeros_behind_them(tmp_path: Path) -> None:
    layout = Layout("k" * 64, 3, (4, 2), torch.bfloat16)
    writer = StoreWriter(tmp_path / "store", layout)
    writer.begin()
    with writer.writing() as file:
        file.write(0, torch.full((2, 2), 1.5, dtype=torch.bfloat16))
        file.write(2, torch.full((3, 2), -2.0, dtype=torch.bfloat16))
    assert open_store(tmp_path / "store", layout) is None, "what is not finished is no store"
    writer.finish()
    store = open_store(tmp_path / "store", layout)
    assert isinstance(store, FeatureStore)
    states, lengths = pickle.loads(pickle.dumps(store)).read([2, 0])
    assert lengths.tolist() == [3, 2]
    assert states.tolist() == [[[-2, -2]] * 3, [[1.5, 1.5]] * 2 + [[0, 0]]]
    assert store.lengths.tolist() == [2, 0, 3], "a record that was never written has no rows"
    assert open_store(tmp_path / "store", Layout("l" * 64, 3, (4, 2), torch.bfloat16)) is None
    assert json.loads((tmp_path / "store" / "header.json").read_text())["shape"] == [4, 2]


@pytest.mark.parametrize("model", ["ofa-cn", "florence2"])
def test_a_frozen_beginning_keeps_no_activations(
    model: str, tiny: Callable[[str], Path], questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    original = PortTrainer.compute_loss

    def watched(self: PortTrainer, net: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        assert FEATURES not in inputs and FEATURE_LENGTHS not in inputs
        pixels = inputs["pixel_values"]
        tower = (net.model.encoder if model == "ofa-cn" else net.model).vision_tower
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
            tower(pixels)
        return original(self, net, inputs, *args, **kwargs)

    monkeypatch.setattr(PortTrainer, "compute_loss", watched)
    trained(tiny(model), questions, tmp_path / "run", cache=False, model__freeze=["vision"])
    assert not saved


@pytest.mark.parametrize(
    ("model", "freeze", "part"),
    [
        ("ofa-cn", WHOLE_ENCODER, "encoder"),
        ("ofa-cn", ["vision"], "vision tower"),
        ("florence2", ["vision", "projector"], "projector"),
    ],
)
def test_samples_that_share_features_have_the_losses_of_samples_that_do_not(
    model: str,
    freeze: list[str],
    part: str,
    tiny: Callable[[str], Path],
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[int] = []
    read_records = FeatureStore.read

    def count(store: FeatureStore, records: list[int]) -> Any:
        read.append(len(records))
        return read_records(store, records)

    monkeypatch.setattr(FeatureStore, "read", count)
    settings = {"batch__group_by_image": True, "model__freeze": freeze}
    settings["more"] = {"training.gradient_checkpointing": model == "ofa-cn", "training.max_steps": 4}
    shared = trained(tiny(model), questions, tmp_path / "shared", cache=True, **settings)
    assert part in part_in(shared)
    # Nine questions about three pictures, in batches of four (and one of one): two of a batch share a record.
    assert 0 < sum(read) < 17
    monkeypatch.setattr(FeaturePlan, "stored", lambda self, store: StoredFeatures(store, self.records.of))
    alone = trained(tiny(model), questions, tmp_path / "alone", cache=True, **settings)
    assert max(read) == 4
    assert losses(shared.history) == pytest.approx(losses(alone.history), rel=0, abs=2e-6)


def test_keys_of_a_picture_are_projected_once(
    tiny: Callable[[str], Path], muge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    by_sample = SharedStates.by_sample

    def note(held: SharedStates, states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        seen.append((len(states), len(rows)))
        return by_sample(held, states, rows)

    projected: list[int] = []
    linear = torch.nn.Linear.forward

    def count(module: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
        if states.dim() == 3 and states.shape[1] > 16:
            projected.append(len(states))
        return linear(module, states)

    monkeypatch.setattr(SharedStates, "by_sample", note)
    monkeypatch.setattr(torch.nn.Linear, "forward", count)
    # Two captions a picture, which follow each other.
    trained(
        tiny("ofa-cn"), muge, tmp_path / "run", cache=True, recipe="muge-caption", batch__image_size=64,
        batch__group_by_image=True, more={"training.max_steps": 1},
    )  # fmt: skip
    assert seen == [(2, 4)]
    assert projected.count(2) >= 4, "keys and values of two layers"
