"""--overwrite, command by command: what a user keeps in the way of an output is still there afterwards."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from weightport import cli
from weightport.writing.ownership import RECORD


def weightport(*words: object) -> Result:
    return CliRunner().invoke(cli.main, [str(word) for word in words])


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def untouched(tmp_path) -> Iterator[Path]:
    """A folder with everything in it that a test may not change, compared at the end."""
    folder = tmp_path / "mine"
    folder.mkdir()
    yield folder
    before = json.loads((tmp_path / "before.json").read_text())
    assert digests(folder) == before


def refused(tmp_path: Path, folder: Path, *words: object, said: str) -> None:
    """The command ends with one error that says `said`; `folder` is compared with what it was before."""
    (tmp_path / "before.json").write_text(json.dumps(digests(folder)))
    done = weightport(*words)
    assert done.exit_code == 1 and said in done.stderr, done.output
    assert "Traceback" not in done.output


@pytest.fixture(scope="module")
def converted(checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("overwriting") / "out"
    done = weightport("convert", checkpoint, out)
    assert done.exit_code == 0, done.output
    return out


def test_a_conversion_does_not_replace_a_folder_of_photographs(checkpoint, untouched, tmp_path):
    (untouched / "beach.jpg").write_text("x")
    words = ("convert", checkpoint, untouched, "--overwrite")
    refused(tmp_path, untouched, *words, said="not written by weightport")


def test_a_conversion_does_not_replace_its_vocabulary(checkpoint, untouched, tmp_path):
    for name in ("dict.txt", "vocab.txt"):
        shutil.copyfile(checkpoint.parent / name, untouched / name)
    words = ("convert", checkpoint, untouched, "--vocab", untouched, "--overwrite")
    refused(tmp_path, untouched, *words, said="which is read")


def test_a_conversion_does_not_write_into_its_source_folder(converted, checkpoint, untouched, tmp_path):
    shutil.copyfile(checkpoint, untouched / "model.pt")
    (untouched / "vocab").mkdir()
    for name in ("dict.txt", "vocab.txt"):
        shutil.copyfile(checkpoint.parent / name, untouched / "vocab" / name)
    words = ("convert", untouched / "model.pt", untouched / "vocab" / "out", "--vocab", untouched / "vocab")
    refused(tmp_path, untouched, *words, said="Choose an output outside of it")


def test_a_model_that_was_trained_on_is_not_replaced_by_a_new_conversion(converted, checkpoint, untouched, tmp_path):
    shutil.copytree(converted, untouched / "out")
    assert weightport("convert", checkpoint, untouched / "out", "--overwrite", "--quiet").exit_code == 0
    from transformers import AutoModelForImageTextToText

    AutoModelForImageTextToText.from_pretrained(untouched / "out").save_pretrained(untouched / "out")
    words = ("convert", checkpoint, untouched / "out", "--overwrite")
    refused(tmp_path, untouched, *words, said="model.safetensors was changed since weightport wrote it")


def test_a_portable_or_released_directory_is_still_weightports_own(checkpoint, tmp_path):
    from weightport.api import release
    from weightport.release import ReleaseOptions

    class Hub:
        def create_repo(self, *words: object, **named: object) -> None: ...

        preupload_lfs_files = create_commit = create_repo

    out = tmp_path / "out"
    assert weightport("convert", checkpoint, out, "--quiet").exit_code == 0
    release(out, ReleaseOptions("somebody/something"), api=Hub())
    assert (out / "README.md").is_file() and (out / "modeling_ofa.py").is_file()
    done = weightport("convert", checkpoint, out, "--overwrite", "--quiet")
    assert done.exit_code == 0, done.output
    config = out / "config.json"
    config.write_text(config.read_text().replace("{", '{"mine": 1,', 1))
    release(out, ReleaseOptions("somebody/something"), api=Hub())
    refused(tmp_path, out, "convert", checkpoint, out, "--overwrite", said="config.json was changed since")


def test_an_export_does_not_replace_the_models_weights(converted, untouched, tmp_path):
    shutil.copytree(converted, untouched / "out")
    for name in ("model.safetensors", "back.pt"):
        words = ("export", untouched / "out", untouched / "out" / name, "--overwrite")
        refused(tmp_path, untouched, *words, said="Choose an output outside of it")


def test_an_export_replaces_an_export_and_not_the_original(converted, checkpoint, untouched, tmp_path):
    shutil.copyfile(checkpoint, untouched / "original.pt")
    refused(tmp_path, untouched, "export", converted, untouched / "original.pt", "--overwrite", said="not written by")
    assert weightport("export", converted, tmp_path / "back.pt").exit_code == 0
    again = weightport("export", converted, tmp_path / "back.pt")
    assert again.exit_code == 1 and "back.pt exists" in again.stderr, again.stderr
    assert weightport("export", converted, tmp_path / "back.pt", "--overwrite").exit_code == 0
    assert torch.load(tmp_path / "back.pt", weights_only=False)["model"]


@pytest.mark.parametrize("out", ["base", "adapter", "base/merged", "adapter/merged", "."])
def test_a_merge_does_not_replace_its_base_or_adapter(converted, untouched, tmp_path, out):
    shutil.copytree(converted, untouched / "base")
    (untouched / "adapter").mkdir()
    (untouched / "adapter" / "adapter_config.json").write_text("{}")
    words = ("merge-lora", untouched / "base", untouched / "adapter", untouched / out, "--overwrite")
    refused(tmp_path, untouched, *words, said="which is read")
    words = ("extract-lora", untouched / "base", untouched / "adapter", untouched / out, "--rank", 1, "--overwrite")
    refused(tmp_path, untouched, *words, said="which is read")
    words = ("port-adapter", untouched / "adapter", untouched / out, "--base", untouched / "base", "--overwrite")
    refused(tmp_path, untouched, *words, said="which is read")


def test_an_evaluation_does_not_replace_the_run_that_it_evaluates(converted, untouched, tmp_path):
    pytest.importorskip("peft")
    shutil.copytree(converted, untouched / "model")
    (untouched / "data.jsonl").write_text("{}")
    for out, read in ((".", "model"), ("model", "model"), ("model/found", "model")):
        words = ("evaluate", untouched / read, "--data", untouched / "data.jsonl", "--metric", "levenshtein")
        refused(tmp_path, untouched, *words, "-o", untouched / out, "--overwrite", said="which is read")


def test_a_run_does_not_replace_a_project_or_the_model_that_it_trains(converted, untouched, tmp_path):
    pytest.importorskip("peft")
    (untouched / "recipe.yaml").write_text("name: mine")
    (untouched / "train.jsonl").write_text("{}")
    (untouched / "project").mkdir()
    (untouched / "project" / "recipe.yaml").write_text("name: mine")
    (untouched / "project" / "train.py").write_text("x")
    shutil.copytree(converted, untouched / "model")
    for out, said in (
        (".", "which is read"),
        ("project", "not written by weightport"),
        ("model", "which is read"),
        ("model/run", "Choose an output outside of it"),
    ):
        words = ("finetune", untouched / "model", "--data", untouched / "train.jsonl", "-o", untouched / out)
        refused(tmp_path, untouched, *words, "--overwrite", said=said)


def test_outputs_list_their_files_without_weightports_own_record(checkpoint, tmp_path):
    done = weightport("convert", checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / RECORD).is_file() and RECORD not in done.output
