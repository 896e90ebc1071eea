"""`weightport generate`, and what else is given a model directory: whatever stands there, one clear answer."""

from __future__ import annotations

import errno
import json
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import EpsImagePlugin, Image

from weightport import cli

CASES = Path(__file__).resolve().parents[1] / "golden" / "cases" / "florence2"


def weightport(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def refused(result: Result, *expected: str, status: int = 1) -> None:
    assert result.exit_code == status, result.output
    for text in expected:
        assert text in result.stderr, result.stderr
    assert "defect of weightport" not in result.stderr and "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def ofa(checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ofa") / "out"
    assert CliRunner().invoke(cli.port_ofa, [str(checkpoint), str(out)]).exit_code == 0
    return out


@pytest.fixture(scope="module")
def original_florence2(tmp_path_factory) -> Path:
    sys.path.insert(0, str(CASES.parents[1]))
    import golden

    return golden.materialize(CASES / "tiny-ft-untied", tmp_path_factory.mktemp("original")).parent


@pytest.fixture(scope="module")
def florence2(original_florence2, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("florence2") / "out"
    assert CliRunner().invoke(cli.port_florence2, [str(original_florence2), str(out)]).exit_code == 0
    return out


@pytest.fixture
def picture(tmp_path) -> Path:
    Image.new("RGB", (70, 50), "red").save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


HOSTILE = "import pathlib\npathlib.Path({witness!r}).touch()\n"
ENTRIES = {
    "a model of its own": ("config.json", {"model_type": "wicked"}, ("AutoConfig", "AutoModelForImageTextToText")),
    "a processor of its own": ("processor_config.json", {"processor_class": "Wicked"}, ("AutoProcessor",)),
}


@pytest.mark.parametrize("what", ENTRIES)
def test_no_code_of_a_directory_is_run_or_asked_about(ofa, picture, tmp_path, what):
    folder, witness = tmp_path / "hostile", tmp_path / "witness"
    shutil.copytree(ofa, folder)
    (folder / "wicked.py").write_text(HOSTILE.format(witness=str(witness)))
    file, changes, auto_classes = ENTRIES[what]
    settings = json.loads((folder / file).read_text())
    settings |= {**changes, "auto_map": dict.fromkeys(auto_classes, "wicked.Wicked")}
    (folder / file).write_text(json.dumps(settings))
    run = subprocess.run(
        [sys.executable, "-c", "from weightport.cli import main; main()", "generate", folder, picture],
        input="y\n" * 5,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "code that stands in it, which weightport never does" in run.stderr
    assert "[y/N]" not in run.stdout + run.stderr
    assert not witness.exists()


@pytest.mark.parametrize("device", ["cuda:99", "quux", "xla", "opengl", "meta", "cuda:-7", "fpga"])
def test_a_device_that_cannot_be_used_is_a_usage_error(ofa, picture, tmp_path, device):
    refused(weightport("generate", ofa, picture, "--device", device), f"--device {device}", status=2)
    (tmp_path / "reference").mkdir()
    parity = weightport("parity", ofa, "--reference", tmp_path / "reference", "--device", device)
    refused(parity, f"--device {device}", status=2)


def test_an_unknown_task_is_a_usage_error(ofa, florence2, picture):
    refused(weightport("generate", ofa, picture, "--task", "juggle"), "no task 'juggle'", "caption", status=2)
    refused(weightport("generate", ofa, picture, "--task", "vqa"), "--task vqa", "in 'zh'", status=2)
    refused(weightport("generate", florence2, picture, "--task", "juggle"), "'juggle'", "od", status=2)
    refused(
        weightport("generate", florence2, picture, "--task", "caption_to_phrase_grounding"),
        "--prompt '<CAPTION_TO_PHRASE_GROUNDING>the text'",
        status=2,
    )


def test_a_task_may_be_named_by_its_token(florence2, ofa, picture):
    short = ("--max-new-tokens", 3, "--json")
    answer = weightport("generate", florence2, picture, "--task", "<OD>", *short)
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["prompt"] == "<OD>"
    assert weightport("generate", ofa, picture, "--task", "<CAPTION>", *short).exit_code == 0


def test_a_failing_disk_is_not_called_a_defect(ofa, picture, monkeypatch):
    def fails(*arguments, **keywords):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Image.Image, "load", fails)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fails)
    refused(weightport("generate", ofa, picture), f"{picture} cannot be read as a picture", "Input/output error")


def test_a_picture_that_is_a_program_is_not_run(ofa, tmp_path, monkeypatch):
    Image.new("RGB", (70, 50), "red").save(tmp_path / "picture.eps")
    ran: list[object] = []
    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: ran.append(args) or Image.new("RGB", (1, 1)).im
    )
    refused(weightport("generate", ofa, tmp_path / "picture.eps"), "picture.eps cannot be read as a picture")
    assert not ran


def test_a_decompression_bomb_is_refused_before_it_is_decoded(ofa, tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(content)
    refused(weightport("generate", ofa, tmp_path / "bomb.png"), "bomb.png is too large", "3600000000 pixels")


@pytest.mark.parametrize("cut", [20, 40, 60])
def test_a_broken_picture_is_not_called_a_defect(ofa, picture, cut):
    picture.write_bytes(picture.read_bytes()[:cut] + b"\0" * 8)
    refused(weightport("generate", ofa, picture), "cannot be read as a picture")


def commands(directory: Path, tmp_path: Path) -> dict[str, list[object]]:
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    return {
        "generate": ["generate", directory, "--prompt", "x"],
        "evaluate": ["evaluate", directory, "--data", data],
        "finetune": ["finetune", directory, "--data", data, "--output", tmp_path / "run"],
        "parity": ["parity", directory, "--reference", data],
        "export": ["export", directory, tmp_path / "back"],
    }


@pytest.mark.parametrize("command", ["generate", "evaluate", "finetune", "parity", "export"])
def test_an_unconverted_checkpoint_is_told_how_to_be_converted(checkpoint, original_florence2, tmp_path, command):
    for path, family in ((checkpoint, "ofa"), (checkpoint.parent, "ofa"), (original_florence2, "florence2")):
        result = weightport(*commands(path, tmp_path)[command])
        refused(result, f"{path} holds an original checkpoint", f"port-{family} {path} OUT")
    refused(weightport(*commands(tmp_path / "absent", tmp_path)[command]), "absent does not exist", status=2)


@pytest.mark.parametrize("family", ["ofa", "florence2"])
def test_a_converted_directory_is_not_converted_again(request, tmp_path, family):
    directory = request.getfixturevalue(family)
    for command in (f"port_{family}", "main"):
        arguments = [str(directory), str(tmp_path / "again")]
        result = CliRunner().invoke(getattr(cli, command), ["convert", *arguments] if command == "main" else arguments)
        refused(result, f"{directory} is a native", "already", f"weightport export {directory} TARGET")


@pytest.mark.parametrize("family", ["ofa", "florence2"])
def test_whoever_limits_an_answer_is_not_warned_of_the_directorys_limit(request, picture, family):
    script = (
        "import sys, weightport.modeling\n"
        "from PIL import Image\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "folder, picture = sys.argv[1:]\n"
        "processor = AutoProcessor.from_pretrained(folder)\n"
        "model = AutoModelForImageTextToText.from_pretrained(folder)\n"
        "prompt = processor.prompt('caption') if hasattr(processor, 'prompt') else '<CAPTION>'\n"
        "inputs = processor(text=prompt, images=Image.open(picture), return_tensors='pt')\n"
        "print(model.generate(**inputs, max_new_tokens=3).shape[1])\n"
    )
    directory = request.getfixturevalue(family)
    run = subprocess.run([sys.executable, "-c", script, directory, picture], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= 4
    assert "max_length" not in run.stderr and "max_new_tokens" not in run.stderr
