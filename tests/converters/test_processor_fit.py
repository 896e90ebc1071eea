"""Model and processor belong together, or nothing is written; the vocabulary is recorded by name and content."""

from __future__ import annotations

import hashlib
import json
import shutil
from types import SimpleNamespace

import pytest
from florence2_checkpoints import originals
from PIL import Image
from transformers import pipeline

from weightport.api import convert
from weightport.checkpoints import open_checkpoint
from weightport.checkpoints.sources import MAIN, Sources
from weightport.converters.processor import ImageUse, check_processor
from weightport.errors import ConfigurationError, VocabularyError
from weightport.families.florence2.images import RELEASED_TOWER, image_settings
from weightport.families.registry import registry
from weightport.tokenizers import provenance


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return originals(tmp_path_factory)


@pytest.fixture
def folder(original, tmp_path):
    """A Florence-2 folder of one's own, to be changed."""
    return shutil.copytree(original("tiny-main").folder, tmp_path / "folder")


def test_an_image_size_that_nothing_tells_is_refused_not_assumed(folder, tmp_path):
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigurationError, match=r"No preprocessor_config.json beside .*\n.*--vocab none"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = convert(folder, tmp_path / "out", None, vocabulary="none", image_token="append").directory
    assert not (out / "processor_config.json").exists()


def test_image_settings_are_found_where_processors_and_vocabularies_keep_them(folder, tmp_path):
    expected = json.loads((folder / "preprocessor_config.json").read_text())
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    (whole / "preprocessor_config.json").rename(whole / "image.json")
    (whole / "processor_config.json").write_text(json.dumps({"image_processor": expected}))
    bare, vocabulary = tmp_path / "bare", folder
    shutil.copytree(folder, bare)
    (bare / "preprocessor_config.json").unlink()
    for source, options in ((whole, {}), (bare, {"vocabulary": str(vocabulary)})):
        out = convert(source, tmp_path / "out" / source.name, None, **options).directory
        settings = json.loads((out / "processor_config.json").read_text())["image_processor"]
        assert (settings["size"], settings["image_seq_length"]) == (expected["size"], expected["image_seq_length"])


@pytest.mark.parametrize("widths", [[128, 256, 512, 1024], [256, 512, 1024, 2048]])
def test_the_releases_vision_towers_tell_their_image_size(widths):
    vision = SimpleNamespace(embed_dim=widths, **RELEASED_TOWER)
    settings = image_settings(None, vision, "folder")
    assert settings["size"] == {"height": 768, "width": 768} and settings["image_seq_length"] == 577
    with pytest.raises(ConfigurationError, match=r"No preprocessor_config\.json"):
        image_settings(None, SimpleNamespace(embed_dim=widths, **{**RELEASED_TOWER, "depths": [1, 1, 1, 1]}), "folder")


class Tokenizer:
    def __init__(self, ids: int = 10, **special: int) -> None:
        self.vocabulary = {f"token{i}": i for i in range(ids)}
        self.__dict__ |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, **special}

    def get_vocab(self):
        return self.vocabulary

    def convert_ids_to_tokens(self, index):
        return f"token{index}"

    def __call__(self, text):
        return SimpleNamespace(input_ids=[0, 2])


def fit(tokenizer=None, use=ImageUse(4, 4, 4, 17), seq_length=17, image_token_id=5, rows=10, positions=20):  # noqa: B008
    text = SimpleNamespace(
        vocab_size=rows, bos_token_id=0, pad_token_id=1, eos_token_id=2, max_position_embeddings=positions
    )
    config = SimpleNamespace(get_text_config=lambda: text, image_token_id=5)
    size = {"height": 64, "width": 64}
    images = SimpleNamespace(size=size, image_seq_length=seq_length)
    processor = SimpleNamespace(
        tokenizer=tokenizer or Tokenizer(), image_processor=images, image_token_id=image_token_id
    )
    check_processor(processor, config, use)


def test_a_processor_that_fits_is_accepted():
    fit()
    fit(use=ImageUse(30, 30, 42, 0), seq_length=99)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"tokenizer": Tokenizer(11)}, VocabularyError, r"ids up to 10 \('token10'\); the model's embedding has 10"),
        ({"tokenizer": Tokenizer(pad_token_id=3)}, VocabularyError, r"pad_token_id 3 \('token3'\), the model 1"),
        ({"image_token_id": 6}, VocabularyError, r"image_token_id 6 .*, the model 5"),
        ({"use": ImageUse(5, 4, 4, 21)}, ConfigurationError, "5 × 4 features; the model has positions for 4 × 4"),
        ({"seq_length": 577}, ConfigurationError, "17 vectors in all, but the processor writes 577 placeholders"),
        ({"positions": 18}, ConfigurationError, "19 positions with an empty prompt; the text model has 18"),
    ],
)
def test_each_contradiction_of_model_and_processor_is_refused(changes, error, text):
    with pytest.raises(error, match=text):
        fit(**changes)


def test_a_picture_that_leaves_the_text_no_position_is_refused_before_anything_is_written(folder, tmp_path):
    """The model has 64 text positions, and 13 × 13 positions in its image grid."""
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"size": {"height": 384, "width": 384}, "image_seq_length": 145}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigurationError, match="positions with an empty prompt; the text model has 64"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_ofa_trained_on_pictures_beyond_its_positions_is_refused(original, tmp_path):
    import torch

    family = registry()["ofa"]
    case = originals_of_ofa(tmp_path)
    document = torch.load(case, weights_only=False)
    read = family.conversion.read(Sources({MAIN: open_checkpoint(case)}), family.bare_options)
    limit = read.config.image_bucket_size
    document["cfg"]["task"]["patch_image_size"] = 16 * limit + 1
    torch.save({"args": None, "cfg": document["cfg"], "model": document["model"]}, case)
    with pytest.raises(ConfigurationError, match=f"{limit + 1} × {limit + 1} features; the model has positions for"):
        convert(case, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def originals_of_ofa(tmp_path):
    from florence2_checkpoints import CASES, golden

    return golden.materialize(CASES.parent / "ofa" / "cn-tiny", tmp_path / "ofa")


def test_the_vocabulary_s_name_and_content_are_recorded_and_an_unknown_one_warned_of(tmp_path):
    from click.testing import CliRunner

    from weightport.cli import port_ofa

    case = originals_of_ofa(tmp_path)
    result = CliRunner().invoke(port_ofa, [str(case), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "conversion.json").read_text())["vocabulary"]
    assert found["source"] == case.parent.name
    digests = {
        name: hashlib.sha256((case.parent / name).read_bytes()).hexdigest() for name in ("vocab.txt", "dict.txt")
    }
    assert {file["name"]: file["sha256"] for file in found["files"]} == digests
    assert f"vocab    {case.parent.name}: vocab.txt {digests['vocab.txt'][:12]}" in result.output
    assert "warning  vocab.txt, dict.txt are of no release that weightport knows" in result.output
    # The same length with other content, which fits as well: the record tells the two apart.
    pieces = (case.parent / "vocab.txt").read_text().split("\n")
    pieces[200], pieces[201] = pieces[201], pieces[200]
    (case.parent / "vocab.txt").write_text("\n".join(pieces))
    other = convert(case, tmp_path / "other").record["vocabulary"]
    assert other != found and other["source"] == found["source"]


def test_a_known_vocabulary_is_named_without_a_warning(tmp_path, monkeypatch):
    (tmp_path / "vocab.txt").write_text("one\n")
    (tmp_path / "dict.txt").write_text("one 1\n")
    hashes = [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("vocab.txt", "dict.txt")]
    monkeypatch.setattr(provenance, "KNOWN", {hashes[0]: "the origin"})
    found = provenance.ofa_provenance(tmp_path)
    assert found.unknown == ("dict.txt",) and "dict.txt is of no release" in found.warning
    monkeypatch.setattr(provenance, "KNOWN", dict.fromkeys(hashes, "the origin"))
    found = provenance.ofa_provenance(tmp_path)
    assert found.warning is None and found.sentence.endswith("(known: the origin)")


def test_without_a_processor_generate_is_not_the_next_step(original, tmp_path):
    from click.testing import CliRunner

    from weightport.cli import port_ofa

    case = originals_of_ofa(tmp_path)
    for options, offered in (([], True), (["--vocab", "none"], False)):
        result = CliRunner().invoke(port_ofa, [str(case), str(tmp_path / f"out{offered}"), *options])
        line = next(line for line in result.output.splitlines() if line.startswith("next"))
        assert ("weightport generate" in line) is offered


def test_a_chat_asks_florence2_by_its_task_token(original, tmp_path):
    out = convert(original("tiny-main").folder, tmp_path / "out").directory
    pipe = pipeline("image-text-to-text", model=str(out), trust_remote_code=False)
    image = Image.new("RGB", (120, 80), "white")
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": " <CAPTION> "}]}
    ]
    assert pipe.processor.apply_chat_template(messages) == "<CAPTION>"
    settings = {"generate_kwargs": {"max_new_tokens": 8}, "return_full_text": False}
    (answer,) = pipe(text=messages, **settings)
    (plain,) = pipe(images=image, text="<CAPTION>", **settings)
    assert answer["generated_text"] == plain["generated_text"]


def test_an_ofa_whose_pictures_have_no_known_size_gets_one_that_fits_and_is_told_of(tmp_path):
    import torch

    case = originals_of_ofa(tmp_path)
    document = torch.load(case, weights_only=False)
    task = document["cfg"]["task"]
    symbols = ["<mask>", *(f"<code_{i}>" for i in range(task["code_dict_size"]))]
    symbols += [f"<bin_{i}>" for i in range(task["num_bins"])]
    with (case.parent / "dict.txt").open("a") as dictionary:
        dictionary.writelines(f"{symbol} 0\n" for symbol in symbols)
    torch.save({"args": None, "cfg": None, "model": document["model"]}, case)
    result = convert(case, tmp_path / "out")
    limit = result.model.config.image_bucket_size
    size = json.loads((tmp_path / "out" / "processor_config.json").read_text())["image_processor"]["size"]
    assert size == {"height": 16 * limit, "width": 16 * limit}
    assert any(f"{16 * limit} pixels are assumed" in note for note in result.record["notes"])
