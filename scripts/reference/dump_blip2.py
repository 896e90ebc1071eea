"""Dump what BLIP-2 computes in LAVIS, as a reference file for port-parity.

Environment: Python 3.8 to 3.10 with LAVIS's own transformers, see requirements-blip2.txt beside this file:

    git clone https://github.com/salesforce/LAVIS && git -C LAVIS checkout 506965b9
    python3.9 -m venv blip2 && . blip2/bin/activate && pip install -r requirements-blip2.txt

    python dump_blip2.py blip2_pretrained_opt2.7b.pth reference.safetensors --repo LAVIS --llm opt-2.7b/ \\
        --vit eva_vit_g.pth --image car.jpg --text "a photo of a car"

A T5 model takes --target beside --text; a stage-1 model (image-text matching) needs no --llm. bert-base-uncased comes
from the Hub, or from a folder of that name in the working directory. Runs on the CPU, in float32 and, where the memory
is there, in float64 too. LAVIS rounds the language model to float16 or bfloat16 while it loads; here its values are
those of the folder unless --rounded is given.

Arguments: `image` as LAVIS's evaluation takes it, `input_ids` and `attention_mask` of the text alone, `labels` as the
language model is given them. The checkpoint is loaded by the original's own code, which executes it: dump only files
that you trust. weightport is not needed here; of its format this file knows all there is (version 1): one safetensors
file, tensors named <run>/in/<argument> and <run>/out/<seam>[@float64], and one metadata entry.
"""

# ruff: noqa: UP031 - written as the Pythons of these environments have it
import argparse
import contextlib
import fnmatch
import importlib
import importlib.abc
import importlib.machinery
import inspect
import json
import os
import sys
import types

import numpy as np

FORMAT = 1
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
GRADIENTS = ("query_tokens", "ln_vision.weight", "opt_proj.bias", "t5_proj.bias")
IMPORTED_ONLY = [
    "braceexpand", "contexttimer", "cv2", "decord", "ftfy", "librosa", "moviepy", "nltk", "open3d", "opendatasets",
    "peft", "pycocoevalcap", "pycocotools", "soundfile", "spacy", "streamlit",
    "torchaudio", "wandb", "webdataset",
]  # fmt: skip
# Buffers that the original computes, and names under which a checkpoint repeats frozen matrices of the language model.
COMPUTED = ("*.position_ids", "*num_batches_tracked")
REPEATED = ("opt_model.*", "t5_model.*", "*.position_ids")
KINDS = {"itm_head.weight": "blip2_image_text_matching", "opt_proj.weight": "blip2_opt", "t5_proj.weight": "blip2_t5"}
# What Blip2ITM computes of pair i: two logits, or one similarity.
HEAD_SEAMS = {"itm": "itm", "itc": "itc_pairs"}
LANGUAGE = {"blip2_opt": "opt_model", "blip2_t5": "t5_model"}


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
    """Outputs of modules, by seam, while the model runs, and what its language model is given; each at the first
    call."""

    def __init__(self, model):
        self.values, self.given, self.undo = {}, {}, []
        vision, language = model.visual_encoder, language_model(model)
        blocks = vision.blocks if hasattr(vision, "blocks") else vision.transformer.resblocks
        self.hook_each(blocks, "vision.layers", transpose=not hasattr(vision, "blocks"))
        self.hook(vision, "vision")
        self.hook(model.ln_vision, "vision.norm")
        self.hook_each(model.Qformer.bert.encoder.layer, "qformer.layers")
        self.hook(model.Qformer.bert, "qformer")
        if language is None:
            self.note(model.Qformer.bert, ("input_ids", "attention_mask"))
            return
        self.hook(model.opt_proj if hasattr(model, "opt_proj") else model.t5_proj, "projector")
        if hasattr(language, "encoder"):
            self.hook_each(language.encoder.block, "encoder.layers")
            self.hook(language.encoder, "encoder")
            self.hook_each(language.decoder.block, "decoder.layers")
        else:
            self.hook_each(language.model.decoder.layers, "decoder.layers")
        self.note(language, ("attention_mask", "decoder_attention_mask", "labels"))
        embedding = language.get_input_embeddings()
        handle = embedding.register_forward_pre_hook(lambda module, args: self.keep_given("input_ids", args[0]))
        self.undo.append(handle.remove)

    def hook(self, module, seam, transpose=False):
        def keep(module, args, output):
            tensor = output if hasattr(output, "detach") else output[0]
            if "float16" in str(tensor.dtype):
                raise DumpError("%s is %s: the original runs in autocast or on rounded weights" % (seam, tensor.dtype))
            if seam not in self.values:
                self.values[seam] = array_of(tensor.transpose(0, 1) if transpose else tensor)

        self.undo.append(module.register_forward_hook(keep).remove)

    def hook_each(self, modules, seam, transpose=False):
        for number, module in enumerate(modules):
            self.hook(module, "%s.%d" % (seam, number), transpose)

    def note(self, module, names):
        """Keep arguments of a module's first call."""
        own = module.forward
        signature = inspect.signature(own)

        def noting(*args, **kwargs):
            bound = signature.bind(*args, **kwargs).arguments
            for name in names:
                self.keep_given(name, bound.get(name, bound.get("kwargs", {}).get(name)))
            return own(*args, **kwargs)

        module.forward = noting
        self.undo.append(lambda: vars(module).pop("forward"))

    def keep_given(self, name, tensor):
        if tensor is not None and name not in self.given:
            self.given[name] = tensor.detach().clone()

    def close(self):
        for undo in self.undo:
            undo()


def language_model(model):
    """The language model inside, None of a stage-1 model."""
    return getattr(model, "opt_model", getattr(model, "t5_model", None))


@contextlib.contextmanager
def computing(float64):
    """While the block runs, numbers that become tensors have the run's type, and nothing is narrowed."""
    import torch

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if float64 else torch.float32)
    try:
        with keeping_float64():
            yield
    finally:
        torch.set_default_dtype(default)


def forward(model, samples, name="forward", float64=False, **settings):
    """({tensor name: array} of the seams of one forward pass, the arguments inside): logits and loss, or the output of
    a stage-1 head, which is called by its name."""
    import torch

    suffix = "@float64" if float64 else ""
    recorder, language, kept = Recorder(model.eval()), language_model(model), {}

    def keep_logits(module, args, output):
        kept["logits"] = array_of(output.logits)

    if language is not None:
        recorder.undo.append(language.register_forward_hook(keep_logits).remove)
    try:
        with torch.no_grad(), computing(float64):
            output = model(samples, **settings)
    finally:
        recorder.close()
    seams = dict(recorder.values)
    seams.update(kept or {HEAD_SEAMS[settings["match_head"]]: array_of(output)})
    return {"%s/out/%s%s" % (name, seam, suffix): value for seam, value in seams.items()}, recorder.given


def text_mask(given, queries):
    """The attention mask of the text alone, without the queries before it."""
    mask, ids = given.get("attention_mask"), given.get("input_ids")
    surplus = 0 if mask is None or ids is None else mask.shape[1] - ids.shape[1]
    if surplus not in (0, queries):
        raise DumpError("the attention mask has %d positions more than the text, and there are %d queries"
                        % (surplus, queries))  # fmt: skip
    return {} if mask is None else {"attention_mask": mask[:, surplus:]}


def train(model, samples, name="train", float64=False):
    """Loss and gradients of the trained parameters, in evaluation mode."""
    suffix = "@float64" if float64 else ""
    model.eval()
    model.zero_grad()
    with computing(float64):
        loss = model(samples)["loss"]
        loss.backward()
    values = {"loss": array_of(loss)}
    for parameter, tensor in model.named_parameters():
        if tensor.grad is not None:
            values["grad_norm." + parameter] = array_of(tensor.grad.double().norm())
            if parameter in GRADIENTS:
                values["grad." + parameter] = array_of(tensor.grad)
    model.zero_grad()
    return {"%s/out/%s%s" % (name, seam, suffix): value for seam, value in values.items()}


def generate(model, samples, beams, length, name):
    """(ids [batch, 1, length] of the best hypotheses, without the start; the prompt's arguments; the options)."""
    language, kept = language_model(model), {}
    own, recorder = language.generate, Recorder(model.eval())

    def keeping(*args, **kwargs):
        kept["ids"] = own(*args, **kwargs)
        kept["mask"] = kwargs.get("attention_mask")
        return kept["ids"]

    language.generate = keeping
    try:
        model.generate(samples, num_beams=beams, max_length=length)
    finally:
        recorder.close()
        vars(language).pop("generate")
    # transformers puts a token before what it generates from embeddings; OPT's limit counts it.
    new = length - 1 if hasattr(model, "opt_model") else length
    inputs = {"input_ids": recorder.given["input_ids"], "attention_mask": kept["mask"]}
    options = {"num_beams": beams, "max_new_tokens": new}
    return {name + "/out/sequences": array_of(kept["ids"][:, None, 1:])}, inputs, options


def given(name, inputs):
    """The inputs of a run, as a reference names them."""
    return {"%s/in/%s" % (name, argument): array_of(tensor) for argument, tensor in inputs.items()}


def pixels(paths, size):
    """Images as LAVIS's evaluation takes them: squashed to size x size with bicubic weights, normalised."""
    import torch
    from PIL import Image

    mean, deviation = (np.array(each, dtype=np.float32)[:, None, None] for each in (MEAN, DEVIATION))
    rows = []
    for path in paths:
        image = Image.open(path).convert("RGB").resize((size, size), Image.BICUBIC)
        rows.append((np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / np.float32(255) - mean) / deviation)
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def settings_of(weights, config, arguments):
    """(registered name, arguments of the class) of a checkpoint: from its tensors where they tell, then from its own
    configuration."""
    arch = next((kind for key, kind in KINDS.items() if key in weights), None)
    if arch is None:
        raise DumpError("the checkpoint has none of %s: no BLIP-2 of OPT, T5 or stage 1" % ", ".join(KINDS))
    width = weights["ln_vision.weight"].shape[0]
    vit = config.get("vit_model") or {1408: "eva_clip_g", 1024: "clip_L"}.get(width)
    if vit is None:
        raise DumpError("ln_vision.weight has %d values: no known vision encoder" % width)
    settings = {
        "vit_model": vit,
        "img_size": arguments.image_size or config.get("image_size") or 224,
        "vit_precision": "fp32",
        "freeze_vit": not any(key.startswith("visual_encoder.") for key in weights),
        "num_query_token": weights["query_tokens"].shape[1],
        "max_txt_len": config.get("max_txt_len", 32),
    }
    if arch in LANGUAGE:
        if not arguments.llm:
            raise DumpError("--llm: the folder of the language model, which the checkpoint does not hold")
        settings.update({LANGUAGE[arch]: arguments.llm, "prompt": config.get("prompt", "")})
    return arch, settings


def load(arguments):
    """(model, registered name, settings): the original's classes with exactly the weights of the three sources."""
    state = load_pickle(arguments.checkpoint)
    weights = state.get("model", state)
    config = (state.get("config") or {}).get("model") or {}
    arch, settings = settings_of(weights, config, arguments)
    sys.path.insert(0, os.path.abspath(arguments.repo))
    with standing_in(IMPORTED_ONLY + arguments.stand_in):
        try:
            registry = importlib.import_module("lavis.common.registry").registry
            importlib.import_module("lavis.models")
            towers = [importlib.import_module("lavis.models." + name) for name in ("eva_vit", "clip_vit")]
        except ModuleNotFoundError as error:
            hint = "install it, or say --stand-in %s where it is only imported" % error.name
            raise DumpError("%s: %s" % (error, hint)) from error
        files = [arguments.vit] if arguments.vit else []
        for tower in towers:
            tower.download_cached_file = vision_file(tower.download_cached_file, files)
        model = registry.get_model_class(arch)(**settings)
    trained = {key: tensor for key, tensor in weights.items() if not matches(key, REPEATED)}
    unknown = model.load_state_dict(trained, strict=False).unexpected_keys
    if unknown:
        raise DumpError("the original has no place for %s" % listed(unknown))
    stored = {"visual_encoder." + key: tensor for file in files[:1] for key, tensor in load_pickle(file).items()}
    stored.update(trained)
    model = model.float().eval()
    language = language_model(model)
    if language is not None:
        own = language.state_dict() if arguments.rounded else unrounded(language, arguments.llm)
        stored.update({"%s.%s" % (LANGUAGE[arch], key): tensor for key, tensor in own.items()})
    table = [key for key, tensor in model.state_dict().items()
             if key.endswith(("pos_embed", "positional_embedding")) and key in stored
             and key not in weights and stored[key].shape != tensor.shape]  # fmt: skip
    refuse_other_weights(model, stored, (*COMPUTED, *table))
    return model, arch, settings


def vision_file(download, files):
    """`download_cached_file`, which notes what it gives, or gives the file that is noted already."""

    def found(url, *args, **kwargs):
        if not files:
            files.append(download(url, *args, **kwargs))
        return files[0]

    return found


def unrounded(language, folder):
    """Give the language model the folder's own values, in float32, and return them: {name: tensor}. LAVIS loads OPT as
    float16 and casts T5 to bfloat16."""
    import torch

    fresh, report = type(language).from_pretrained(
        folder, config=language.config, torch_dtype=torch.float32, output_loading_info=True
    )
    tied = [key for key in report["missing_keys"] if not key.endswith(("lm_head.weight", "embed_tokens.weight"))]
    if tied or report["mismatched_keys"]:
        raise DumpError("%s has no %s" % (folder, listed(tied + [str(key) for key in report["mismatched_keys"]])))
    language.load_state_dict(fresh.state_dict())
    return fresh.state_dict()


def dump(arguments):
    """Run the original and write the reference; returns what was written, in words."""
    import torch
    import transformers

    model, arch, settings = load(arguments)
    queries = settings["num_query_token"]
    samples = {"image": pixels(arguments.image, settings["img_size"]), "text_input": arguments.text}
    if arguments.target:
        samples["text_output"] = arguments.target
    if arch == "blip2_t5" and not arguments.target:
        raise DumpError("a T5 model takes a --target for each --text")
    heads = {"forward": {}} if arch in LANGUAGE else {head: {"match_head": head} for head in ("itm", "itc")}
    runs = {name: {"kind": "forward", "options": {"head": name} if head else {}} for name, head in heads.items()}
    tensors = {}
    for name, head in heads.items():
        found, inside = forward(model, samples, name, **head)
        inputs = {"image": samples["image"], **inside, **text_mask(inside, queries)}
        tensors.update(dict(found, **given(name, inputs)))
    if arch in LANGUAGE:
        runs["train"] = {"kind": "train", "options": {"mode": "eval"}}
        tensors.update(dict(train(model, samples), **given("train", inputs)))
        for name, beams in (("greedy", 1), ("beam", arguments.beams)):
            asked = {"image": samples["image"], "prompt": arguments.prompt}
            found, inside, options = generate(model, asked, beams, arguments.max_length, name)
            inputs = {"image": samples["image"], **inside, **text_mask(inside, queries)}
            tensors.update(dict(found, **given(name, inputs)))
            runs[name] = {"kind": "generate", "options": options}
    kinds, left_out = float64_runs(sum(4 * tensor.numel() for tensor in model.parameters()), arguments.float64)
    if kinds:
        model.double()
        samples["image"] = samples["image"].double()
        for name, head in heads.items():
            tensors.update(forward(model, samples, name, float64=True, **head)[0])
        if "train" in kinds and arch in LANGUAGE:
            tensors.update(train(model, samples, float64=True))
    about = {
        "project": "salesforce/LAVIS",
        "commit": commit_of(arguments.repo),
        "class": arch,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "checkpoint": os.path.basename(arguments.checkpoint),
        "language model": "as LAVIS rounds it" if arguments.rounded else "the folder's values",
        "float64": left_out or ", ".join(kinds),
    }
    write(arguments.out, "blip2", about, runs, tensors, arguments.may_be_zero)
    return "%s: %d runs, %d tensors; float64: %s" % (arguments.out, len(runs), len(tensors), about["float64"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="the .pth of LAVIS")
    parser.add_argument("out")
    parser.add_argument("--repo", required=True, help="a checkout of https://github.com/salesforce/LAVIS")
    parser.add_argument("--llm", help="the folder of the language model (OPT or Flan-T5)")
    parser.add_argument("--vit", help="eva_vit_g.pth or clip_vit_L.pth; fetched as LAVIS does if not given")
    parser.add_argument("--image-size", type=int, help="where the checkpoint does not say; 224 if not given")
    parser.add_argument("--rounded", action="store_true", help="the language model as LAVIS rounds it")
    parser.add_argument("--image", action="append", required=True, help="repeatable; one a text")
    parser.add_argument("--text", action="append", required=True, help="repeatable")
    parser.add_argument("--target", action="append", default=[], help="repeatable; one a text, for T5")
    parser.add_argument("--prompt", default="a photo of", help="of generation")
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--max-length", type=int, default=30)
    parser.add_argument("--stand-in", action="append", default=[], metavar="PACKAGE",
                        help="a further package that is only imported; repeatable")  # fmt: skip
    shared_options(parser)
    arguments = parser.parse_args()
    for name in ("image", "target"):
        count = len(getattr(arguments, name))
        if count != len(arguments.text) and (count or name == "image"):
            parser.error("%d --%s for %d --text: give one each" % (count, name, len(arguments.text)))
    try:
        print(dump(arguments))
    except DumpError as error:
        sys.exit("dump_blip2.py: %s" % error)


if __name__ == "__main__":
    main()
