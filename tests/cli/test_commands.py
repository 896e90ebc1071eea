"""Every command as a user types it, on a small checkpoint that OFA's own trainer wrote."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file

from weightport import cli


def weightport(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def refused(result: Result, status: int, said: str) -> None:
    """One error that says `said`, with this exit status."""
    assert result.exit_code == status and said in result.stderr, result.output
    assert "Traceback" not in result.output


@pytest.fixture(scope="module")
def converted(checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    result = CliRunner().invoke(cli.port_ofa, [str(checkpoint), str(out)])
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def picture(tmp_path) -> Path:
    Image.new("RGB", (70, 50), "red").save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_inspect_tells_family_and_sections_without_reading_weights(checkpoint, monkeypatch):
    def forbidden(self):
        raise AssertionError(f"{self.name} was read")

    monkeypatch.setattr("weightport.checkpoints.types.TensorRef.read", forbidden)
    result = weightport("inspect", checkpoint)
    assert result.exit_code == 0, result.output
    assert "OFA (fairseq)" in result.output
    assert "last_optimizer_state: 502 tensors" in result.output
    found = json.loads(weightport("inspect", checkpoint, "--json", "--tensors").output)
    assert found["family"] == "ofa"
    assert found["document"]["cfg"]["task"]["bpe"] == "bert"
    assert found["tensors"]["model.encoder.layer_norm.bias"] == {"shape": [64], "dtype": "float32"}


def test_inspect_of_any_file_says_what_it_is_not(tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "other.pt")
    assert "not one that weightport knows" in weightport("inspect", tmp_path / "other.pt").output


def test_convert_recognises_the_family_and_records_what_it_did(checkpoint, tmp_path):
    result = weightport("convert", checkpoint, tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["family"], summary["layout"], summary["dtype"]) == ("ofa", "fairseq", "float32")
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["sources"]["checkpoint"]["files"][0]["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    for file in record["files"]:
        content = (tmp_path / "out" / file["file"]).read_bytes()
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert {item["name"] for item in record["dropped"]} == {
        "encoder.version",
        "encoder.token_rp_bucket",
        "encoder.image_rp_bucket",
        "decoder.version",
        "decoder.token_rp_bucket",
        "decoder.image_rp_bucket",
        "decoder.image_position_idx",
    }
    # What the trainer's options say about its machine stays out of a directory that may be published.
    assert "plasma" not in json.dumps(record)


def test_quiet_prints_nothing(checkpoint, tmp_path):
    assert weightport("convert", checkpoint, tmp_path / "out", "--quiet").output == ""


def test_dtype_and_shards(checkpoint, converted, tmp_path):
    out = tmp_path / "half"
    result = weightport("convert", checkpoint, out, "--dtype", "float16", "--max-shard-size", "1MB")
    assert result.exit_code == 0, result.output
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    full = load_file(converted / "model.safetensors")
    assert index.keys() == full.keys()
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    half = {name: tensor for file in set(index.values()) for name, tensor in load_file(out / file).items()}
    for name, tensor in full.items():
        assert torch.equal(half[name], tensor.half() if tensor.is_floating_point() else tensor)
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.float16


def test_the_directory_loads_with_nothing_missing_and_nothing_left_over(converted):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, info = AutoModelForImageTextToText.from_pretrained(converted, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(model).__name__ == "OFAForConditionalGeneration"
    assert AutoProcessor.from_pretrained(converted).tokenizer.pad_token_id == 1


def test_a_trainers_saving_of_it_exports_too(converted, document, tmp_path):
    from transformers import AutoModelForImageTextToText

    AutoModelForImageTextToText.from_pretrained(converted).save_pretrained(tmp_path / "resaved")
    assert not (tmp_path / "resaved" / "conversion.json").exists()
    result = weightport("export", tmp_path / "resaved", tmp_path / "back.pt")
    assert result.exit_code == 0, result.output
    back = torch.load(tmp_path / "back.pt", weights_only=False)["model"]
    assert back.keys() == document["model"].keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in document["model"].items())


def test_export_gives_back_what_torch_loads(converted, document, tmp_path):
    result = weightport("export", converted, tmp_path / "back.pt", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tensors"] == len(document["model"])
    back = torch.load(tmp_path / "back.pt", weights_only=False)
    assert list(back["model"]) == list(document["model"])
    for name, tensor in document["model"].items():
        assert back["model"][name].dtype == tensor.dtype
        assert torch.equal(back["model"][name], tensor)
    for option in ("encoder_layers", "scale_heads", "resnet_type", "attn_scale_factor", "task", "bpe", "num_bins"):
        assert getattr(back["args"], option) == getattr(document["cfg"]["model"], option)
    refused(weightport("export", converted, tmp_path / "back.pt"), 1, "back.pt exists")
    refused(weightport("export", tmp_path, tmp_path / "other.pt"), 1, "holds an original checkpoint of OFA")


def test_an_export_converts_again_to_the_same_bits(converted, tmp_path, checkpoint):
    assert weightport("export", converted, tmp_path / "back.pt").exit_code == 0
    result = weightport("convert", tmp_path / "back.pt", tmp_path / "again", "--vocab", checkpoint.parent)
    assert result.exit_code == 0, result.output
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (converted / name).read_bytes()


def test_generate_says_something_about_a_picture(converted, picture):
    result = weightport("generate", converted, picture, "--beams", 2, "--max-new-tokens", 5, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["prompt"] == "图片描述了什么内容?"
    assert len(answer["ids"]) <= 7


def test_generate_refuses_what_is_no_picture(converted, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    result = weightport("generate", converted, tmp_path / "text.png")
    refused(result, 1, "cannot be read as a picture")
    refused(weightport("generate", converted), 2, "Nothing to ask about")
    refused(weightport("generate", tmp_path, "--prompt", "x"), 1, "is not a model directory: it has no config.json")


def test_a_portable_directory_needs_no_weightport(checkpoint, tmp_path, picture):
    assert weightport("convert", checkpoint, tmp_path / "out", "--portable").exit_code == 0
    script = f"""
import sys
sys.modules["weightport"] = None  # importing it fails
sys.meta_path = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("weightport")]
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({str(tmp_path / "out")!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({str(tmp_path / "out")!r}, trust_remote_code=True)
inputs = processor(text=processor.prompt("caption"), images=Image.open({str(picture)!r}), return_tensors="pt")
print(type(model).__module__, model.generate(**inputs, num_beams=1, max_new_tokens=3).shape[0])
"""
    environment = {"HF_HOME": str(tmp_path / "hub"), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("transformers_modules.")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, checkpoint) -> Path:
    import ofa_cases
    from golden_case import Case

    folder = Path(__file__).resolve().parents[1] / "golden" / "cases" / "ofa" / "cn-tiny"
    path = tmp_path_factory.mktemp("reference") / "reference.safetensors"
    return ofa_cases.write_case(Case(folder, "cn-tiny"), path, kinds=("forward",))


def test_parity_passes_and_writes_its_report(converted, reference, tmp_path):
    result = weightport("parity", converted, "--reference", reference, "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"]
    assert set(report["dtypes"]) == {"float32", "float64"}
    linked = json.loads((converted / "conversion.json").read_text())["parity"]
    assert linked["passed"]
    assert (converted / linked["json"]).resolve() == (tmp_path / "report.json").resolve()


def test_a_report_on_standard_output_is_all_that_stands_there(converted, reference):
    for name in ("-", "/dev/stdout"):
        result = weightport("parity", converted, "--reference", reference, "--dtype", "float32", "--json", name)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["made_by"].startswith("weightport ")
    assert not Path("-").exists()


def test_reports_within_the_model_directory_are_its_own_and_are_replaced_only_when_asked(
    checkpoint, reference, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    assert weightport("convert", checkpoint, out, "--quiet").exit_code == 0
    words = ("parity", out, "--reference", reference, "--dtype", "float32", "--json", out / "parity.json")
    words += ("--report", out / "parity.html")
    for more in ((), ("--overwrite",)):
        result = weightport(*words, *more)
        assert result.exit_code == 0, result.output
    with monkeypatch.context() as patched:
        patched.setattr("weightport.api.check_parity", None)  # looked at first, not after minutes of work
        result = weightport(*words)
        assert result.exit_code == 1 and "parity.json exists" in result.stderr, result.output
        for name in ("config.json", "conversion.json", "model.safetensors"):
            result = weightport(*words[:-3], out / name, "--overwrite")
            assert result.exit_code == 1 and "not written by weightport" in result.stderr, result.output
        result = weightport(*words[:-1], out / "parity.json")
        assert result.exit_code == 2 and "a file of its own" in result.stderr, result.output
    assert weightport("convert", checkpoint, out, "--quiet", "--overwrite").exit_code == 0
    assert not (out / "parity.json").exists()


def test_parity_fails_on_a_spoiled_model(converted, reference, tmp_path):
    from safetensors.torch import save_file

    spoiled = tmp_path / "spoiled"
    spoiled.mkdir()
    for path in converted.iterdir():
        (spoiled / path.name).write_bytes(path.read_bytes())
    tensors = load_file(spoiled / "model.safetensors")
    tensors["model.decoder.layers.1.fc1.weight"][0] += 0.1
    save_file(tensors, spoiled / "model.safetensors", metadata={"format": "pt"})
    result = weightport("parity", spoiled, "--reference", reference, "--dtype", "float32")
    assert result.exit_code == 1
    assert "decoder.layers.1" in result.output


def test_parity_refuses_what_is_no_reference(converted, tmp_path):
    (tmp_path / "not.safetensors").write_text("nothing")
    refused(
        weightport("parity", converted, "--reference", tmp_path / "not.safetensors"),
        2,
        "is not a readable safetensors file",
    )
    refused(weightport("parity", converted, "--reference", tmp_path / "absent.safetensors"), 2, "does not exist")
