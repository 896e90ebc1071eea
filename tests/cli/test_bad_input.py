"""Bad input gets one clear error, a non-zero exit status, and nothing written."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from weightport.writing import safetensors_shards as writing


@pytest.fixture(autouse=True)
def nothing_stays_behind(tmp_path):
    """Whatever a test provokes, no output and no working folder may remain."""
    yield
    target = tmp_path / "target"
    assert not target.exists() or os.listdir(target) in ([], ["out"])
    if (target / "out").exists():
        assert os.listdir(target / "out") == ["mine"]


def refused(result, *expected: str, status: int = 1) -> str:
    """The command ended with `status`, one error naming what is `expected`, and no traceback."""
    assert result.exit_code == status, result.output
    assert result.output.count("Traceback") == 0
    assert result.stderr.startswith(("port-ofa: ", "Usage: "))
    for text in expected:
        assert text in result.stderr, result.stderr
    return result.stderr


def test_a_missing_file(port, tmp_path):
    refused(port(tmp_path / "absent.pt"), "absent.pt", "does not exist", status=2)


def test_an_empty_file(port, tmp_path):
    (tmp_path / "empty.pt").touch()
    refused(port(tmp_path / "empty.pt"), "empty.pt: is empty (0 bytes)")


def test_a_folder_without_weights(port, tmp_path):
    (tmp_path / "folder").mkdir()
    refused(port(tmp_path / "folder"), "folder: holds no weights", "found an empty folder")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999999])
def test_a_truncated_archive(port, tmp_path, checkpoint, part):
    content = checkpoint.read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: int(len(content) * part)])
    refused(port(tmp_path / "cut.pt"), "cut.pt: is a zip archive without the directory at its end")


class Hostile:
    """A pickle that runs a command when Python's own unpickler reads it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_names_os_system_runs_nothing(port, tmp_path, legacy):
    witness = tmp_path / "witness"
    hostile = tmp_path / "hostile.pt"
    document = {"model": {"w": torch.zeros(1)}, "evil": Hostile(f"touch {witness}")}
    torch.save(document, hostile, _use_new_zipfile_serialization=not legacy)
    refused(port(hostile), "posix.system' to be called", "Nothing was executed")
    assert not witness.exists()
    with zipfile.ZipFile(hostile) if not legacy else open(hostile, "rb") as file:
        assert file
    if not legacy:
        # The file is really hostile: read the usual way it does run the command.
        torch.load(hostile, weights_only=False)
        assert witness.exists()


def test_a_plain_hostile_pickle_runs_nothing(port, tmp_path):
    witness = tmp_path / "witness"
    (tmp_path / "hostile.pt").write_bytes(pickle.dumps(Hostile(f"touch {witness}")))
    refused(port(tmp_path / "hostile.pt"), "hostile.pt: is a plain pickle")
    assert not witness.exists()


def test_a_checkpoint_of_another_family_is_named(port, tmp_path):
    torch.save(
        {"model": {"Qformer.bert.encoder.layer.0.attention.self.query.weight": torch.zeros(2, 2)}},
        tmp_path / "lavis.pth",
    )
    refused(port(tmp_path / "lavis.pth"), "not a checkpoint of OFA", "BLIP-2")


def test_a_missing_tensor_is_named(port, spoiled):
    source = spoiled(lambda model: model.pop("decoder.layers.1.fc2.bias"))
    refused(port(source), "1 missing", "decoder.layers.1.fc2.bias [64] → model.decoder.layers.1.fc2.bias")


def test_a_surplus_tensor_is_named_and_can_be_given_up(port, spoiled, tmp_path):
    source = spoiled(lambda model: model.update({"decoder.extra.weight": torch.zeros(3)}))
    refused(port(source), "decoder.extra.weight [3]", "--drop")
    result = port(source, "--drop", "decoder.extra.**", out=tmp_path / "given-up")
    assert result.exit_code == 0, result.output
    assert "left out on request" in result.output


def test_a_classification_head_is_reported_and_never_dropped_silently(port, spoiled):
    source = spoiled(lambda model: model.update({"classification_heads.mnli.dense.weight": torch.zeros(3, 3)}))
    refused(port(source), "classification_heads.mnli.dense.weight [3, 3]", "classification head")


def test_prefix_tuning_is_refused_by_name(port, spoiled):
    name = "encoder_prompt_encoder.prompt_embeddings.weight"
    refused(port(spoiled(lambda model: model.update({name: torch.zeros(3, 3)}))), name, "prefix tuning")


def test_a_reshaped_tensor_is_named(port, spoiled):
    name = "encoder.layers.0.fc2.weight"
    source = spoiled(lambda model: model.update({name: model[name][:, :-1].contiguous()}))
    refused(port(source), name, "[64, 96]", "[64, 95]")


def test_options_that_contradict_the_tensors_are_refused(port, spoiled):
    def drop_a_layer(model):
        for name in [
            name for name in model if name.startswith("encoder.layers.1.") or "rel_pos_table_list.1." in name
        ]:
            del model[name]

    refused(port(spoiled(drop_a_layer)), "encoder_layers is 2 in the options, but the tensors show 1")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nonfinite_weight_is_named_and_can_be_kept(port, spoiled, tmp_path, value):
    def change(model):
        model["decoder.pos_ln.weight"] = model["decoder.pos_ln.weight"].clone()
        model["decoder.pos_ln.weight"][5] = value

    source = spoiled(change)
    refused(port(source), "decoder.pos_ln.weight", "NaN or infinity", "--allow-nonfinite")
    assert port(source, "--allow-nonfinite", out=tmp_path / "kept").exit_code == 0


def test_tied_matrices_that_differ_are_refused(port, spoiled):
    name = "decoder.output_projection.weight"
    source = spoiled(lambda model: model.update({name: model[name] + 1}))
    refused(port(source), name, "encoder.embed_tokens.weight", "different values")


def test_an_index_buffer_of_another_variant_is_refused(port, spoiled):
    name = "encoder.token_rp_bucket"
    source = spoiled(lambda model: model.update({name: model[name].flip(0)}))
    refused(port(source), name, "variant")


def test_a_vocabulary_that_does_not_fit(port, checkpoint, tmp_path):
    folder = tmp_path / "vocab"
    folder.mkdir()
    lines = (checkpoint.parent / "dict.txt").read_text().splitlines(keepends=True)
    (folder / "dict.txt").write_text("".join(lines[:-7]))
    (folder / "vocab.txt").write_text((checkpoint.parent / "vocab.txt").read_text())
    refused(port(checkpoint, "--vocab", str(folder)), "418 rows", "411")


def test_a_checkpoint_without_its_vocabulary(port, checkpoint, tmp_path):
    (tmp_path / "alone.pt").symlink_to(checkpoint)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "model.pt").hardlink_to(checkpoint)
    refused(port(alone / "model.pt"), "--vocab")


def test_a_vocabulary_folder_that_is_not_there(port, checkpoint, tmp_path):
    refused(port(checkpoint, "--vocab", str(tmp_path / "absent")), "no vocabulary at", "absent", status=2)


def test_averaged_weights_that_are_not_there(port, checkpoint):
    refused(port(checkpoint, "--ema"), "averaged weights")


def test_an_existing_output_is_not_touched(port, checkpoint, tmp_path):
    out = tmp_path / "target" / "out"
    out.mkdir(parents=True)
    (out / "mine").write_text("x")
    refused(port(checkpoint), "exists", "--overwrite")
    assert (out / "mine").read_text() == "x"


def test_an_output_that_holds_the_source_is_refused(port, spoiled):
    source = spoiled(lambda model: None)
    refused(port(source, "--overwrite", out=source.parent), "holds", "which is read")
    assert source.exists()


def test_a_full_disk(port, checkpoint, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.HashedFile, "write", full)
    refused(port(checkpoint), "disk is full")


def test_usage_errors_end_with_status_2(port, checkpoint):
    refused(port(checkpoint, "--dtype", "int4"), "int4", status=2)
    refused(port(checkpoint, "--max-shard-size", "lots"), "not a size", status=2)


@pytest.mark.parametrize("size", ["2", "5000", "1.5"])
def test_a_size_without_a_unit_is_asked_about(port, checkpoint, size):
    refused(port(checkpoint, "--max-shard-size", size), f"'{size}' has no unit", f"{size}GB, {size}MB", status=2)


def test_a_defect_of_ours_is_one_line_unless_debugging(port, checkpoint, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("planted")

    monkeypatch.setattr("weightport.converters.conversion.write_shards", broken)
    output = refused(port(checkpoint), "RuntimeError: planted", "--debug")
    assert len(output.strip().splitlines()) <= 6
    assert isinstance(port(checkpoint, "--debug").exception, RuntimeError)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_writing_leaves_nothing(checkpoint, tmp_path, number):
    target = tmp_path / "target"
    target.mkdir()
    # A slow disk, so that the signal arrives in the middle of the weights.
    script = (
        "import sys, time\n"
        "from weightport.writing import hashed_file as writing\n"
        "write = writing.HashedFile.write\n"
        "def slow(self, data):\n"
        "    print('writing', flush=True); time.sleep(0.2); write(self, data)\n"
        "writing.HashedFile.write = slow\n"
        "from weightport.cli import port_ofa\n"
        "port_ofa()\n"
    )
    command = [sys.executable, "-c", script, str(checkpoint), str(target / "out"), "--quiet"]
    # A shell starts what runs in the background with SIGINT ignored, and so the tests within it.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert os.listdir(target) != []
    time.sleep(0.3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    assert "nothing was left behind" in errors
    assert "Traceback" not in errors
    assert os.listdir(target) == []


def test_help_answers_without_torch():
    script = "import sys; from weightport.cli import main; main(['--help'], standalone_mode=False); "
    script += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")


def test_every_command_line_tool_is_installed():
    folder = Path(sys.executable).parent
    assert all((folder / name).exists() for name in ("weightport", "port-ofa", "port-parity"))
