"""port-release: what is refused, what the card says, and what the Hub is asked for."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hub_server import HubServer
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file, save_file

from weightport import cli
from weightport.api import release
from weightport.errors import CheckpointError, ConfigurationError, CoverageError, UsageError, WeightportError
from weightport.release import ReleaseOptions
from weightport.release.usage import usage

REPO = "somebody/ofa-tiny"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_dry_run_shows_files_and_card_and_changes_nothing(model: Path, offline: None) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    result = CliRunner().invoke(cli.port_release, [str(model), "--repo", REPO, "--dry-run"])
    assert result.exit_code == 0, result.output
    for text in ("model.safetensors", "modeling_ofa.py", "README.md", "license:", "nothing was written"):
        assert text in result.output
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_card_has_metadata_that_the_hub_reads(model: Path) -> None:
    card = ModelCard(
        release(model, ReleaseOptions(REPO, base_model="OFA-Sys/ofa-tiny", language=("zh",), dry_run=True)).card
    )
    data = card.data
    assert isinstance(data, ModelCardData)
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "image-to-text")
    assert data.base_model == "OFA-Sys/ofa-tiny" and data.language == ["zh"]
    assert "custom_code" in data.tags


def test_card_says_what_the_records_say_and_nothing_else(model: Path) -> None:
    source = json.loads((model / "conversion.json").read_text())["sources"]["checkpoint"]["files"][0]["sha256"]
    card = release(model, ReleaseOptions(REPO, dry_run=True)).card
    assert source in card and "trust_remote_code=True" in card
    assert "Not measured here: parity with the original and quality on a task" in card
    (model / "metrics.json").write_text(json.dumps({"CIDEr": 1.25}))
    card = release(model, ReleaseOptions(REPO, dry_run=True)).card
    assert "| CIDEr | 1.25 |" in card and "Not measured here: parity with the original." in card


TRAINED = {
    "recipe": {
        "name": "muge-caption",
        "title": "Chinese captions",
        "source": "OFA-Chinese",
        "model": {"method": "lora", "freeze": ["encoder", "embeddings"]},
        "training": {"learning_rate": 5e-5},
    },
    "data": {"name": "muge/train.jsonl", "samples": 550000},
    "eval_data": {"name": "muge/valid.jsonl", "samples": 5000},
    "steps": 42969,
    "epochs": 10.0,
    "samples_per_step": 128,
    "final_loss": 1.25,
    "trainable": {"encoder": [0, 300], "decoder": [100, 700]},
}


def test_card_says_how_the_model_was_trained_and_on_what_it_was_measured(model: Path) -> None:
    (model / "training.json").write_text(json.dumps(TRAINED))
    (model / "metrics.json").write_text(json.dumps({"eval_loss": 1.5, "cider-d": 1.25}))
    card = release(model, ReleaseOptions(REPO, dry_run=True)).card
    for text in (
        "muge-caption: Chinese captions",
        "| standing still | encoder, embeddings |",
        "| trained | 100 of 1,000 parameters |",
        "42,969 of 128 samples, 10 epochs",
        "On muge/valid.jsonl, 5,000 samples:",
    ):
        assert text in card
    results = ModelCard(card).data.eval_results
    assert results is not None
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in results] == [
        ("muge/valid.jsonl", "cider-d", 1.25)
    ]


def test_card_without_a_training_record_speaks_of_no_training(model: Path) -> None:
    card = release(model, ReleaseOptions(REPO, dry_run=True)).card
    assert "fine-tuned" not in card and "model-index" not in card


def test_released_directory_loads_with_its_own_code(model: Path, hub: HubServer) -> None:
    release(model, ReleaseOptions(REPO))
    from transformers import AutoModelForSeq2SeqLM

    assert AutoModelForSeq2SeqLM.from_pretrained(model).num_parameters() > 0


def without_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def changed_weight(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.dtype == torch.float32)
    tensors[name] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


SPOILED: dict[str, tuple[Callable[[Path], Any], type[WeightportError], str]] = {
    "no config": (lambda m: (m / "config.json").unlink(), CheckpointError, "config.json"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), CheckpointError, "weights"),
    "no tokenizer": (
        lambda m: [p.unlink() for p in (*m.glob("vocab*"), *m.glob("tokenizer*"))],
        CheckpointError,
        "tokenizer",
    ),
    "a tensor is missing": (without_tensor, CoverageError, "is missing"),
    "weights changed since": (changed_weight, CheckpointError, "changed since"),
    "truncated": (
        lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-4]),
        CheckpointError,
        "truncated",
    ),
    "config of nothing": (lambda m: (m / "config.json").write_text("{}"), ConfigurationError, "model_type"),
    "an adapter": (lambda m: (m / "adapter_config.json").write_text("{}"), CheckpointError, "adapter"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_directory_that_should_not_be_published_is_refused(what: str, model: Path, offline: None) -> None:
    spoil, error, message = SPOILED[what]
    spoil(model)
    with pytest.raises(error, match=message):
        release(model, ReleaseOptions(REPO))
    assert not (model / "README.md").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (ReleaseOptions("no-owner"), "'no-owner' is no repository: expected ORG/NAME"),
        (ReleaseOptions("a/b/c"), "'a/b/c' is no repository: expected ORG/NAME"),
        (ReleaseOptions(REPO, licence="Do What You Want!"), "is no licence as the Hub names them"),
    ],
)
def test_names_that_the_hub_does_not_take_are_refused(
    options: ReleaseOptions, said: str, model: Path, offline: None
) -> None:
    with pytest.raises(UsageError, match=said):
        release(model, options)


def test_licence_is_asked_for_where_the_family_has_none(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="--licence"):
        release(tmp_path, ReleaseOptions(REPO, dry_run=True))
    found = release(tmp_path, ReleaseOptions(REPO, licence="mit", dry_run=True))
    assert "trust_remote_code" not in found.card and not any(file.name.endswith(".py") for file in found.files)


def test_a_card_shows_the_worst_of_every_main_seam_of_the_parity_report() -> None:
    from types import SimpleNamespace

    from weightport.release.card import _parity

    def compared(seam: str, relative: float, largest: float) -> dict:
        return {
            "seam": seam,
            "dtype": "float32",
            "against": "float32",
            "relative": relative,
            "largest": largest,
            "allowed": 1e-5,
            "verdict": "agrees",
        }

    comparisons = [compared("logits", 1e-7, 2e-7), compared("logits", 3e-7, 6e-7), compared("grad_norm.x", 1.0, 1.0)]
    record = {"verdict": "same model", "source": {"project": "OFA-Sys/OFA"}, "comparisons": comparisons}
    text = _parity(SimpleNamespace(records={"parity.json": record}))
    assert "same model (OFA-Sys/OFA)." in text
    assert "| logits | float32 / float32 | 6.0e-07 | 1.0e-05 | agrees |" in text
    assert "grad_norm" not in text
    assert _parity(SimpleNamespace(records={})) == ""


def code_of(card: str) -> str:
    return card.partition("```python\n")[2].partition("```")[0]


def test_code_on_the_card_runs_from_the_name_to_an_answer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    code = code_of(release(model, ReleaseOptions(REPO)).card)
    assert "generate(" in code and "print(" in code
    Image.new("RGB", (32, 24), "red").save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    exec(code.replace(REPO, str(model)), {})
    assert capsys.readouterr().out.endswith("\n")


def test_code_on_the_card_of_a_text_model_generates(tmp_path: Path) -> None:
    found = SimpleNamespace(
        config={"architectures": ["LlamaForCausalLM"]}, needs_code=False, published={}, family=None
    )
    assert usage(found, REPO).count("AutoModelForCausalLM") == 2 and "generate(" in usage(found, REPO)
    found.config = {"architectures": ["T5ForConditionalGeneration"]}
    assert "AutoModelForSeq2SeqLM" in usage(found, REPO)
    found.config = {"architectures": ["BertModel"]}
    assert "AutoModel\n" not in usage(found, REPO) and "model(**inputs)" in usage(found, REPO)


MERGED = {"name": "a", "weight": 1.0, "rank": 4, "alpha": 8, "modules": 2}


@pytest.mark.parametrize(
    ("bases", "expected"),
    [
        (["microsoft/Florence-2-base"], "microsoft/Florence-2-base"),
        (["a/b", "a/b"], "a/b"),
        (["a/b", "c/d"], None),
        ([None], None),
        (["base"], None),
    ],
)
def test_card_names_the_base_that_the_record_knows(bases: list[str | None], expected: str | None, model: Path) -> None:
    record = {"files": [], "unchanged": 3, "adapters": [{**MERGED, "base_model": base} for base in bases]}
    (model / "merge.json").write_text(json.dumps(record))
    assert ModelCard(release(model, ReleaseOptions(REPO, dry_run=True)).card).data.base_model == expected
    told = release(model, ReleaseOptions(REPO, base_model="told/so", dry_run=True)).card
    assert ModelCard(told).data.base_model == "told/so"
