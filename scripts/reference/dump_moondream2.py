"""Dump what moondream2 computes, as a reference file for port-parity; one script for the dated revisions.

Environment: the transformers of the revision's day, see requirements-moondream2-2024.txt (revisions 2024-03-04 to
2024-08-26) and requirements-moondream2-2025.txt (2025-01-09 to 2025-06-21) beside this file:

    python3.11 -m venv moondream2 && . moondream2/bin/activate && pip install -r requirements-moondream2-2024.txt

    python dump_moondream2.py moondream2-2024-04-02/ reference.safetensors --image coins.jpg \\
        --prompt "What is this?" --answer "Three coins."

The checkpoint is a folder of the Hub at one revision; `--repo` names another folder with the original's code where a
fine-tuned checkpoint has none. The code is executed: dump only what you trust. Runs on the CPU, in float32 and, where
the memory is there, in float64 too, on the pixels that the original's own preprocessing gives.

Every picture and prompt is a run of its own. Arguments: `pixel_values` [1, 3, height, width] of 2024, or the
normalised crops [1, crops, 3, size, size] of 2025 with their `tiling` [1, 2] (rows, columns); `input_ids` [1, length]
with -1 where the image's vectors stand, `labels` with -100 where nothing is predicted.

weightport is not needed here; of its format this file knows all there is (version 1): one safetensors file, tensors
named <run>/in/<argument> and <run>/out/<seam>[@float64], and one metadata entry.
"""

# ruff: noqa: UP031 - written as the Pythons of these environments have it
import argparse
import contextlib
import fnmatch
import inspect
import json
import os
import sys
import types

import numpy as np

FORMAT = 1
IGNORED, IMAGE = -100, -1
GRADIENTS = ("text_model.lm_head.ln.weight", "model.text.post_ln.weight")
# Tables that the original computes, caches, and counters.
COMPUTED = ("*.inv_freq", "*.cos_cached", "*.sin_cached", "*.kv_cache.*", "*num_batches_tracked")


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


class Recorder:
    """Values by seam while a model runs, each at its first call; `undo` is called when it closes."""

    def __init__(self):
        self.values, self.undo = {}, []

    def keep(self, seam, tensor):
        if "float16" in str(tensor.dtype):
            raise DumpError("%s is %s, in a run of full precision: the original casts it" % (seam, tensor.dtype))
        if seam not in self.values:
            self.values[seam] = array_of(tensor)

    def hook(self, module, seam):
        def keep(module, args, output):
            self.keep(seam, output[0] if isinstance(output, (tuple, list)) else output)

        self.undo.append(module.register_forward_hook(keep).remove)

    def hook_input(self, module, seam):
        def keep(module, args):
            if args:
                self.keep(seam, args[0])

        self.undo.append(module.register_forward_pre_hook(keep).remove)

    def replace(self, owner, name, value):
        own = getattr(owner, name)
        setattr(owner, name, value)
        self.undo.append(lambda: setattr(owner, name, own))

    def close(self):
        while self.undo:
            self.undo.pop()()


class StopEarly(Exception):  # noqa: N818 - no error: what was asked for is known
    """Ends a call of the original whose rest is not needed."""


class Of2024:
    """Revisions of 2024: `vision_encoder` and `text_model`, a tokenizer in the checkpoint's folder."""

    prefix = ""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.start = self.end = tokenizer.bos_token_id

    def pixels(self, image):
        """What the original's preprocessing makes of a picture: {argument: float32 tensor}."""
        return {"pixel_values": self.model.vision_encoder.preprocess(image.convert("RGB")).float()[None]}

    def prompt_ids(self, prompt):
        return self.tokenizer("\n\nQuestion: %s\n\nAnswer:" % prompt, add_special_tokens=False).input_ids

    def answer_ids(self, answer):
        return [*self.tokenizer(" " + answer, add_special_tokens=False).input_ids, self.end]

    def record(self, recorder):
        visual = self.model.vision_encoder.encoder.model["visual"]
        for number, block in enumerate(visual.blocks):
            recorder.hook(block, "vision.layers.%d" % number)
        recorder.hook(visual, "vision")
        recorder.hook(self.model.vision_encoder.projection, "projector")
        layers = self.model.text_model.transformer.h
        recorder.hook_input(layers[0], "decoder.embeddings")
        for number, layer in enumerate(layers):
            recorder.hook(layer, "decoder.layers.%d" % number)

    def image_vectors(self, image, given, recorder):
        """Vectors [1, length, width] of a picture by the original's own path, on the given pixels: float32, which the
        encoder itself takes to the run's type, after it has made the whole view of a picture of several crops."""
        encoder = self.model.vision_encoder
        pixels = given["pixel_values"][0]
        recorder.replace(encoder, "preprocess", lambda picture: pixels)
        return encoder(image)

    def embedded(self, ids):
        return self.model.text_model.get_input_embeddings()(ids)

    def logits(self, embeds):
        import torch

        length = embeds.shape[1]
        output = self.model.text_model(
            inputs_embeds=embeds,
            attention_mask=torch.ones(1, length, dtype=torch.long),
            position_ids=torch.arange(length)[None],
        )
        return output.logits

    def generate(self, image, prompt, embeds, length):
        import torch

        found = self.model.text_model.generate(
            inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long), do_sample=False,
            num_beams=1, max_new_tokens=length, bos_token_id=self.start, eos_token_id=self.end, pad_token_id=self.end,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        # Some versions of transformers put the start before what they generate from embeddings.
        return found.sequences[0, -len(found.scores) :].tolist()


class Of2025:
    """Revisions of 2025: functions over `text` and `vision`, a key-value cache, prefix attention."""

    prefix = "model."

    def __init__(self, model, code):
        self.model, self.code = model, code
        settings = model.config.tokenizer
        self.start, self.end = settings.bos_id, settings.eos_id

    def pixels(self, image):
        import torch

        crops, tiling = self.code.prepare_crops(image, self.model.config.vision, device="cpu")
        return {"pixel_values": crops.float()[None], "tiling": torch.tensor([list(tiling)])}

    def prompt_ids(self, prompt):
        """What the revision's own query hands to the text model: revisions differ in spaces and repeated suffixes."""
        recorder, ids = Recorder(), []

        def stop(tokens, *args, **kwargs):
            ids.extend(tokens[0].tolist())
            raise StopEarly

        encoded = types.SimpleNamespace(pos=0, caches=[])
        recorder.replace(self.model, "encode_image", lambda *args, **kwargs: encoded)
        recorder.replace(self.model, "_prefill_prompt", stop)
        try:
            with_known(self.model.query, encoded, prompt, settings={"variant": None}, reasoning=False)
        except StopEarly:
            return ids
        finally:
            recorder.close()
        raise DumpError("this revision's query does not call _prefill_prompt")

    def answer_ids(self, answer):
        return [*self.model.tokenizer.encode(" " + answer).ids, self.end]

    def record(self, recorder):
        """Layers are no modules here: their input is seen where the functions normalise it."""
        text = sys.modules[self.code.text_decoder.__module__]
        vision = sys.modules[self.code.vision_encoder.__module__]
        for module, part, first, name in ((vision, self.model.vision, "ln1", "vision"),
                                          (text, self.model.text, "ln", "decoder")):  # fmt: skip
            seams = {id(block[first]): "%s.layers.%d" % (name, number - 1) if number else name + ".embeddings"
                     for number, block in enumerate(part["blocks"])}  # fmt: skip
            seams[id(part["post_ln"])] = "%s.layers.%d" % (name, len(part["blocks"]) - 1)
            recorder.replace(module, "layer_norm", self.noting(module.layer_norm, seams, recorder))
        recorder.replace(self.code, "vision_encoder", self.keeping(self.code.vision_encoder, "vision", recorder))
        # Of one picture's features, without an axis of pictures.
        projected = self.keeping(self.code.vision_projection, "projector", recorder, batched=False)
        recorder.replace(self.code, "vision_projection", projected)

    @staticmethod
    def noting(call, seams, recorder):
        def noted(x, weights, *args, **kwargs):
            if id(weights) in seams:
                recorder.keep(seams[id(weights)], x)
            return call(x, weights, *args, **kwargs)

        return noted

    @staticmethod
    def keeping(call, seam, recorder, batched=True):
        def kept(*args, **kwargs):
            output = call(*args, **kwargs)
            recorder.keep(seam, output if batched else output[None])
            return output

        return kept

    def image_vectors(self, image, given, recorder):
        _, tiling = self.code.prepare_crops(image, self.model.config.vision, device="cpu")
        pixels = given["pixel_values"][0].to(self.model.vision.pos_emb.dtype)
        recorder.replace(self.code, "prepare_crops", lambda *args, **kwargs: (pixels, tiling))
        return self.model._run_vision_encoder(image)[None]

    def embedded(self, ids):
        return self.code.text_encoder(ids, self.model.text)

    def logits(self, embeds):
        """Of every position, without the cache, which works in place and in no gradient."""
        import torch

        text, length = self.model.text, embeds.shape[1]
        caches = [block.kv_cache if hasattr(block, "kv_cache") else None for block in text.blocks]
        for block in text.blocks:
            block.kv_cache = None
        try:
            hidden = with_known(
                self.code.text_decoder, embeds, text, self.model.attn_mask[:, :, :length, :length],
                torch.arange(length), self.model.config.text, lora=None,
            )  # fmt: skip
        finally:
            for block, cache in zip(text.blocks, caches):
                block.kv_cache = cache
        decoder = sys.modules[self.code.text_decoder.__module__]
        return text.lm_head(decoder.layer_norm(hidden, text.post_ln))

    def generate(self, image, prompt, embeds, length):
        """The ids that the original's own query embeds, one by one, after the prompt."""
        ids, own = [], self.code.text_encoder

        def noting(tokens, *args, **kwargs):
            if tuple(tokens.shape) == (1, 1):
                ids.append(int(tokens))
            return own(tokens, *args, **kwargs)

        settings = {"temperature": 0, "max_tokens": length, "variant": None}
        encoded = self.model.encode_image(image)
        self.code.text_encoder = noting
        try:
            with_known(self.model.query, encoded, prompt, settings=settings, reasoning=False)
        finally:
            self.code.text_encoder = own
        return ids


def with_known(call, *args, **kwargs):
    """The call, without keyword arguments that this revision does not know."""
    known = inspect.signature(call).parameters
    return call(*args, **{name: value for name, value in kwargs.items() if name in known})


def vectors_and_ids(original, image, given, prompt, answer, recorder):
    """(embeddings [1, length, width], ids with IMAGE at the image's places, labels) of one picture and text."""
    import torch

    vectors = original.image_vectors(image, given, recorder)
    asked, answered = original.prompt_ids(prompt), original.answer_ids(answer) if answer is not None else []
    start, text = torch.tensor([[original.start]]), torch.tensor([asked + answered])
    embeds = torch.cat([original.embedded(start), vectors, original.embedded(text)], dim=1)
    ids = torch.cat([start, torch.full((1, vectors.shape[1]), IMAGE), text], dim=1)
    labels = ids.clone()
    labels[:, : labels.shape[1] - len(answered)] = IGNORED
    return embeds, ids, labels


def run_once(original, image, given, prompt, answer, float64, grad=False):
    """(seams and logits, ids, labels, embeddings) of one picture and text."""
    import torch

    recorder = Recorder()
    try:
        with torch.set_grad_enabled(grad), computing(float64):
            original.record(recorder)
            embeds, ids, labels = vectors_and_ids(original, image, given, prompt, answer, recorder)
            logits = original.logits(embeds)
    finally:
        recorder.close()
    return recorder.values, logits, ids, labels, embeds


def forward(original, image, given, prompt, name, float64=False):
    """({tensor name: array} of one forward pass, the ids it took)."""
    original.model.eval()
    seams, logits, ids, _, _ = run_once(original, image, given, prompt, None, float64)
    suffix = "@float64" if float64 else ""
    seams = dict(seams, logits=array_of(logits))
    return {"%s/out/%s%s" % (name, seam, suffix): value for seam, value in seams.items()}, ids


def train(original, image, given, prompt, answer, name, float64=False):
    """({tensor name: array} of loss and gradients, the ids, the labels): the mean over the answer and its end."""
    import torch

    suffix = "@float64" if float64 else ""
    original.model.eval()
    original.model.zero_grad()
    _, logits, ids, labels, _ = run_once(original, image, given, prompt, answer, float64, grad=True)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=IGNORED)
    loss.backward()
    values = {"loss": array_of(loss)}
    for parameter, tensor in original.model.named_parameters():
        parameter = original.prefix + parameter
        if tensor.grad is not None:
            values["grad_norm." + parameter] = array_of(tensor.grad.double().norm())
            if parameter in GRADIENTS:
                values["grad." + parameter] = array_of(tensor.grad)
    original.model.zero_grad()
    return {"%s/out/%s%s" % (name, seam, suffix): value for seam, value in values.items()}, ids, labels


def generate(original, image, given, prompt, length, name):
    """Greedy ids [1, 1, length] without the start, up to the end where it comes."""
    import torch

    recorder = Recorder()
    try:
        with torch.no_grad():
            embeds, ids, _ = vectors_and_ids(original, image, given, prompt, None, recorder)
            found = original.generate(image, prompt, embeds, length)
    finally:
        recorder.close()
    if not found:
        raise DumpError("run %s generated nothing" % name)
    return {name + "/out/sequences": np.array(found, dtype=np.int64)[None, None]}, ids


def given_of(name, inputs):
    """The inputs of a run, as a reference names them."""
    return {"%s/in/%s" % (name, argument): array_of(tensor) for argument, tensor in inputs.items()}


def stored_weights(folder):
    """{name: tensor} of a checkpoint's folder, without what torch.compile puts into names."""
    from safetensors.torch import load_file

    names = sorted(os.listdir(folder))
    for ending, read in ((".safetensors", load_file), (".bin", load_pickle), (".pt", load_pickle)):
        files = [name for name in names if name.endswith(ending)]
        if files:
            weights = {}
            for name in files:
                weights.update(read(os.path.join(folder, name)))
            return {name.replace("._orig_mod", ""): tensor for name, tensor in weights.items()}
    raise DumpError("%s holds no safetensors, .bin or .pt file" % folder)


def without_flash_attention(dynamic):
    """transformers' check of a remote file's imports asks for flash_attn although the file imports it only where it is
    installed: leave it out of what `dynamic` (transformers.dynamic_module_utils) looks for."""
    imports = dynamic.get_imports

    def filtered(filename):
        return [name for name in imports(filename) if name != "flash_attn"]

    dynamic.get_imports = filtered


def build(arguments):
    """(model of float32 with the folder's weights, module of its class): the original's class, made and filled here;
    its own loaders leave what a file lacks at random without a word."""
    import torch
    from transformers import dynamic_module_utils

    code = arguments.repo or arguments.checkpoint
    stated = {}
    for folder in (arguments.checkpoint, code):
        path = os.path.join(folder, "config.json")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                stated = dict(json.load(file), **stated)
    names = stated.get("auto_map")
    if not names:
        raise DumpError("%s has no config.json that names the original's classes (auto_map): give --repo" % code)
    without_flash_attention(dynamic_module_utils)
    of_code = dynamic_module_utils.get_class_from_dynamic_module
    kind = of_code(names["AutoModelForCausalLM"].rpartition("--")[2], code)
    config = of_code(names["AutoConfig"].rpartition("--")[2], code).from_pretrained(arguments.checkpoint)
    config._attn_implementation = "eager"
    if arguments.tokenizer:
        local_tokenizer(kind, arguments.tokenizer)
    model = kind(config).float().eval()
    weights = stored_weights(arguments.checkpoint)
    own = model.state_dict()
    if not any(name in own for name in weights):
        weights = {"model." + name: tensor for name, tensor in weights.items()}
    unknown = [name for name in weights if name not in own and not matches(name, COMPUTED)]
    if unknown:
        raise DumpError("the original has no place for %s" % listed(unknown))
    with torch.no_grad():
        for name, tensor in own.items():
            if name in weights and tensor.shape == weights[name].shape:
                tensor.copy_(weights[name])
    refuse_other_weights(model, weights, COMPUTED)
    return model


def local_tokenizer(kind, path):
    """Revisions of 2025 fetch their tokenizer from the Hub while they are made: take it from a file."""
    import tokenizers

    class Local:
        @staticmethod
        def from_pretrained(*args, **kwargs):
            return tokenizers.Tokenizer.from_file(path)

    package = kind.__module__.rpartition(".")[0]
    for name, module in list(sys.modules.items()):
        if name.startswith(package) and vars(module).get("Tokenizer") is tokenizers.Tokenizer:
            module.Tokenizer = Local


def load(arguments):
    """The original, of 2024 or 2025 by its modules."""
    from transformers import AutoTokenizer

    model = build(arguments)
    if hasattr(model, "text_model"):
        return Of2024(model, AutoTokenizer.from_pretrained(arguments.tokenizer or arguments.checkpoint))
    if hasattr(model, "_setup_caches"):
        model._setup_caches()
    inner = model.model
    return Of2025(inner, sys.modules[type(inner).__module__])


def dump(arguments):
    """Run the original and write the reference; returns what was written, in words."""
    import torch
    import transformers
    from PIL import Image

    original = load(arguments)
    images = [Image.open(path) for path in arguments.image]
    runs, tensors, cases = {}, {}, []
    for number, (image, prompt) in enumerate(zip(images, arguments.prompt)):
        answer = arguments.answer[number] if arguments.answer else prompt
        given = original.pixels(image)
        found, ids = forward(original, image, given, prompt, "forward%d" % number)
        tensors.update(dict(found, **given_of("forward%d" % number, dict(given, input_ids=ids))))
        found, ids, labels = train(original, image, given, prompt, answer, "train%d" % number)
        tensors.update(dict(found, **given_of("train%d" % number, dict(given, input_ids=ids, labels=labels))))
        found, ids = generate(original, image, given, prompt, arguments.max_new_tokens, "greedy%d" % number)
        tensors.update(dict(found, **given_of("greedy%d" % number, dict(given, input_ids=ids))))
        runs["forward%d" % number] = {"kind": "forward"}
        runs["train%d" % number] = {"kind": "train", "options": {"mode": "eval"}}
        runs["greedy%d" % number] = {"kind": "generate", "options": {"max_new_tokens": arguments.max_new_tokens}}
        cases.append((image, given, prompt, answer))
    weights = sum(4 * tensor.numel() for tensor in original.model.parameters())
    kinds, left_out = float64_runs(weights, arguments.float64)
    if kinds:
        original.model.double()
        for number, (image, given, prompt, answer) in enumerate(cases):
            tensors.update(forward(original, image, given, prompt, "forward%d" % number, float64=True)[0])
            if "train" in kinds:
                tensors.update(train(original, image, given, prompt, answer, "train%d" % number, float64=True)[0])
    about = {
        "project": "vikhyat/moondream",
        "commit": commit_of(arguments.repo or arguments.checkpoint),
        "generation": type(original).__name__[2:],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "checkpoint": os.path.basename(os.path.abspath(arguments.checkpoint)),
        "float64": left_out or ", ".join(kinds),
    }
    write(arguments.out, "moondream2", about, runs, tensors, arguments.may_be_zero)
    return "%s: %d runs, %d tensors; float64: %s" % (arguments.out, len(runs), len(tensors), about["float64"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a folder with weights, config.json and, of 2024, a tokenizer")
    parser.add_argument("out")
    parser.add_argument("--repo", help="the folder with the original's code; the checkpoint's own if not given")
    parser.add_argument("--tokenizer", help="of 2025 a tokenizer.json, which is fetched from the Hub if not given")
    parser.add_argument("--image", action="append", required=True, help="repeatable; one a prompt")
    parser.add_argument("--prompt", action="append", required=True, help="repeatable")
    parser.add_argument("--answer", action="append", default=[], help="repeatable; one a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=30)
    shared_options(parser)
    arguments = parser.parse_args()
    for name in ("image", "answer"):
        count = len(getattr(arguments, name))
        if count != len(arguments.prompt) and (count or name == "image"):
            parser.error("%d --%s for %d --prompt: give one each" % (count, name, len(arguments.prompt)))
    try:
        print(dump(arguments))
    except DumpError as error:
        sys.exit("dump_moondream2.py: %s" % error)


if __name__ == "__main__":
    main()
