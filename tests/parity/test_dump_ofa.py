"""dump_ofa.py against stand-ins that behave as OFA under Python 3.7 and torch 1.8.1 was seen to behave."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from original_stand_ins import (
    SOURCE,
    TARGET,
    StandInOFA,
    ids,
    imports_undone,
    script,
    zeroes_gradients_in_place,
)
from PIL import Image
from torch import nn

from weightport.parity import read_reference

INPUTS = {"src_tokens": ids(SOURCE), "src_lengths": torch.full((2,), SOURCE), "prev_output_tokens": ids(TARGET)}

CHECKPOINT_UTILS = '''
import torch
from original_stand_ins import StandInOFA
from fairseq.tasks import Task

def load_model_ensemble_and_task(paths, arg_overrides=None):
    """As fairseq's, with OFA's habit of filling in what the checkpoint lacks."""
    state = torch.load(paths[0], weights_only=False)
    options = dict(state["cfg"]["task"], **{k: v for k, v in arg_overrides.items() if k in state["cfg"]["task"]})
    model = StandInOFA()
    model.load_state_dict({**model.state_dict(), **state["model"]})
    return [model], None, Task(options)
'''
TASKS = '''
import pickle
import torch
from types import SimpleNamespace

class Task:
    """Opens the files of training time that its options name."""

    def __init__(self, options):
        if options.get("eval_cider"):
            open(options["eval_cider_cached_tokens"], "rb")
        if options.get("ans2label_file"):
            pickle.load(open(options["ans2label_file"], "rb"))
        if options.get("vqgan_model_path"):
            open(options["vqgan_model_path"], "rb")
        self.cfg, self.bpe_dir = options, options["bpe_dir"]
        self.bpe = SimpleNamespace(encode=lambda text: text)
        encode = lambda line, **settings: torch.tensor([3 + len(word) % 7 for word in line.split()])
        self.tgt_dict = SimpleNamespace(encode_line=encode)
'''
OFA_MODULE = """
import cv2, editdistance, ftfy, librosa, soundfile, torchaudio, zhconv
import pytorch_lightning as pl
import torchaudio.compliance.kaldi as kaldi
from einops import rearrange
from g2p_en import G2p
from pypinyin.contrib.tone_convert import to_normal
from tasks_of_ofa import register

class VQModel(pl.LightningModule):
    mode: cv2.INTER_CUBIC = None
"""
GENERATOR = """
import torch

class SequenceGenerator:
    def __init__(self, models, tgt_dict, beam_size, max_len_b):
        self.beams = beam_size

    def generate(self, models, sample):
        hypothesis = {"tokens": torch.tensor([5, 6, 2]), "score": torch.tensor(-1.0)}
        return [[hypothesis] * self.beams for _ in sample["net_input"]["src_tokens"]]
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A checkout of OFA, as far as a dump reaches: its folder `fairseq` holds the package one folder further in."""
    repo = tmp_path / "OFA"
    files = {
        "fairseq/setup.py": "raise SystemExit('not the package')",
        "fairseq/__init__.py": "",
        "fairseq/fairseq/__init__.py": "",
        "fairseq/fairseq/checkpoint_utils.py": CHECKPOINT_UTILS,
        "fairseq/fairseq/tasks.py": TASKS,
        "fairseq/fairseq/utils.py": "import importlib, os\n"
                                    "def import_user_module(args):\n"
                                    "    importlib.import_module(os.path.basename(args.user_dir))\n",
        "tasks_of_ofa.py": "register = None",
        "ofa_module/__init__.py": OFA_MODULE,
        "models/__init__.py": "",
        "models/sequence_generator.py": GENERATOR,
    }  # fmt: skip
    for name, text in files.items():
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text(text)
    return repo


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint: `checkpoint(change)` may edit it before."""

    def written(change: Callable[[dict], object] = lambda state: None) -> Path:
        torch.manual_seed(0)
        ema = {name: tensor * 2 for name, tensor in StandInOFA().state_dict().items()}
        state = {"cfg": {"model": argparse.Namespace(arch="ofa_tiny"), "task": {"bpe_dir": "gone"}},
                 "model": StandInOFA().state_dict(), "extra_state": {"ema": ema}}  # fmt: skip
        change(state)
        torch.save(state, tmp_path / "ofa.pt")
        return tmp_path / "ofa.pt"

    return written


@pytest.fixture
def run(repository: Path, tmp_path: Path, monkeypatch) -> Iterator[Callable[..., Path]]:
    """Runs the script as a user does; the reference's path, or SystemExit with what it says."""
    out = tmp_path / "reference.safetensors"

    def dumped(path: Path, *options: str) -> Path:
        monkeypatch.setattr(sys, "argv", ["dump_ofa.py", str(path), str(out), "--repo", str(repository),
                                          "--prompt", "what is this", "--target", "a dog", *options])  # fmt: skip
        script("dump_ofa").main()
        return out

    with imports_undone():
        yield dumped


def seams(path: Path, run: str = "forward") -> dict[str, torch.Tensor]:
    found = next(each for each in read_reference(path).runs if each.name == run)
    return {each.tensor.name.partition("/out/")[2]: each.tensor.read() for each in found.outputs}


def test_dump_needs_no_package_that_is_only_imported(run, checkpoint) -> None:
    written = run(checkpoint())
    reference = read_reference(written)
    assert {each.kind for each in reference.runs} == {"forward", "train", "generate"}
    assert {"logits", "logits@float64", "encoder.layers.0", "encoder.layers.0@float64"} <= set(seams(written))
    assert reference.source["float64"] == "forward, train"
    assert not [finder for finder in sys.meta_path if type(finder).__name__ == "StandIns"]


def test_every_package_that_the_tasks_only_import_is_stood_in_for() -> None:
    seen = ("cv2 datasets editdistance einops ftfy g2p_en librosa pypinyin pytorch_lightning requests six soundfile "
            "torchaudio zhconv")  # fmt: skip
    assert seen.split() == script("dump_ofa").IMPORTED_ONLY


def test_installed_package_comes_before_its_stand_in(repository: Path) -> None:
    (repository / "zhconv.py").write_text("convert = len")
    dump = script("dump_ofa")
    with imports_undone(), dump.standing_in(["zhconv", "cv2"]) as finder:
        sys.path.insert(0, str(repository))
        import cv2
        import zhconv

        assert zhconv.convert("ab") == 2 and finder.used == {"cv2"}
        with pytest.raises(dump.DumpError, match="pip install cv2"):
            cv2.imread("x.png")


def test_package_nobody_named_is_said_with_the_option_that_stands_in_for_it(run, checkpoint, repository) -> None:
    (repository / "tasks_of_ofa.py").write_text("import wandb_of_a_fork as register")
    with pytest.raises(SystemExit, match=r"wandb_of_a_fork.*--stand-in wandb_of_a_fork"):
        run(checkpoint())
    assert run(checkpoint(), "--stand-in", "wandb_of_a_fork").is_file()


def test_repository_does_not_hide_the_installed_fairseq(run, checkpoint, repository) -> None:
    run(checkpoint())
    assert Path(sys.modules["fairseq"].__file__).parent == repository / "fairseq" / "fairseq"


@pytest.mark.parametrize("inner", [True, False])
def test_namespace_package_of_the_repository_does_not_hide_fairseq(run, checkpoint, repository, inner: bool) -> None:
    if inner:
        (repository / "fairseq/__init__.py").unlink()
    assert run(checkpoint()).is_file()


@pytest.mark.parametrize("options", [{"eval_cider": True, "eval_cider_cached_tokens": "coco-valid-words.p"},
                                     {"ans2label_file": "a.pkl"}])  # fmt: skip
def test_files_of_training_time_are_not_opened(run, checkpoint, options: dict) -> None:
    assert run(checkpoint(lambda state: state["cfg"]["task"].update(options))).is_file()


def test_other_file_of_training_time_is_overridden_by_an_option(run, checkpoint) -> None:
    path = checkpoint(lambda state: state["cfg"]["task"].update(vqgan_model_path="gone.ckpt"))
    with pytest.raises(SystemExit, match=r"gone\.ckpt(.|\n)*--override"):
        run(path)
    assert run(path, "--override", "vqgan_model_path=null").is_file()


def test_override_without_a_value_is_refused(run, checkpoint) -> None:
    with pytest.raises(SystemExit, match="expected NAME=VALUE"):
        run(checkpoint(), "--override", "eval_cider")


def test_weights_that_the_checkpoint_lacks_are_not_left_to_chance(run, checkpoint, tmp_path: Path) -> None:
    path = checkpoint(lambda state: state["model"].pop("decoder.layers.1.fc2.bias"))
    with pytest.raises(SystemExit, match=r"has no decoder\.layers\.1\.fc2\.bias"):
        run(path)
    assert not (tmp_path / "reference.safetensors").exists()


def test_ema_dumps_the_averaged_weights(run, checkpoint) -> None:
    plain = seams(run(checkpoint()))["encoder.embeddings"].clone()
    written = run(checkpoint(), "--ema")
    assert not torch.equal(seams(written)["encoder.embeddings"], plain)
    assert read_reference(written).source["weights"] == "extra_state.ema"


def test_ema_of_a_checkpoint_without_one_is_refused(run, checkpoint) -> None:
    with pytest.raises(SystemExit, match="holds no averaged weights"):
        run(checkpoint(lambda state: state["extra_state"].clear()), "--ema")


def test_no_float64_leaves_it_out_and_says_so(run, checkpoint) -> None:
    written = run(checkpoint(), "--no-float64")
    assert not [seam for seam in seams(written) if seam.endswith("@float64")]
    assert read_reference(written).source["float64"] == "left out by --no-float64"


def test_nan_in_the_checkpoint_writes_no_reference(run, checkpoint, tmp_path: Path) -> None:
    path = checkpoint(lambda state: state["model"]["encoder.layers.0.fc1.bias"].fill_(float("nan")))
    with pytest.raises(SystemExit, match="NaN"):
        run(path)
    assert not list(tmp_path.glob("reference.safetensors*"))


def test_gradients_outlive_a_zero_grad_that_works_in_place() -> None:
    dump, model = script("dump_ofa"), zeroes_gradients_in_place(StandInOFA())
    found = dump.train(model, INPUTS, ids(TARGET), 0.1)
    again = dump.train(model, INPUTS, ids(TARGET), 0.1)
    gradients = {name: array for name, array in found.items() if "grad" in name}
    assert gradients and all(np.asarray(array).any() for array in gradients.values())
    assert all(np.array_equal(array, again[name]) for name, array in gradients.items())


class NamedLikeTheOriginal(StandInOFA):
    """With a parameter whose whole gradient a reference holds, and an in-place operation after a hooked module."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder.layer_norm = nn.LayerNorm(8)

    def forward(self, src_tokens, src_lengths, prev_output_tokens):
        encoded = self.encoder(src_tokens)["encoder_out"][0]
        decoded = self.decoder.layer_norm(self.decoder(prev_output_tokens)["encoder_out"][0])
        logits = (decoded.transpose(0, 1) + encoded.mean(0)[:, None]) @ self.decoder.embed_tokens.weight.T
        if not torch.is_grad_enabled():
            encoded.mul_(0)
        return logits, {}


def test_whole_gradient_is_not_the_zeros_that_zero_grad_leaves() -> None:
    dump, model = script("dump_ofa"), zeroes_gradients_in_place(NamedLikeTheOriginal())
    found = dump.train(model, INPUTS, ids(TARGET), 0.1)
    assert found["train/out/grad.decoder.layer_norm.weight"].any()


def test_seam_is_what_the_module_gave_and_not_what_came_of_it_in_place() -> None:
    found = script("dump_ofa").forward(NamedLikeTheOriginal(), INPUTS)
    assert found["forward/out/encoder"].any() and found["forward/out/encoder.layers.1"].any()


class CastingOFA(StandInOFA):
    """With fairseq's softmax and gelu, which compute in float32 whatever they are given."""

    casting = True

    def forward(self, src_tokens, src_lengths, prev_output_tokens):
        logits, _ = super().forward(src_tokens, src_lengths, prev_output_tokens)
        weights = nn.functional.softmax(logits, dim=-1, **({"dtype": torch.float32} if self.casting else {}))
        x = logits * weights.type_as(logits)
        return (nn.functional.gelu(x.float()).type_as(x) if self.casting else nn.functional.gelu(x)), {}


def test_float64_run_is_one_although_the_original_casts_softmax_and_gelu() -> None:
    dump, model = script("dump_ofa"), CastingOFA().double()

    def dumped(*, casting: bool) -> dict[str, np.ndarray]:
        model.casting = casting
        trained = dump.train(model, INPUTS, ids(TARGET), 0.1, float64=True)
        return {**dump.forward(model, INPUTS, float64=True), **trained}

    found, exact = dumped(casting=True), dumped(casting=False)
    for name in ("forward/out/logits@float64", "train/out/loss@float64"):
        assert np.abs(found[name] - exact[name]).max() <= 1e-15


def test_synchronised_batch_norm_runs_on_a_cpu_with_its_own_epsilon() -> None:
    dump = script("dump_ofa")
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.SyncBatchNorm(4, eps=1e-3)))
    model[1][0].running_mean.normal_()
    model[1][0].running_var.fill_(2e-3)
    stored, x = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.randn(2, 3, 5, 5)
    plain = dump.on_one_processor(model.eval())
    dump.refuse_other_weights(plain, stored)
    hidden, norm = plain[0](x), plain[1][0]
    expected = nn.functional.batch_norm(hidden, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-3)
    torch.testing.assert_close(plain(x), expected, rtol=0, atol=0)
    assert not norm.training


def test_option_that_a_structured_configuration_lacks_has_its_default() -> None:
    class Structured(dict):
        def get(self, name, default=None):
            raise KeyError(f"Key '{name}' is not in struct")

    assert script("dump_ofa").option(SimpleNamespace(cfg=Structured(a=1)), "patch_image_size", 480) == 480


def test_images_are_dumped_as_pixels(run, checkpoint, tmp_path: Path) -> None:
    dump = script("dump_ofa")
    Image.new("RGB", (9, 5), (255, 0, 127)).save(tmp_path / "i.png")
    found = dump.pixels([str(tmp_path / "i.png")], 4, ([0.5] * 3, [0.5] * 3))
    assert found.shape == (1, 3, 4, 4)
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([1.0, -1.0, 127 / 255 * 2 - 1]))
