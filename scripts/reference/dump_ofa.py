"""Dump what an original OFA or OFA-CN model computes, as a reference file for port-parity.

Environment: Python 3.7 or 3.8 with OFA's own torch, see requirements-ofa.txt beside this file:

    conda create -n ofa python=3.7 && conda activate ofa
    git clone https://github.com/OFA-Sys/OFA && pip install -e OFA/fairseq
    pip install -r requirements-ofa.txt

    python dump_ofa.py ofa_cn_base.pt reference.safetensors --repo OFA --bpe-dir OFA/utils/BERT_CN_dict \\
        --image dog.jpg --prompt "图片描述了什么内容?" --target "一只狗"

Runs on the CPU, in float32 and, where the memory is there, in float64 too. Packages that OFA's tasks import and that
nothing here calls (cv2, librosa, pytorch_lightning, ...) need not be installed.

The checkpoint is loaded by the original's own code, which executes it: dump only files that you trust. weightport is
not needed here; of its format this file knows all there is (version 1): one safetensors file, tensors named
<run>/in/<argument> and <run>/out/<seam>[@float64], and one metadata entry.
"""

# ruff: noqa: UP031 - written as the Pythons of these environments have it
import argparse
import contextlib
import fnmatch
import importlib.abc
import importlib.machinery
import inspect
import json
import os
import sys
import types

import numpy as np

FORMAT = 1
START, PAD, END = 0, 1, 2
LAYER_PARTS = ("self_attn", "attn_ln", "self_attn_ln", "encoder_attn", "cross_attn_ln", "fc1", "ffn_layernorm", "fc2")
GRADIENTS = ("encoder.image_proj.weight", "encoder.layers.0.self_attn.q_proj.weight", "decoder.layer_norm.weight")
IMPORTED_ONLY = [
    "cv2", "datasets", "editdistance", "einops", "ftfy", "g2p_en", "librosa", "pypinyin", "pytorch_lightning",
    "requests", "six", "soundfile", "torchaudio", "zhconv",
]  # fmt: skip
# Files of training time that a task opens while it is built; OFA's evaluation scripts override them too.
OVERRIDES = {"eval_cider": False, "ans2label_file": None}
# Index tables, versions and counters that the original computes, and the output layer that it ties.
COMPUTED = (
    "*.version", "*_rp_bucket", "*image_position_idx", "*num_batches_tracked", "decoder.output_projection.weight",
)  # fmt: skip


class DumpError(Exception):
    """What keeps a true reference from being written; said without a traceback."""


def matches(name, patterns):
    """Whether one of the patterns (`*` stands for anything) is the name's."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def listed(names):
    """The first few names, and how many there are."""
    names = sorted(names)
    return ", ".join(names[:6]) + (" ... (%d in all)" % len(names) if len(names) > 6 else "")


def float64_runs(weights, wanted, free=None):
    """(kinds of runs to repeat in float64, why others are not). `weights`: bytes of the float32 model. `wanted` None:
    where the memory is there; a forward run takes the weights once more, a training run their gradients too."""
    if wanted is not None:
        return (("forward", "train"), "") if wanted else ((), "left out by --no-float64")
    free = free_memory() if free is None else free
    if free is None:
        return ("forward", "train"), ""
    needs = {"forward": 1.5 * weights, "train": 4.0 * weights}
    kinds = tuple(kind for kind in ("forward", "train") if needs[kind] <= free)
    left = ["%s (%.1f GB needed)" % (kind, needs[kind] / 1e9) for kind in needs if kind not in kinds]
    why = "left out for want of memory, %.1f GB free: %s" % (free / 1e9, ", ".join(left)) if left else ""
    return kinds, why


def free_memory():
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo") as lines:
            stated = dict(line.split(":", 1) for line in lines)
        return int(stated["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def refuse_wrong(runs, tensors, may_be_zero=()):
    """DumpError where a tensor cannot be what the original computes: not finite, a gradient of zeros, a float64 run
    that went through float32, or a run without outputs (for training: without gradients)."""
    for name, array in tensors.items():
        run, side, rest = name.split("/", 2)
        seam, _, precision = rest.partition("@")
        if array.dtype.kind != "f":
            continue
        if not np.isfinite(array).all():
            raise DumpError("%s holds NaN or infinity; no reference is written" % name)
        if side == "in":
            continue
        gradient = seam.startswith(("grad.", "grad_norm."))
        zero = not array.all() if seam.startswith("grad_norm.") else not array.any()
        if gradient and zero and not matches(seam.partition(".")[2], may_be_zero):
            raise DumpError("%s is all zeros; if this parameter has no part in the loss, say --may-be-zero %s"
                          % (name, seam.partition(".")[2]))  # fmt: skip
        if precision and (array.dtype != np.float64 or (seam in ("logits", "loss") and rounded(array))):
            raise DumpError("%s went through float32 on its way: the original casts it" % name)
        if not precision and array.dtype == np.float64 and not gradient:
            raise DumpError("%s is float64, in a float32 run" % name)
    for run, entry in runs.items():
        seams = [name.split("/", 2)[2] for name in tensors if name.startswith(run + "/out/")]
        if not seams or (entry["kind"] == "train" and not any(seam.startswith("grad_norm.") for seam in seams)):
            raise DumpError("run %s has no %s" % (run, "gradient" if seams else "output"))


def rounded(array):
    """Whether every value of a float64 array is a float32 one: so many are not so by chance."""
    return bool(array.any()) and array.size >= 1 and bool((array == array.astype(np.float32)).all())


def write(path, family, source, runs, tensors, may_be_zero=()):
    """Check every tensor, then write the file whole or not at all. Each run says which of its seams it holds in
    float32 and in float64."""
    from safetensors.numpy import save_file

    refuse_wrong(runs, tensors, may_be_zero)
    for run, entry in runs.items():
        entry["both_precisions"] = sorted(
            name[len(run) + 5 : -len("@float64")]
            for name in tensors
            if name.startswith(run + "/out/") and name.endswith("@float64") and name[: -len("@float64")] in tensors
        )
    document = {"format": FORMAT, "family": family, "source": source, "runs": runs}
    arrays = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in tensors.items()}
    partial = path + ".partial"
    try:
        save_file(arrays, partial, metadata={"weightport.reference": json.dumps(document, ensure_ascii=False)})
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def commit_of(repository):
    """The repository's commit, "" where git cannot say or the folder is none of its own."""
    import subprocess

    if not os.path.exists(os.path.join(repository, ".git")):
        return ""
    try:
        command = ["git", "-C", repository, "rev-parse", "HEAD"]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL).decode().strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def shared_options(parser):
    """The options that every script has."""
    parser.add_argument("--float64", dest="float64", action="store_const", const=True,
                        help="float64 runs whatever the memory (default: where the memory is there)")  # fmt: skip
    parser.add_argument("--no-float64", dest="float64", action="store_const", const=False, help="float32 runs only")
    parser.add_argument("--may-be-zero", action="append", default=[], metavar="PARAMETER",
                        help="its gradient may be all zeros; repeatable, * stands for anything")  # fmt: skip


def array_of(tensor):
    """A copy of its own: `numpy()` shares memory that zero_grad and in-place operations of the original overwrite."""
    tensor = tensor.detach().cpu()
    return np.array((tensor.float() if "bfloat16" in str(tensor.dtype) else tensor).numpy())


@contextlib.contextmanager
def keeping_float64():
    """While the block runs, nothing that is float64 becomes narrower: the original casts in places (softmax, norms,
    logits) to float32 what it takes for float16, and a float64 run would be none."""
    import torch

    narrow = (torch.float32, torch.float16, torch.bfloat16)
    old_names = ("torch.FloatTensor", "torch.HalfTensor", "torch.BFloat16Tensor")

    def is_wide(value):
        return isinstance(value, torch.Tensor) and value.dtype == torch.float64

    def wide(asked):
        """float64 for a narrower type, or for a tensor of one; anything else as it is."""
        kind = asked.dtype if isinstance(asked, torch.Tensor) else asked
        named = isinstance(kind, str) and kind in old_names
        return torch.float64 if named or (isinstance(kind, torch.dtype) and kind in narrow) else asked

    def cast(call):
        return lambda tensor, *args, **kwargs: tensor if is_wide(tensor) else call(tensor, *args, **kwargs)

    def like(call):
        return lambda tensor, other: tensor if is_wide(tensor) and other.dtype in narrow else call(tensor, other)

    def with_type(call):
        def kept(tensor, *args, **kwargs):
            if is_wide(tensor):
                args, kwargs = tuple(map(wide, args)), {name: wide(value) for name, value in kwargs.items()}
            return call(tensor, *args, **kwargs)

        return kept

    changes = [(torch.Tensor, name, cast) for name in ("float", "half", "bfloat16")]
    changes += [(torch.Tensor, name, with_type) for name in ("to", "type", "softmax", "log_softmax")]
    changes += [(torch, name, with_type) for name in ("softmax", "log_softmax")] + [(torch.Tensor, "type_as", like)]
    undo = [(place, name, vars(place).get(name)) for place, name, _ in changes]
    for place, name, keeping in changes:
        setattr(place, name, keeping(getattr(place, name)))
    try:
        yield
    finally:
        for place, name, own in undo:
            if own is None:
                delattr(place, name)
            else:
                setattr(place, name, own)


def refuse_other_weights(model, stored, may_lack=()):
    """DumpError unless the model computes with the file's weights: each of its tensors is in `stored` ({name: tensor})
    and equal to it. A loader that fills in, resizes or forgets says nothing; `may_lack` are patterns of names that
    the original computes or ties by itself."""
    import torch

    own = model.state_dict()
    missing = [name for name in own if name not in stored and not matches(name, may_lack)]
    if missing:
        raise DumpError("the checkpoint has no %s; the original would run with random values there" % listed(missing))
    broken = [name for name in own if name in stored and bool(torch.isnan(stored[name].double()).any())]
    if broken:
        raise DumpError("the checkpoint holds NaN in %s" % listed(broken))
    other = [name for name, tensor in own.items() if name in stored and not matches(name, may_lack)
             and (tensor.shape != stored[name].shape or not torch.equal(tensor, stored[name].to(tensor)))]  # fmt: skip
    if other:
        raise DumpError("the original loaded other values than the checkpoint holds: %s" % listed(other))


def load_pickle(path):
    """What torch.save wrote, on the CPU, whatever classes it holds."""
    import torch

    settings = {"weights_only": False} if "weights_only" in inspect.signature(torch.load).parameters else {}
    return torch.load(path, map_location="cpu", **settings)


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages in `names` that are not installed: modules whose every attribute is a class that cannot be
    made. Last in the list of finders, so that an installed package comes first."""

    def __init__(self, names):
        self.names, self.used = frozenset(names), set()

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec):
        self.used.add(spec.name.partition(".")[0])
        return AbsentModule(spec.name)

    def exec_module(self, module):
        """Nothing: the module has no code."""


class AbsentModule(types.ModuleType):
    """A package that is imported and never used; a base class or an annotation can be made of its attributes."""

    def __getattr__(self, name):
        return absent(self.__name__, name)


class AbsentClass(type):
    """The type of what stands for an attribute of a package that is not installed."""

    def __getattr__(cls, name):
        return absent(cls.__qualname__, name)


def absent(owner, name):
    """A class that says, when it is called, which package has to be installed after all."""
    if name.startswith("__"):
        raise AttributeError(name)
    full = owner + "." + name

    def refuse(self, *args, **kwargs):
        package = full.partition(".")[0]
        raise DumpError("the original calls %s, but %s is not installed: pip install %s" % (full, package, package))

    return AbsentClass(name, (), {"__init__": refuse, "__qualname__": full})


@contextlib.contextmanager
def standing_in(names):
    """While the block runs, packages that are not installed are stood in for; yields the finder."""
    finder = StandIns(names)
    sys.meta_path.append(finder)
    try:
        yield finder
    finally:
        sys.meta_path.remove(finder)


class Recorder:
    """Outputs of modules, by seam, while the model runs. Inside OFA's layers tensors are [length, batch, channels];
    a reference holds [batch, length, channels]."""

    def __init__(self, model):
        self.values, self.hooks = {}, []
        encoder, decoder = model.encoder, model.decoder
        if hasattr(encoder, "embed_images"):
            self.hook(encoder.embed_images, "vision", lambda out: out)
            self.hook(encoder.image_proj, "projector", lambda out: out)
        self.hook(encoder, "encoder", lambda out: batch_first(out["encoder_out"][0]))
        for name, stack in (("encoder", encoder), ("decoder", decoder)):
            for number, layer in enumerate(stack.layers):
                seam = "%s.layers.%d" % (name, number)
                if number == 0:
                    self.hook_input(layer, name + ".embeddings")
                self.hook(layer, seam, first_tensor)
                for part in LAYER_PARTS:
                    if getattr(layer, part, None) is not None:
                        self.hook(getattr(layer, part), seam + "." + part, first_tensor)

    def hook(self, module, seam, pick):
        def keep(module, args, output):
            if seam not in self.values:
                self.values[seam] = array_of(pick(output))

        self.hooks.append(module.register_forward_hook(keep))

    def hook_input(self, module, seam):
        def keep(module, args):
            if args and seam not in self.values:
                self.values[seam] = array_of(batch_first(args[0]))

        self.hooks.append(module.register_forward_pre_hook(keep))

    def close(self):
        for hook in self.hooks:
            hook.remove()


def batch_first(tensor):
    return tensor.transpose(0, 1).contiguous()


def first_tensor(output):
    return batch_first(output[0] if isinstance(output, (tuple, list)) else output)


def forward(model, inputs, name="forward", float64=False):
    """Seams and logits of one forward pass, in evaluation mode: {tensor name: array}."""
    import torch

    suffix = "@float64" if float64 else ""
    model.eval()
    recorder = Recorder(model)
    try:
        with torch.no_grad(), keeping_float64():
            logits = model(**inputs)[0]
    finally:
        recorder.close()
    seams = dict(recorder.values, logits=array_of(logits))
    return {"%s/out/%s%s" % (name, seam, suffix): value for seam, value in seams.items()}


def train(model, inputs, target, smoothing, name="train", float64=False):
    """Loss and gradients of one step in evaluation mode: the mean, over targets, of the label-smoothed loss."""
    import torch

    suffix = "@float64" if float64 else ""
    model.eval()
    model.zero_grad()
    with keeping_float64():
        logits = model(**inputs)[0]
        dtype = torch.float64 if float64 else torch.float32
        log_probs = torch.log_softmax(logits, dim=-1, dtype=dtype).view(-1, logits.size(-1))
        kept = target.reshape(-1) != PAD
        log_probs, labels = log_probs[kept], target.reshape(-1)[kept]
        nll = -log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        spread = smoothing / (logits.size(-1) - 1)
        loss = ((1.0 - smoothing - spread) * nll - spread * log_probs.sum(-1)).mean()
        loss.backward()
    values = {"loss": array_of(loss), "nll": array_of(nll.mean())}
    for parameter, tensor in model.named_parameters():
        if tensor.grad is not None:
            values["grad_norm." + parameter] = array_of(tensor.grad.double().norm())
            if parameter in GRADIENTS:
                values["grad." + parameter] = array_of(tensor.grad)
    model.zero_grad()
    return {"%s/out/%s%s" % (name, seam, suffix): value for seam, value in values.items()}


def generate(generator, model, inputs, name):
    """Hypotheses of fairseq's generator, best first: ids [batch, beams, length], scores [batch, beams]."""
    found = generator.generate([model], {"net_input": inputs})
    longest = max(len(each["tokens"]) for sample in found for each in sample)
    beams = min(len(sample) for sample in found)
    ids = np.full((len(found), beams, longest), PAD, dtype=np.int64)
    scores = np.zeros((len(found), beams), dtype=np.float32)
    for row, sample in enumerate(found):
        for place, each in enumerate(sample[:beams]):
            ids[row, place, : len(each["tokens"])] = each["tokens"].cpu().numpy()
            scores[row, place] = float(each["score"])
    return {name + "/out/sequences": ids, name + "/out/scores": scores}


def given(name, inputs):
    """The inputs of a run, as a reference names them."""
    return {"%s/in/%s" % (name, argument): array_of(tensor) for argument, tensor in inputs.items()}


def pixels(paths, size, statistics):
    """Images as OFA's evaluation takes them: squashed to size x size with bicubic weights, normalised."""
    import torch
    from PIL import Image

    mean, deviation = (np.array(each, dtype=np.float32)[:, None, None] for each in statistics)
    rows = []
    for path in paths:
        image = Image.open(path).convert("RGB").resize((size, size), Image.BICUBIC)
        rows.append((np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255.0 - mean) / deviation)
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def padded(rows):
    """Token ids [batch, length], padding on the right."""
    import torch

    longest = max(len(row) for row in rows)
    return torch.tensor([list(row) + [PAD] * (longest - len(row)) for row in rows], dtype=torch.long)


def option(task, name, default):
    """An option of the task, whose configuration is a Namespace or a dictionary, by revision."""
    config = getattr(task, "cfg", None) or getattr(task, "args", None)
    try:
        value = config.get(name) if hasattr(config, "get") else getattr(config, name, None)
    except (AttributeError, KeyError):  # a structured configuration of omegaconf 2.0 that lacks the option
        value = None
    return default if value is None else value


def overrides(arguments):
    """Options of training time that do not hold here: {name: value}."""
    changed = dict(OVERRIDES)
    if arguments.bpe_dir:
        changed["bpe_dir"] = os.path.abspath(arguments.bpe_dir)
    for entry in arguments.override:
        name, equals, value = entry.partition("=")
        if not equals:
            raise DumpError("--override %s: expected NAME=VALUE, the value as JSON or as plain text" % entry)
        try:
            changed[name] = json.loads(value)
        except ValueError:
            changed[name] = value
    return changed


def load(arguments):
    """(model, task) by the original's own code, on the CPU, with exactly the weights that the checkpoint holds."""
    # The repository's `fairseq/` holds the package one folder further in, and would hide an installed one.
    repo = os.path.abspath(arguments.repo)
    sys.path[:0] = [os.path.join(repo, "fairseq"), repo]
    with standing_in(IMPORTED_ONLY + arguments.stand_in):
        try:
            from fairseq import checkpoint_utils, utils

            utils.import_user_module(argparse.Namespace(user_dir=os.path.join(repo, "ofa_module")))
            models, _, task = checkpoint_utils.load_model_ensemble_and_task(
                [arguments.checkpoint], arg_overrides=overrides(arguments)
            )
        except ModuleNotFoundError as error:
            hint = "install it, or say --stand-in %s where it is only imported" % error.name
            raise DumpError("%s: %s" % (error, hint)) from error
        except FileNotFoundError as error:
            raise DumpError("%s\n  a file of training time that the task opens: --override NAME=PATH sets the option "
                          "that names it, --override NAME=null leaves it out" % error) from error  # fmt: skip
    stored = load_pickle(arguments.checkpoint)
    weights = stored["model"]
    if arguments.ema:
        weights = (stored.get("extra_state") or {}).get("ema")
        if weights is None:
            raise DumpError("%s holds no averaged weights (extra_state has no ema)" % arguments.checkpoint)
        models[0].load_state_dict(weights)
    model = on_one_processor(models[0].cpu().float().eval())
    refuse_other_weights(model, weights, COMPUTED)
    return model, task


def on_one_processor(model):
    """SyncBatchNorm refuses a CPU; in evaluation, BatchNorm2d with its tensors and epsilon is the same function."""
    import torch

    for name, child in list(model.named_children()):
        if not isinstance(child, torch.nn.SyncBatchNorm):
            on_one_processor(child)
            continue
        plain = torch.nn.BatchNorm2d(
            child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
        )
        plain.weight, plain.bias = child.weight, child.bias
        plain.running_mean, plain.running_var = child.running_mean, child.running_var
        plain.num_batches_tracked = child.num_batches_tracked
        setattr(model, name, plain.train(child.training))
    return model


def encode(task, text):
    """Ids of a text as the task encodes it, without start and end."""
    return task.tgt_dict.encode_line(line=task.bpe.encode(text), add_if_not_exist=False, append_eos=False).tolist()


def dump(arguments):
    """Run the original and write the reference; returns what was written, in words."""
    import torch

    model, task = load(arguments)
    source = {"src_tokens": padded([[START, *encode(task, text), END] for text in arguments.prompt])}
    source["src_lengths"] = source["src_tokens"].ne(PAD).sum(1)
    if arguments.image:
        imagenet = option(task, "imagenet_default_mean_and_std", False)
        statistics = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if imagenet else ([0.5] * 3, [0.5] * 3)
        source["patch_images"] = pixels(arguments.image, int(option(task, "patch_image_size", 480)), statistics)
        source["patch_masks"] = torch.ones(len(arguments.image), dtype=torch.bool)
    answers = [encode(task, text) for text in (arguments.target or arguments.prompt)]
    inputs = dict(source, prev_output_tokens=padded([[START, *ids] for ids in answers]))
    target = padded([[*ids, END] for ids in answers])
    stated = {name: tensor for name, tensor in inputs.items() if name != "src_lengths"}

    runs = {
        "forward": {"kind": "forward"},
        "train": {"kind": "train", "options": {"mode": "eval", "label_smoothing": arguments.label_smoothing}},
    }
    tensors = dict(given("forward", stated), **given("train", dict(stated, target=target)))
    tensors.update(forward(model, inputs))
    tensors.update(train(model, inputs, target, arguments.label_smoothing))
    from models.sequence_generator import SequenceGenerator

    for name, beam in (("greedy", 1), ("beam", arguments.beam)):
        generator = SequenceGenerator([model], task.tgt_dict, beam_size=beam, max_len_b=arguments.max_len_b)
        tensors.update(generate(generator, model, source, name))
        tensors.update(given(name, {key: value for key, value in source.items() if key != "src_lengths"}))
        runs[name] = {"kind": "generate", "options": {"beam": beam, "max_len_b": arguments.max_len_b}}
    kinds, left_out = float64_runs(sum(4 * tensor.numel() for tensor in model.parameters()), arguments.float64)
    if kinds:
        model.double()
        wide = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
        tensors.update(forward(model, wide, float64=True))
        if "train" in kinds:
            tensors.update(train(model, wide, target, arguments.label_smoothing, float64=True))
    about = {
        "project": "OFA-Sys/OFA",
        "commit": commit_of(arguments.repo),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "checkpoint": os.path.basename(arguments.checkpoint),
        "weights": "extra_state.ema" if arguments.ema else "model",
        "float64": left_out or ", ".join(kinds),
    }
    write(arguments.out, "ofa", about, runs, tensors, arguments.may_be_zero)
    return "%s: %d runs, %d tensors; float64: %s" % (arguments.out, len(runs), len(tensors), about["float64"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("out")
    parser.add_argument("--repo", required=True, help="a checkout of https://github.com/OFA-Sys/OFA")
    parser.add_argument("--bpe-dir", help="the folder of vocabularies, where the checkpoint's own does not exist here")
    parser.add_argument("--ema", action="store_true", help="the averaged weights, as port-ofa --ema takes them")
    parser.add_argument("--image", action="append", default=[], help="repeatable; one a prompt")
    parser.add_argument("--prompt", action="append", required=True, help="repeatable")
    parser.add_argument("--target", action="append", default=[], help="repeatable; one a prompt")
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--max-len-b", type=int, default=30)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--override", action="append", default=[], metavar="NAME=VALUE",
                        help="an option of training time, where its file is not here; repeatable")  # fmt: skip
    parser.add_argument("--stand-in", action="append", default=[], metavar="PACKAGE",
                        help="a further package that is only imported; repeatable")  # fmt: skip
    shared_options(parser)
    arguments = parser.parse_args()
    for name in ("image", "target"):
        count = len(getattr(arguments, name))
        if count not in (0, len(arguments.prompt)):
            parser.error("%d --%s for %d --prompt: give one each, or none" % (count, name, len(arguments.prompt)))
    try:
        print(dump(arguments))
    except DumpError as error:
        sys.exit("dump_ofa.py: %s" % error)


if __name__ == "__main__":
    main()
