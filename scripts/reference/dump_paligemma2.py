"""Dump what PaliGemma (1 and 2) computes in big_vision, as a reference file for port-parity.

Environment: Python 3.11, JAX on the CPU, see requirements-paligemma2.txt beside this file:

    git clone https://github.com/google-research/big_vision && git -C big_vision checkout 0127fb6
    python3.11 -m venv paligemma2 && . paligemma2/bin/activate && pip install -r requirements-paligemma2.txt

    python dump_paligemma2.py paligemma2-3b-pt-224.b16.npz reference.safetensors --repo big_vision \\
        --tokenizer paligemma_tokenizer.model --image car.jpg --prefix "caption en" --suffix "A green car."

All sizes come from the file's shapes; only the text model's name may have to be given (--variant). TensorFlow, which
big_vision imports and nothing here calls, need not be installed. Runs on the CPU with the highest matmul precision, in
float32 and, where the memory is there, in float64 too; bfloat16 parameters are widened first.

Arguments of the original: `image` [batch, size, size, 3] in -1..1, `text` and `mask_ar` [batch, length] as the model
is called with them. A training run has one position more and `mask_loss`; generation has `mask_input`. Gradients have
the keys of the npz without `params/`; a norm of a tensor that is stacked over layers is one number a layer.

weightport is not needed here; of its format this file knows all there is (version 1): one safetensors file, tensors
named <run>/in/<argument> and <run>/out/<seam>[@float64], and one metadata entry.
"""

# ruff: noqa: UP031 - written as the scripts of older environments are
import argparse
import contextlib
import fnmatch
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
import types

import numpy as np

FORMAT = 1
PAD, END, START = 0, 1, 2
GRADIENTS = ("img/head/kernel", "llm/final_norm/scale")
IMPORTED_ONLY = ["tensorflow", "tensorflow_datasets", "tensorflow_text", "clu", "orbax"]
# (width, layers) of the text models that gemma.get_config knows.
VARIANTS = {(2048, 18): "gemma_2b", (2304, 26): "gemma2_2b", (3584, 42): "gemma2_9b", (4608, 46): "gemma2_27b"}
# Training runs, and over what each takes the mean.
TRAINING = (("train", "tokens"), ("trainer", "examples"))


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
    """A copy, bfloat16 (which numpy does not know) widened."""
    array = np.array(tensor)
    return array.astype(np.float32) if "bfloat16" in str(array.dtype) else array


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


def read_params(path):
    """{key: float32 array} of an npz: what is under params/, else under opt/target/, else everything; keys without
    that prefix. bfloat16 comes out of numpy as two raw bytes."""
    with np.load(path, allow_pickle=False) as archive:
        prefix = next((prefix for prefix in ("params/", "opt/target/")
                       if any(key.startswith(prefix) for key in archive.files)), "")  # fmt: skip
        keys = [key for key in archive.files if key.startswith(prefix)]
        found = {key[len(prefix) :]: widened(archive[key]) for key in keys}
    broken = [key for key, array in found.items() if np.isnan(array).any()]
    if broken:
        raise DumpError("the checkpoint holds NaN in %s" % listed(broken))
    return found


def widened(array):
    """float32 values of float16, float32 and raw bfloat16 ones."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        bits = np.ascontiguousarray(array).view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32)
    return array.astype(np.float32)


def nested(flat):
    """{"a": {"b": x}} of {"a/b": x}."""
    tree = {}
    for key, value in flat.items():
        *folders, name = key.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    return tree


def flat(tree, prefix=""):
    """{"a/b": x} of {"a": {"b": x}}."""
    found = {}
    for key, value in tree.items():
        found.update(flat(value, prefix + key + "/") if hasattr(value, "items") else {prefix + key: value})
    return found


def architecture(params, variant=None, softcap=0.0):
    """(image configuration, text configuration, image size) of a checkpoint, from its shapes."""
    table, grid = params["llm/embedder/input_embedding"], params["img/pos_embedding"].shape[1]
    stacked_text = "llm/layers/mlp/linear" in params
    layers = params["llm/layers/mlp/linear"].shape[0] if stacked_text else count(params, "llm/layers/%d/mlp/linear")
    variant = variant or VARIANTS.get((table.shape[1], layers))
    if variant is None:
        raise DumpError("no known text model has width %d and %d layers: give --variant, as gemma.get_config names it"
                        % (table.shape[1], layers))  # fmt: skip
    block = "img/Transformer/encoderblock%s/MultiHeadDotProductAttention_0/query/kernel"
    stacked_image = block % "" in params
    kernel = params[block % ("" if stacked_image else "_0")]
    hidden = params["img/Transformer/encoderblock%s/MlpBlock_0/Dense_0/kernel" % ("" if stacked_image else "_0")]
    patch = params["img/embedding/kernel"].shape[:2]
    image = {
        "width": kernel.shape[-3],
        "depth": kernel.shape[0] if stacked_image else count(params, block.replace("%s", "_%d")),
        "mlp_dim": hidden.shape[-1],
        "num_heads": kernel.shape[-2],
        "patch_size": tuple(patch),
        "pool_type": "none",
        "scan": stacked_image,
    }
    text = {"variant": variant, "vocab_size": table.shape[0], "scan": stacked_text, "cache_dtype": "float32",
            "final_logits_softcap": softcap}  # fmt: skip
    side = round(grid**0.5)
    if side * side != grid:
        raise DumpError("img/pos_embedding has %d rows, which are no square" % grid)
    return image, text, side * patch[0]


def count(params, pattern):
    """How many numbers from 0 on the pattern has in the keys."""
    number = 0
    while pattern % number in params:
        number += 1
    return number


class Seen:
    """A module seen through changes: what is not changed is the module's own."""

    def __init__(self, module, **changes):
        self.__dict__.update(changes, module=module)

    def __getattr__(self, name):
        return getattr(self.module, name)


@contextlib.contextmanager
def changed(places):
    """While the block runs, attributes have other values: {(object, name): value}."""
    own = {place: getattr(*place) for place in places}
    try:
        for (owner, name), value in places.items():
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name), value in own.items():
            setattr(owner, name, value)


class Original:
    """big_vision's model with a checkpoint's configuration; run it inside `computing(dtype)`."""

    def __init__(self, repo, image, text, extra=()):
        sys.path.insert(0, os.path.abspath(repo))
        self.finder = StandIns(IMPORTED_ONLY + list(extra))
        sys.meta_path.append(self.finder)
        try:
            self.gemma = importlib.import_module("big_vision.models.ppp.gemma")
            self.vit = importlib.import_module("big_vision.models.vit")
            self.wrapper = importlib.import_module("big_vision.models.proj.paligemma.gemma_bv")
            self.paligemma = importlib.import_module("big_vision.models.proj.paligemma.paligemma")
        except ModuleNotFoundError as error:
            hint = "install it, or say --stand-in %s where it is only imported" % error.name
            raise DumpError("%s: %s" % (error, hint)) from error
        finally:
            sys.meta_path.remove(self.finder)
        known = getattr(self.wrapper.Model, "__dataclass_fields__", {})
        self.image = image
        self.text = {name: value for name, value in text.items() if name in known}

    @contextlib.contextmanager
    def computing(self, dtype):
        """While the block runs, yields the model of this precision. The original's text model casts attention logits
        to float32 and has no option for its own type; text layers hand out what they compute."""
        import jax
        import jax.numpy as jnp

        gemma, vit, scan, own_config = self.gemma, self.vit, self.gemma.nn.scan, self.gemma.get_config

        def keeping_intermediates(target, *args, **kwargs):
            axes = dict(kwargs.pop("variable_axes"), intermediates=0)
            return scan(target, *args, variable_axes=axes, **kwargs)

        def typed_config(variant):
            config = own_config(variant)
            config.embed_dtype = dtype
            return config

        places = {(gemma, "nn"): Seen(gemma.nn, scan=keeping_intermediates), (gemma, "get_config"): typed_config}
        if dtype == "float64":
            places[gemma, "jnp"] = places[vit, "jnp"] = Seen(jnp, float32=jnp.float64)
        with contextlib.ExitStack() as stack:
            # Without x64 JAX makes float64 arrays float32; with it, a float32 run would not be one.
            x64 = jax.config.jax_enable_x64
            stack.callback(jax.config.update, "jax_enable_x64", x64)
            jax.config.update("jax_enable_x64", dtype == "float64")
            stack.enter_context(jax.default_matmul_precision("highest"))
            stack.enter_context(changed(places))
            yield self.paligemma.Model(img=dict(self.image, dtype_mm=dtype), llm=self.text)


def refuse_other_tree(model, params, inputs):
    """DumpError unless the file holds exactly the tensors that the model has, in its shapes."""
    import jax

    expected = jax.eval_shape(model.init, jax.random.PRNGKey(0), **inputs)["params"]
    shapes = {key: tuple(leaf.shape) for key, leaf in flat(expected).items()}
    missing, surplus = set(shapes) - set(params), set(params) - set(shapes)
    if missing or surplus:
        raise DumpError("the checkpoint %s" % " and ".join(
            "%s %s" % each for each in (("has no", listed(missing)), ("has unknown", listed(surplus))) if each[1]
        ))  # fmt: skip
    other = [key for key, shape in shapes.items() if params[key].shape != shape]
    if other:
        raise DumpError("of other shapes than the model's (is --variant right?): %s" % listed(other))


def forward(original, model, params, inputs, name="forward", float64=False):
    """Seams and logits of one forward pass: {tensor name: array}. Logits are those of the text positions, without the
    final softcap, as the original's training and evaluation take them."""
    import jax

    suffix = "@float64" if float64 else ""

    def layer_output(module, method):
        return isinstance(module, original.gemma.Block) and method == "__call__"

    @jax.jit
    def run(params, inputs):
        return model.apply({"params": params}, **inputs, capture_intermediates=layer_output, mutable=["intermediates"])

    (logits, out), kept = run(params, inputs)
    values = {"vision.embeddings": out["img/with_posemb"], "vision": out["img/encoded"], "projector": out["img/zimg"],
              "decoder": out["llm/pre_logits"], "logits": logits}  # fmt: skip
    for block, value in out["img/encoder"].items():
        if block.startswith("block"):
            values["vision.layers.%d" % int(block[len("block") :])] = value["+mlp"]
    for number, value in enumerate(layer_outputs(kept["intermediates"]["llm"]["layers"])):
        values["decoder.layers.%d" % number] = value
    return {"%s/out/%s%s" % (name, seam, suffix): array_of(value) for seam, value in values.items()}


def layer_outputs(kept):
    """Each text layer's output [batch, length, width], from layers that were scanned or run one by one."""
    if "__call__" in kept:
        return list(kept["__call__"][0][0])
    return [kept[str(number)]["__call__"][0][0] for number in range(len(kept))]


def train(model, params, inputs, mask_loss, mean, name, float64=False):
    """Loss and gradients: `mean` "tokens" is the mean over the batch's suffix tokens, as transformers has it,
    "examples" the mean of each example's mean, as big_vision's trainer has it."""
    import jax
    import jax.numpy as jnp

    suffix = "@float64" if float64 else ""
    text, mask_ar, mask = inputs["text"], inputs["mask_ar"], jnp.asarray(mask_loss)[:, 1:]

    def loss_of(weights):
        logits, _ = model.apply({"params": weights}, inputs["image"], text[:, :-1], mask_ar[:, :-1])
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), text[:, 1:, None], axis=-1)[..., 0]
        kept = mask.astype(log_probs.dtype)
        if mean == "tokens":
            return -(log_probs * kept).sum() / kept.sum()
        return -((log_probs * kept).sum(1) / kept.sum(1)).mean()

    loss, gradients = jax.jit(jax.value_and_grad(loss_of))(params)
    values = {"loss": array_of(loss)}
    for key, gradient in flat(gradients).items():
        gradient = array_of(gradient)
        values["grad_norm." + key] = norms(key, gradient)
        if key in GRADIENTS:
            values["grad." + key] = gradient
    return {"%s/out/%s%s" % (name, seam, suffix): value for seam, value in values.items()}


def norms(key, gradient):
    """The 2-norm of a gradient; of a tensor stacked over layers, one a layer."""
    stacked = key.startswith(("llm/layers/", "img/Transformer/encoderblock/")) and not key.split("/")[2].isdigit()
    squares = np.square(gradient.astype(np.float64))
    return np.sqrt(squares.reshape(len(squares), -1).sum(1) if stacked else squares.sum())


def generate(model, params, inputs, length, name):
    """Greedy ids [batch, 1, length], with a float32 cache; padding after the first end."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def prefill(params, inputs):
        (x, input_mask, mask_ar), _ = model.apply(
            {"params": params}, inputs["image"], inputs["text"], input_mask=inputs["mask_input"],
            mask_ar=inputs["mask_ar"], method=model.embed_image_and_text,
        )  # fmt: skip
        return model.apply(
            {"params": params}, x, input_mask, mask_ar, cache_size=x.shape[1] + length,
            method=model.prefill_cache, mutable=("cache",),
        )  # fmt: skip

    @jax.jit
    def extend(params, cache, tokens):
        variables = {"params": params, "cache": cache}
        x, _ = model.apply(variables, tokens, method=model.embed_text)
        return model.apply(variables, x, method=model.extend_cache, mutable=("cache",))

    logits, state = prefill(params, inputs)
    found = []
    for step in range(length):
        tokens = jnp.argmax(logits, axis=-1)
        found.append(np.array(tokens))
        if step + 1 < length:
            logits, state = extend(params, state["cache"], tokens)
    ids = np.concatenate(found, axis=1).astype(np.int64)
    ended = np.cumsum(ids == END, axis=1) - (ids == END) > 0
    return {name + "/out/sequences": np.where(ended, PAD, ids)[:, None]}


def given(name, inputs):
    """The inputs of a run, as a reference names them."""
    return {"%s/in/%s" % (name, argument): array_of(value) for argument, value in inputs.items()}


def pixels(paths, size):
    """Images [batch, size, size, 3] in -1..1: squashed with bilinear weights, rounded to 8 bits."""
    from PIL import Image

    rows = [Image.open(path).convert("RGB").resize((size, size), Image.BILINEAR) for path in paths]
    return np.stack([np.asarray(row, dtype=np.float32) / np.float32(127.5) - 1 for row in rows])


def text_batch(encode, prefixes, suffixes):
    """Inputs of the text: start, prefix and newline see each other (mask_ar 0), the suffix and its end are causal and
    in the loss; padding on the right is causal. int32 [batch, length]."""
    rows = []
    for prefix, suffix in zip(prefixes, suffixes):
        before = [START, *encode(prefix), *encode("\n")]
        after = [] if suffix is None else [*encode(suffix), END]
        rows.append((before + after, [0] * len(before) + [1] * len(after)))
    longest = max(len(ids) for ids, _ in rows)

    def padded(lists, filling):
        return np.array([list(row) + [filling] * (longest - len(row)) for row in lists], dtype=np.int32)

    text, causal = padded([ids for ids, _ in rows], PAD), padded([mask for _, mask in rows], 1)
    valid = padded([[1] * len(ids) for ids, _ in rows], 0)
    return {"text": text, "mask_ar": causal, "mask_loss": causal * valid, "mask_input": valid}


def dump(arguments):
    """Run the original and write the reference; returns what was written, in words."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import flax
    import jax
    import sentencepiece

    params = read_params(arguments.checkpoint)
    image, text, size = architecture(params, arguments.variant, arguments.softcap)
    original = Original(arguments.repo, image, text, arguments.stand_in)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=arguments.tokenizer)
    picture = pixels(arguments.image, size)
    whole = text_batch(tokenizer.encode, arguments.prefix, arguments.suffix)
    prompt = text_batch(tokenizer.encode, arguments.prefix, [None] * len(arguments.prefix))
    stated = {"image": picture, "text": whole["text"][:, :-1], "mask_ar": whole["mask_ar"][:, :-1]}
    trained = {"image": picture, "text": whole["text"], "mask_ar": whole["mask_ar"]}
    asked = {"image": picture, **{name: prompt[name] for name in ("text", "mask_ar", "mask_input")}}
    runs = {"forward": {"kind": "forward"}}
    runs.update({name: {"kind": "train", "options": {"mean": mean}} for name, mean in TRAINING})
    runs["greedy"] = {"kind": "generate", "options": {"max_decode_len": arguments.max_decode_len, "eos_token": END}}
    tensors = dict(given("forward", stated), **given("greedy", asked))
    for name, _ in TRAINING:
        tensors.update(given(name, dict(trained, mask_loss=whole["mask_loss"])))
    kinds, left_out = float64_runs(sum(array.nbytes for array in params.values()), arguments.float64)
    for dtype in ("float32", "float64") if kinds else ("float32",):
        wide = dtype == "float64"
        with original.computing(dtype) as model:
            weights = nested({key: jax.numpy.asarray(array, dtype) for key, array in params.items()})
            typed = {name: value.astype(dtype) if value.dtype.kind == "f" else value for name, value in stated.items()}
            refuse_other_tree(model, params, typed)
            tensors.update(forward(original, model, weights, typed, float64=wide))
            for name, mean in TRAINING if not wide or "train" in kinds else ():
                inputs = dict(trained, image=typed["image"])
                tensors.update(train(model, weights, inputs, whole["mask_loss"], mean, name, float64=wide))
            if not wide:
                tensors.update(generate(model, weights, asked, arguments.max_decode_len, "greedy"))
            del weights
    about = {
        "project": "google-research/big_vision",
        "commit": commit_of(arguments.repo),
        "variant": text["variant"],
        "jax": jax.__version__,
        "flax": flax.__version__,
        "python": sys.version.split()[0],
        "checkpoint": os.path.basename(arguments.checkpoint),
        "float64": left_out or ", ".join(kinds),
    }
    write(arguments.out, "paligemma2", about, runs, tensors, arguments.may_be_zero)
    return "%s: %d runs, %d tensors; float64: %s" % (arguments.out, len(runs), len(tensors), about["float64"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="an npz")
    parser.add_argument("out")
    parser.add_argument("--repo", required=True, help="a checkout of https://github.com/google-research/big_vision")
    parser.add_argument("--tokenizer", required=True, help="paligemma_tokenizer.model")
    parser.add_argument("--variant", help="the text model, as gemma.get_config names it; found by size if not given")
    parser.add_argument("--softcap", type=float, default=0.0, help="of decoding steps; the logits here have none")
    parser.add_argument("--image", action="append", required=True, help="repeatable; one a prefix")
    parser.add_argument("--prefix", action="append", required=True, help="repeatable")
    parser.add_argument("--suffix", action="append", required=True, help="repeatable; one a prefix")
    parser.add_argument("--max-decode-len", type=int, default=30)
    parser.add_argument("--stand-in", action="append", default=[], metavar="PACKAGE",
                        help="a further package that is only imported; repeatable")  # fmt: skip
    shared_options(parser)
    arguments = parser.parse_args()
    for name in ("image", "suffix"):
        found = len(getattr(arguments, name))
        if found != len(arguments.prefix):
            parser.error("%d --%s for %d --prefix: give one each" % (found, name, len(arguments.prefix)))
    try:
        print(dump(arguments))
    except DumpError as error:
        sys.exit("dump_paligemma2.py: %s" % error)


if __name__ == "__main__":
    main()
