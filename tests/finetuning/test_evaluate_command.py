"""`weightport evaluate` measures what the run measured at its end; `weightport recipes` shows what there is."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from drawn_data import draw_jsonl
from tiny_runs import RECIPES, assigned, run, still

from weightport import cli
from weightport.cli import finetuning
from weightport.finetuning.recipes import recipe as recipes
from weightport.finetuning.recipes.recipe import parse_recipe, plain, shipped_recipes

STEPS = {
    "training.learning_rate": 5e-3,
    "training.warmup_steps": 0,
    "training.per_device_train_batch_size": 4,
    "training.max_steps": 12,
    "training.save_strategy": "no",
    "training.eval_strategy": "no",
    "training.logging_steps": 5,
    "training.dataloader_num_workers": 0,
}


def weightport(*words: object) -> Result:
    return CliRunner().invoke(cli.main, [str(word) for word in words])


@pytest.mark.parametrize("name", ["muge-caption-ofa-cn", "docvqa-florence2", "detection-florence2", "default-ofa"])
def test_evaluation_gives_what_the_run_measured_at_its_end(
    name: str, tiny: Callable[[str], Path], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    recipe, model, data, settings = RECIPES[name]
    source = request.getfixturevalue(data)
    out = run(tiny(model), recipe, source, tmp_path / "run", eval_data=source, more={**STEPS, **settings})
    done = weightport(
        "evaluate", out.directory, "--data", source, "--recipe", tmp_path / "run" / "recipe.yaml", "--json"
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    measured = {key: value for key, value in out.metrics.items() if key != "eval_loss"}
    assert found["metrics"] == pytest.approx(measured, abs=1e-9)
    (answers,) = (tmp_path / "run" / "predictions").iterdir()
    assert found["samples"] == len(answers.read_text("utf-8").splitlines())


def test_evaluation_writes_metrics_settings_and_answers(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    words = ["evaluate", tiny("florence2"), "--data", pairs, "--metric", "exact-match", "--metric", "anls"]
    words += ["--set", "dataloader_num_workers=0", "-o", tmp_path / "found"]
    done = weightport(*words)
    assert done.exit_code == 0, done.output
    assert "exact-match" in done.output and "anls" in done.output
    metrics = json.loads((tmp_path / "found" / "metrics.json").read_text())
    assert set(metrics) == {"exact-match", "anls"}
    rows = [json.loads(line) for line in (tmp_path / "found" / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert rows[1]["place"].endswith("annotations.jsonl, line 2")
    assert rows[1]["references"] == ["big dog in sun"]
    settings = json.loads((tmp_path / "found" / "evaluation.json").read_text())
    assert settings["recipe"]["evaluation"]["metrics"] == ["exact-match", "anls"]

    again = weightport(*words)
    assert again.exit_code == 1 and "--overwrite" in again.output
    assert weightport(*words, "--overwrite").exit_code == 0


def test_adapter_is_evaluated_on_its_base(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    more = {**STEPS, "model.method": "lora", "training.learning_rate": 2e-2}
    more |= {"training.max_steps": 30, "evaluation.metrics": ["levenshtein"], **still(tiny("florence2"))}
    out = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs, more=more)
    words = ["--data", pairs, "--recipe", tmp_path / "run" / "recipe.yaml", "--json"]
    with_adapter = weightport("evaluate", tiny("florence2"), "--adapter", out.directory, *words)
    without = weightport("evaluate", tiny("florence2"), *words)
    assert with_adapter.exit_code == without.exit_code == 0, with_adapter.output + without.output
    measured = {key: value for key, value in out.metrics.items() if key != "eval_loss"}
    assert json.loads(with_adapter.stdout)["metrics"] == pytest.approx(measured, abs=1e-9)
    assert json.loads(without.stdout)["metrics"] != json.loads(with_adapter.stdout)["metrics"]


def test_evaluation_refuses_what_cannot_be(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    model = tiny("florence2")
    bad = draw_jsonl(tmp_path / "bad")
    (tmp_path / "bad" / "1.png").write_bytes(b"no picture")
    cases = [
        ([model, "--data", pairs, "--metric", "beauty"], 2, "beauty"),
        ([model, "--data", pairs, "--set", "evaluation.metrics=[]"], 2, "--metric"),
        ([model, "--data", pairs, "--set", "evaluation.generation.num_beams=0"], 2, "num_beams"),
        ([tmp_path / "bad", "--data", pairs], 1, "not a model directory"),
        ([model, "--data", tmp_path / "none.jsonl"], 2, "does not exist"),
        ([model, "--data", pairs, "--adapter", tmp_path / "bad"], 1, "not an adapter"),
        ([model, "--data", pairs, "--metric", "ap"], 1, "boxes"),
        ([model, "--data", bad, "--set", "dataloader_num_workers=0"], 1, "line 2"),
        ([model, "--data", pairs, "--device", "abacus"], 2, "abacus"),
    ]
    for words, status, part in cases:
        done = weightport("evaluate", *words, "-o", tmp_path / "found")
        assert done.exit_code == status and part in done.output, (words, done.output)
        assert "defect" not in done.output and not (tmp_path / "found").exists()
    skipped = weightport("evaluate", model, "--data", bad, "--set", "dataloader_num_workers=0", "--skip-bad", "1")
    assert skipped.exit_code == 0, skipped.output


def test_adapter_of_another_model_is_refused(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    more = {**STEPS, "model.method": "lora", "training.max_steps": 1, "batch.image_size": 64}
    out = run(tiny("ofa"), "default", pairs, tmp_path / "run", more=more)
    done = weightport("evaluate", tiny("florence2"), "--adapter", out.directory, "--data", pairs)
    assert done.exit_code == 1 and "does not fit" in done.output, done.output


def test_recipes_are_listed_and_shown(tmp_path: Path) -> None:
    listed = weightport("recipes")
    assert listed.exit_code == 0
    everything = json.loads(weightport("recipes", "--json").stdout)
    assert set(everything) == set(shipped_recipes())
    for name, recipe in shipped_recipes().items():
        assert name in listed.output
        shown = weightport("recipes", name)
        assert shown.exit_code == 0
        assert plain(parse_recipe(shown.output, name)) == plain(recipe), "what is shown is another recipe"
        assert json.loads(weightport("recipes", name, "--json").stdout) == everything[name]
        (tmp_path / f"{name}.yaml").write_text(shown.output, "utf-8")
        assert yaml.safe_load(weightport("recipes", tmp_path / f"{name}.yaml").output)["name"] == name
    unknown = weightport("recipes", "docvqua")
    assert unknown.exit_code == 2 and "docvqa" in unknown.output


def test_recipes_are_shown_without_peft(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("name: a\ntitle: b\nfamilies: [ofa]\nlora: {r: 4, target_modules: [q_proj]}\n", "utf-8")
    monkeypatch.setitem(sys.modules, "peft", None)
    for name in ("accelerate", "peft"):
        monkeypatch.setitem(finetuning.EXTRA, name, "a_library_that_nobody_has")
    monkeypatch.setattr(recipes, "_has_peft", lambda: False)
    recipes.known_settings.cache_clear()
    try:
        for words in (["recipes"], ["recipes", "docvqa"], ["recipes", own]):
            done = weightport(*words)
            assert done.exit_code == 0, done.output
        assert "target_modules" in done.output
        training = weightport("finetune", tmp_path, "--data", "x", "-o", tmp_path / "run")
        assert training.exit_code == 2 and "pip install '.[finetune]' in weightport's checkout" in training.output
    finally:
        recipes.known_settings.cache_clear()


def test_run_by_command_and_its_recipe_file_again(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    words = [tiny("florence2"), "--data", pairs, "--eval-data", pairs]
    first = [*words, "-o", tmp_path / "a", "--recipe", "docvqa", *assigned(STEPS), "--freeze", "vision", "--json"]
    done = CliRunner().invoke(cli.port_finetune, [str(word) for word in first])
    assert done.exit_code == 0, done.output
    second = [*words, "-o", tmp_path / "b", "--recipe", tmp_path / "a" / "recipe.yaml", "--json"]
    again = CliRunner().invoke(cli.port_finetune, [str(word) for word in second])
    assert json.loads(done.stdout)["metrics"] == json.loads(again.stdout)["metrics"]
    histories = [json.loads((tmp_path / each / "history.json").read_text()) for each in "ab"]
    assert [row.get("loss") for row in histories[0]] == [row.get("loss") for row in histories[1]]
    assert {path.name for path in (tmp_path / "a").iterdir()} >= {
        "model", "metrics.json", "history.json", "report.html", "recipe.yaml", "predictions",
    }  # fmt: skip
    shutil.rmtree(tmp_path / "a" / "model")
