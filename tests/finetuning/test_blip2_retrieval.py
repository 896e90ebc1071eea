"""Recall of image-text retrieval: LAVIS's scores, ranks, and what `weightport evaluate` makes of them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from drawn_data import draw_jsonl, write_lines
from PIL import Image
from tiny_runs import GOLDEN, run
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor

from weightport import cli
from weightport.families.blip2.retrieval import Blip2Retrieval, caption
from weightport.finetuning.evaluation import retrieval
from weightport.finetuning.evaluation.retrieval import MISSED, Gallery, ranked
from weightport.finetuning.metrics.ranking import recall

sys.path.insert(0, str(GOLDEN))

from golden_case import Case

CASE = Case(GOLDEN / "cases" / "blip2" / "itm-tiny", "itm-tiny")
ITM = "blip2/itm-tiny"


def weightport(*words: object) -> Result:
    return CliRunner().invoke(cli.main, [str(word) for word in words])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The case's pictures with its captions."""
    folder = tmp_path_factory.mktemp("photos")
    captions = CASE.spec["reference"]["captions"]
    for number in range(len(captions)):
        Image.fromarray(CASE.tensors[f"image.{number}"].numpy()).save(folder / f"{number}.png")
    rows = [{"image": f"{number}.png", "text": text} for number, text in enumerate(captions)]
    return write_lines(folder / "captions.jsonl", rows)


def test_captions_are_cleaned_as_lavis_does() -> None:
    stated = CASE.spec["reference"]["caption_processor_cases"]
    assert len(stated["cases"]) >= 30
    for case in stated["cases"]:
        assert stated["prompt"] + caption(case["text"]) == case["caption"], case["text"]


def test_scores_are_those_that_lavis_ranks_by(tiny: Callable[[str], Path]) -> None:
    stage, given = Blip2Retrieval(), CASE.tensors
    model = AutoModelForZeroShotImageClassification.from_pretrained(tiny(ITM), dtype=torch.float32).eval()
    # The norm behind the vision encoder as LAVIS has it: what transformers' single epsilon changes is 1e-5.
    model.vision_model.post_layernorm.eps = 1e-5
    processor = AutoProcessor.from_pretrained(tiny(ITM))
    texts = stage.texts(processor, CASE.spec["reference"]["captions"])
    assert torch.equal(texts["input_ids"], given["input_ids"])
    pictures = [Image.fromarray(given[f"image.{number}"].numpy()) for number in range(3)]
    pixels = stage.pictures(processor, pictures)
    assert torch.equal(pixels, given["pixel_values"])
    with torch.no_grad():
        states = stage.states(model, pixels)
        similarity = (stage.image_vectors(model, states) @ stage.text_vectors(model, texts).t()).amax(1)
        logits = torch.stack([stage.matches(model, each[None], texts) for each in states])
    assert torch.allclose(similarity, given["itc"], atol=2e-6)
    assert torch.allclose(logits, given["itm"][..., 1], atol=5e-6)
    assert torch.allclose(logits.diagonal(), given["compute_itm"], atol=5e-6)


def ranks_of(scores: torch.Tensor) -> tuple[list[int], list[int]]:
    """Of a picture's own text, and of a text's own picture, where text i belongs to picture i."""
    own = scores.diagonal()
    others = scores.clone().fill_diagonal_(-torch.inf)
    return (others >= own[:, None]).sum(1).tolist(), (others >= own[None]).sum(0).tolist()


@pytest.mark.parametrize("rerank", [128, 0])
def test_recall_is_that_of_lavis_scores(
    rerank: int, tiny: Callable[[str], Path], photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "found"
    words = ["evaluate", tiny(ITM), "--data", photos, "--metric", "recall", "--set", f"rerank={rerank}", "-o", out]
    done = weightport(*words, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["metrics"]
    itc, itm = CASE.tensors["itc"], CASE.tensors["itm"][..., 1]
    for ending, scores in (("", itc + itm if rerank else itc), ("-contrast", itc)):
        by_picture, by_text = ranks_of(scores)
        assert found[f"recall-text-1{ending}"] == pytest.approx(100 * by_picture.count(0) / 3)
        assert found[f"recall-image-1{ending}"] == pytest.approx(100 * by_text.count(0) / 3)
        assert found[f"recall-text-5{ending}"] == found[f"recall-image-10{ending}"] == 100
        assert found[f"recall{ending}"] == pytest.approx(
            sum(found[f"recall-{what}-{cut}{ending}"] for what in ("text", "image") for cut in (1, 5, 10)) / 6
        )
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    best = (itc + itm if rerank else itc).argmax(1).tolist()
    assert [row["text"] for row in rows] == [CASE.spec["reference"]["captions"][each] for each in best]
    assert json.loads((out / "metrics.json").read_text()) == found


def test_only_the_nearest_are_reranked_and_the_rest_are_missed(
    tiny: Callable[[str], Path], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    own = Blip2Retrieval.matches

    def counted(self: Any, model: Any, states: Any, texts: Any) -> torch.Tensor:
        asked.append(len(texts["input_ids"]))
        return own(self, model, states, texts)

    monkeypatch.setattr(Blip2Retrieval, "matches", counted)
    done = weightport("evaluate", tiny(ITM), "--data", photos, "--set", "rerank=1", "--json")
    found = json.loads(done.stdout)["metrics"]
    itc = CASE.tensors["itc"]
    nearest = {(row, int(each)) for row, each in enumerate(itc.argmax(1))} | {
        (int(each), column) for column, each in enumerate(itc.argmax(0))
    }
    assert sum(asked) == len(nearest)
    # Of one candidate each, recall at 10 is recall at 1.
    assert found["recall-text-10"] == found["recall-text-1"] and found["recall-image-10"] == found["recall-image-1"]


def gallery(*owner: int) -> Gallery:
    return Gallery(tuple(range(max(owner) + 1)), tuple(map(str, owner)), owner)


def test_ranks_count_what_stands_before_what_belongs() -> None:
    # Two pictures; the first has two texts.
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.2, 0.95, 0.4]])
    found = ranked(scores, gallery(0, 0, 1))
    assert found.texts == [0, 1] and found.pictures == [1, 1, 1] and found.best == [1, 1]


def test_what_scores_the_same_stands_before_what_belongs_so_that_a_constant_finds_nothing() -> None:
    found = ranked(torch.zeros(3, 3), gallery(0, 1, 2))
    assert found.texts == [2, 2, 2] and found.pictures == [2, 2, 2]


def test_what_was_not_looked_at_is_never_found() -> None:
    scores = torch.tensor([[-torch.inf, 0.3], [0.2, -torch.inf]])
    found = ranked(scores, gallery(0, 1))
    assert found.texts == [MISSED, MISSED] and recall(found.texts, found.pictures).value == 0


def test_texts_of_one_picture_in_several_rows_belong_to_one_picture(tiny: Callable[[str], Path], photos: Path) -> None:
    rows = [json.loads(line) for line in photos.read_text().splitlines()]
    more = write_lines(photos.parent / "more.jsonl", [*rows, {"image": "0.png", "text": "another text of it"}])
    done = weightport("evaluate", tiny(ITM), "--data", more, "--set", "previews=0", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["samples"] == 3


def test_batches_of_texts_change_nothing(
    tiny: Callable[[str], Path], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluate", tiny(ITM), "--data", photos, "--json"]
    whole = weightport(*words).stdout
    monkeypatch.setattr(retrieval, "TEXTS", 1)
    assert weightport(*words).stdout == whole


def test_other_metrics_of_a_model_that_answers_nothing_are_refused(tiny: Callable[[str], Path], photos: Path) -> None:
    done = weightport("evaluate", tiny(ITM), "--data", photos, "--metric", "cider-d")
    assert done.exit_code == 2
    assert "answers nothing" in done.output and "--metric recall" in done.output


def test_recall_of_a_model_that_answers_in_words_is_refused_before_it_is_loaded(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    done = weightport("evaluate", tiny("blip2"), "--data", pairs, "--metric", "recall")
    assert done.exit_code == 2 and "this model answers in words" in done.output
    from weightport.errors import UsageError

    more = {"evaluation.metrics": ["recall"], "training.bf16": False}
    with pytest.raises(UsageError, match="this model answers in words"):
        run(tiny("blip2"), "lora-caption", pairs, tmp_path / "run", eval_data=pairs, more=more)
    assert not (tmp_path / "run").exists()


def test_an_adapter_beside_a_model_for_retrieval_is_refused(
    tiny: Callable[[str], Path], photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "adapter").mkdir()
    done = weightport("evaluate", tiny(ITM), "--data", photos, "--adapter", tmp_path / "adapter")
    assert done.exit_code == 2 and "merge it" in done.output


def test_data_without_texts_or_with_one_picture_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    data = draw_jsonl(tmp_path / "one", 1)
    done = weightport("evaluate", tiny(ITM), "--data", data)
    assert done.exit_code == 1 and "nothing can be confused with it" in done.output


def test_a_bad_picture_is_left_out_where_that_is_allowed(
    tiny: Callable[[str], Path], photos: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in photos.read_text().splitlines()]
    (photos.parent / "bad.png").write_bytes(b"no picture")
    data = write_lines(photos.parent / "bad.jsonl", [*rows, {"image": "bad.png", "text": "a broken one"}])
    done = weightport("evaluate", tiny(ITM), "--data", data)
    assert done.exit_code == 1 and "bad.png cannot be read as a picture" in done.output
    done = weightport("evaluate", tiny(ITM), "--data", data, "--skip-bad", 1, "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["samples"] == 3


def test_a_model_for_retrieval_is_not_asked(tiny: Callable[[str], Path], photos: Path) -> None:
    done = weightport("generate", tiny(ITM), photos.parent / "0.png", "--prompt", "a photo of")
    assert done.exit_code == 2 and "it answers nothing" in done.output and "--metric recall" in done.output


def test_a_model_that_lacks_weights_is_not_asked_with_random_numbers(
    tiny: Callable[[str], Path], photos: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny("blip2"), tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    del weights["language_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    done = weightport("generate", folder, photos.parent / "0.png")
    assert done.exit_code == 1 and "has no weights for language_projection.weight" in done.output
