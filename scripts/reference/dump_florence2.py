"""Dump what Florence-2's remote code computes, as a reference file for port-parity.

Environment: Python 3.10 or 3.11 with the transformers of the remote code's day, see requirements-florence2.txt:

    python3.11 -m venv florence2 && . florence2/bin/activate && pip install -r requirements-florence2.txt

    python dump_florence2.py Florence-2-base-ft/ reference.safetensors --repo Florence-2-base-ft/ \\
        --image car.jpg --prompt "<CAPTION>" --target "A green car."

`--repo` is the folder with the original's code (modeling_florence2.py, processing_florence2.py); the code is executed:
dump only what you trust. Tokenizer and image settings come from the checkpoint, not from there. Runs on the CPU, in
float32 and, where the memory is there, in float64 too.

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

import numpy as np

FORMAT = 1
START, PAD = 2, 1
LAYER_PARTS = ("self_attn", "encoder_attn", "fc1", "fc2")
GRADIENTS = ("image_projection", "language_model.model.decoder.layers.0.self_attn.q_proj.weight")
SHARED, HEAD = "language_model.model.shared.weight", "language_model.lm_head.weight"
# Embeddings that the remote code ties to the shared ones, and buffers that it computes.
COMPUTED = (
    "language_model.model.encoder.embed_tokens.weight", "language_model.model.decoder.embed_tokens.weight",
    "language_model.final_logits_bias", "visual_temporal_embed.pos_idx_to_embed", "*num_batches_tracked",
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


class Recorder:
    """Outputs of modules, by seam, while the model runs; each at its first call."""

    def __init__(self, model):
        self.values, self.hooks = {}, []
        tower = getattr(model, "vision_tower", None)
        if tower is not None:
            for number, (embedding, blocks) in enumerate(zip(tower.convs, tower.blocks)):
                self.hook(embedding, "vision.stages.%d.embedding" % number)
                self.hook(blocks, "vision.stages.%d" % number)
            self.hook(model.image_proj_norm, "projector")
        text = model.language_model.model
        for name, stack in (("encoder", text.encoder), ("decoder", text.decoder)):
            for number, layer in enumerate(stack.layers):
                seam = "%s.layers.%d" % (name, number)
                if number == 0:
                    self.hook_input(layer, name + ".embeddings")
                self.hook(layer, seam)
                for part in LAYER_PARTS:
                    if getattr(layer, part, None) is not None:
                        self.hook(getattr(layer, part), seam + "." + part)
        self.hook(text.encoder, "encoder")

    def hook(self, module, seam):
        def keep(module, args, output):
            if seam not in self.values:
                self.values[seam] = array_of(output[0] if not hasattr(output, "detach") else output)

        self.hooks.append(module.register_forward_hook(keep))

    def hook_input(self, module, seam):
        def keep(module, args):
            if args and seam not in self.values:
                self.values[seam] = array_of(args[0])

        self.hooks.append(module.register_forward_pre_hook(keep))

    def close(self):
        for hook in self.hooks:
            hook.remove()


def forward(model, inputs, name="forward", float64=False):
    """Seams and logits of one forward pass, in evaluation mode: {tensor name: array}."""
    import torch

    suffix = "@float64" if float64 else ""
    model.eval()
    recorder = Recorder(model)
    try:
        with torch.no_grad(), keeping_float64():
            logits = model(**inputs).logits
    finally:
        recorder.close()
    seams = dict(recorder.values, logits=array_of(logits))
    return {"%s/out/%s%s" % (name, seam, suffix): value for seam, value in seams.items()}


def train(model, inputs, name="train", float64=False):
    """Loss and gradients of one step in evaluation mode; `inputs` has `labels`, whose padding counts, as it does in
    the original. A tied matrix has one gradient, the sum over its uses, which stands under both of its names."""
    suffix = "@float64" if float64 else ""
    model.eval()
    model.zero_grad()
    with keeping_float64():
        loss = model(**inputs).loss
        loss.backward()
    values = {"loss": array_of(loss)}
    for parameter, tensor in named_gradients(model):
        values["grad_norm." + parameter] = array_of(tensor.double().norm())
        if parameter in GRADIENTS:
            values["grad." + parameter] = array_of(tensor)
    model.zero_grad()
    return {"%s/out/%s%s" % (name, seam, suffix): value for seam, value in values.items()}


def named_gradients(model):
    """(name, gradient) of every parameter that has one; a tied head under its own name too."""
    found = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
    head = getattr(model.language_model, "lm_head", None)
    if head is not None and head.weight is model.language_model.model.shared.weight and head.weight.grad is not None:
        found = [(name, gradient) for name, gradient in found if name not in (SHARED, HEAD)]
        found += [(SHARED, head.weight.grad), (HEAD, head.weight.grad)]
    return found


def generate(model, inputs, name, **settings):
    """The best hypothesis of each sample: ids [batch, 1, length], without the decoder's start."""
    import torch

    with torch.no_grad():
        ids = model.generate(**dict(inputs, do_sample=False, **settings))
    return {name + "/out/sequences": array_of(ids[:, None, 1:])}


def given(name, inputs):
    """The inputs of a run, as a reference names them."""
    return {"%s/in/%s" % (name, argument): array_of(tensor) for argument, tensor in inputs.items()}


def without_flash_attention(dynamic):
    """transformers' check of a remote file's imports asks for flash_attn although the file imports it only where it is
    installed: leave it out of what `dynamic` (transformers.dynamic_module_utils) looks for."""
    imports = dynamic.get_imports

    def filtered(filename):
        return [name for name in imports(filename) if name != "flash_attn"]

    dynamic.get_imports = filtered


def accepted(config):
    """The configuration with the vision model's type where a re-saved fork has "": the original asserts "davit"."""
    if not getattr(config.vision_config, "model_type", None):
        config.vision_config.model_type = "davit"
    return config


def stored_weights(folder):
    """{name: tensor} of a checkpoint's folder, in the precision of the file."""
    from safetensors.torch import load_file

    names = sorted(os.listdir(folder))
    for ending, read in ((".safetensors", load_file), (".bin", load_pickle)):
        files = [name for name in names if name.startswith(("model", "pytorch_model")) and name.endswith(ending)]
        if files:
            weights = {}
            for name in files:
                weights.update(read(os.path.join(folder, name)))
            return weights
    raise DumpError("%s holds neither model*.safetensors nor pytorch_model*.bin" % folder)


def tie_head(model, stored):
    """Make the head and the shared embedding one parameter where the file says so: it holds both with equal values, or
    no head. The remote code's loader unties them without a word, and leaves a head that is not stored at random.
    Returns `stored` with both names, and whether the head is tied."""
    import torch

    language = model.language_model
    shared = stored.get(SHARED)
    if shared is None:
        aliases = [stored[name] for name in COMPUTED[:2] if name in stored]
        shared = aliases[0] if aliases else stored.get(HEAD)
        if shared is None:
            raise DumpError("the checkpoint has no %s" % SHARED)
        with torch.no_grad():
            language.model.shared.weight.copy_(shared)
    head = stored.get(HEAD)
    tied = head is None or (head.shape == shared.shape and torch.equal(head, shared))
    if tied:
        language.lm_head.weight = language.model.shared.weight
    for stack in (language.model.encoder, language.model.decoder):
        stack.embed_tokens.weight = language.model.shared.weight
    stored = dict(stored)
    stored[SHARED] = shared
    stored[HEAD] = shared if head is None else head
    return stored, tied


def load(arguments):
    """(model, processor, whether the head is tied): the original's classes from --repo, all values and settings from
    the checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, dynamic_module_utils

    without_flash_attention(dynamic_module_utils)
    of_code = dynamic_module_utils.get_class_from_dynamic_module
    code = arguments.repo or arguments.checkpoint
    kind = of_code("modeling_florence2.Florence2ForConditionalGeneration", code)
    config = of_code("configuration_florence2.Florence2Config", code)
    AutoModelForCausalLM.register(config, kind, exist_ok=True)
    stored = stored_weights(arguments.checkpoint)
    model = kind.from_pretrained(
        arguments.checkpoint,
        config=accepted(config.from_pretrained(arguments.checkpoint)),
        torch_dtype=torch.float32,
        attn_implementation="eager",
    ).eval()
    stored, tied = tie_head(model, stored)
    refuse_other_weights(model, stored, COMPUTED)
    return model, load_processor(of_code("processing_florence2.Florence2Processor", code), arguments), tied


def load_processor(kind, arguments):
    """The processor with the checkpoint's own tokenizer and image settings, which may differ from those of --repo."""
    folder = arguments.processor or arguments.checkpoint
    try:
        return kind.from_pretrained(folder)
    except (OSError, ValueError) as error:
        hint = "name the folder of this checkpoint's tokenizer and image settings with --processor"
        raise DumpError("%s holds no processor: %s\n  %s" % (folder, error, hint)) from error


def dump(arguments):
    """Run the original and write the reference; returns what was written, in words."""
    import torch
    import transformers
    from PIL import Image

    model, processor, tied = load(arguments)
    images = [Image.open(path).convert("RGB") for path in arguments.image]
    batch = processor(text=arguments.prompt, images=images, return_tensors="pt", padding=True)
    source = {name: batch[name] for name in ("input_ids", "pixel_values")}
    answers = arguments.target or arguments.prompt
    labels = processor.tokenizer(answers, return_tensors="pt", padding=True).input_ids
    start = torch.full((len(labels), 1), START, dtype=torch.long)
    inputs = dict(source, decoder_input_ids=torch.cat([start, labels[:, :-1]], dim=1))

    runs = {"forward": {"kind": "forward"}, "train": {"kind": "train", "options": {"mode": "eval"}}}
    tensors = dict(given("forward", inputs), **given("train", dict(source, labels=labels)))
    tensors.update(forward(model, inputs))
    tensors.update(train(model, dict(source, labels=labels)))
    for name, beams in (("greedy", 1), ("beam", arguments.beams)):
        settings = {"num_beams": beams, "max_new_tokens": arguments.max_new_tokens}
        tensors.update(generate(model, source, name, **settings))
        tensors.update(given(name, source))
        runs[name] = {"kind": "generate", "options": settings}
    kinds, left_out = float64_runs(sum(4 * tensor.numel() for tensor in model.parameters()), arguments.float64)
    if kinds:
        model.double()
        wide = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
        tensors.update(forward(model, wide, float64=True))
        wide.pop("decoder_input_ids")
        if "train" in kinds:
            tensors.update(train(model, dict(wide, labels=labels), float64=True))
    code = os.path.abspath(arguments.repo or arguments.checkpoint)
    about = {
        "project": "Florence-2 remote code",
        "code": os.path.basename(code),
        "commit": commit_of(code),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "checkpoint": os.path.basename(os.path.abspath(arguments.checkpoint)),
        "lm_head": "tied" if tied else "a matrix of its own",
        "float64": left_out or ", ".join(kinds),
    }
    write(arguments.out, "florence2", about, runs, tensors, arguments.may_be_zero)
    return "%s: %d runs, %d tensors; float64: %s" % (arguments.out, len(runs), len(tensors), about["float64"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a folder with the weights, config.json, tokenizer and image settings")
    parser.add_argument("out")
    parser.add_argument("--repo", help="the folder with the original's code; the checkpoint's own if not given")
    parser.add_argument("--processor", help="the folder of tokenizer and image settings, where not the checkpoint's")
    parser.add_argument("--image", action="append", required=True, help="repeatable; one a prompt")
    parser.add_argument("--prompt", action="append", required=True, help="repeatable")
    parser.add_argument("--target", action="append", default=[], help="repeatable; one a prompt")
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=30)
    shared_options(parser)
    arguments = parser.parse_args()
    for name in ("image", "target"):
        count = len(getattr(arguments, name))
        if count != len(arguments.prompt) and (count or name == "image"):
            parser.error("%d --%s for %d --prompt: give one each" % (count, name, len(arguments.prompt)))
    try:
        print(dump(arguments))
    except DumpError as error:
        sys.exit("dump_florence2.py: %s" % error)


if __name__ == "__main__":
    main()
