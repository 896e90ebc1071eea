"""`weightport generate` on a converted moondream2: questions about pictures, and what cannot be asked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from weightport import cli

CASES = Path(__file__).resolve().parents[1] / "golden" / "cases" / "moondream2"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    sys.path.insert(0, str(CASES.parents[1]))
    import golden

    original = golden.materialize(CASES / "tiny-2025-06-21", tmp_path_factory.mktemp("original")).parent
    out = tmp_path_factory.mktemp("converted") / "out"
    done = CliRunner().invoke(cli.port_moondream2, [str(original), str(out)])
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture
def picture(tmp_path) -> Path:
    Image.new("RGB", (70, 50), "red").save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def generate(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, ["generate", *(str(argument) for argument in arguments)])


def test_question_is_put_into_the_revisions_form(model: Path, picture: Path) -> None:
    done = generate(model, picture, "--prompt", "What is this?", "--max-new-tokens", 3)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--prompt", "<image><image> What?"), "A prompt has one <image> at most, found 2"),
        (("--task", "detect"), "'detect' asks for an object"),
        (("--task", "dance"), "There is no task 'dance'"),
    ],
)
def test_what_cannot_be_asked_is_a_usage_error(model: Path, picture: Path, asked: tuple[str, str], said: str) -> None:
    done = generate(model, picture, *asked)
    assert done.exit_code == 2 and said in done.stderr and "defect of weightport" not in done.stderr, done.output


@pytest.mark.parametrize("content", [b"not a picture", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_picture_that_does_not_decode_is_named(model: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.png").write_bytes(content)
    done = generate(model, tmp_path / "broken.png", "--prompt", "What?")
    assert done.exit_code == 1 and "broken.png cannot be read as a picture" in done.stderr, done.output


def test_image_that_a_prompt_speaks_of_and_is_not_given_is_a_usage_error(model: Path) -> None:
    done = generate(model, "--prompt", "<image> What?")
    assert done.exit_code == 2 and "Found 0 picture(s) for 1 <image>" in done.stderr, done.output
