"""Dump what an original OFA or OFA-CN model computes, as a reference file for port-parity.

Environment: Python 3.7 or 3.8 with OFA's own torch, see requirements-ofa.txt beside this file:

    conda create -n ofa python=3.7 && conda activate ofa
    git clone https://github.com/OFA-Sys/OFA && pip install -e OFA/fairseq
    pip install -r requirements-ofa.txt

    python dump_ofa.py ofa_cn_base.pt reference.safetensors --repo OFA --bpe-dir OFA/utils/BERT_CN_dict \\
        --image dog.jpg --prompt "图片描述了什么内容?" --target "一只狗" --float64

The checkpoint is loaded by the original's own code, which executes it: dump only files that you trust. weightport is
not needed here; of its format this file knows all there is (version 1): one safetensors file, tensors named
<run>/in/<argument> and <run>/out/<seam>[@float64], and one metadata entry.
"""

# ruff: noqa: UP031 - written as the Pythons of these environments have it
import argparse
import json
import os
import sys

import numpy as np

FORMAT = 1
START, PAD, END = 0, 1, 2
LAYER_PARTS = ("self_attn", "attn_ln", "self_attn_ln", "encoder_attn", "cross_attn_ln", "fc1", "ffn_layernorm", "fc2")
GRADIENTS = ("encoder.image_proj.weight", "encoder.layers.0.self_attn.q_proj.weight", "decoder.layer_norm.weight")


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
                self.values[seam] = pick(output).detach().cpu().numpy()

        self.hooks.append(module.register_forward_hook(keep))

    def hook_input(self, module, seam):
        def keep(module, args):
            if args and seam not in self.values:
                self.values[seam] = batch_first(args[0]).detach().cpu().numpy()

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
        with torch.no_grad():
            logits = model(**inputs)[0]
    finally:
        recorder.close()
    seams = dict(recorder.values, logits=logits.detach().cpu().numpy())
    return {"%s/out/%s%s" % (name, seam, suffix): value for seam, value in seams.items()}


def train(model, inputs, target, smoothing, name="train", float64=False):
    """Loss and gradients of one step in evaluation mode: the mean, over targets, of the label-smoothed loss."""
    import torch

    suffix = "@float64" if float64 else ""
    model.eval()
    model.zero_grad()
    logits = model(**inputs)[0]
    dtype = torch.float64 if float64 else torch.float32
    log_probs = torch.log_softmax(logits, dim=-1, dtype=dtype).view(-1, logits.size(-1))
    kept = target.reshape(-1) != PAD
    log_probs, labels = log_probs[kept], target.reshape(-1)[kept]
    nll = -log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    spread = smoothing / (logits.size(-1) - 1)
    loss = ((1.0 - smoothing - spread) * nll - spread * log_probs.sum(-1)).mean()
    loss.backward()
    values = {"loss": loss.detach().cpu().numpy(), "nll": nll.mean().detach().cpu().numpy()}
    for parameter, tensor in model.named_parameters():
        if tensor.grad is not None:
            values["grad_norm." + parameter] = tensor.grad.double().norm().cpu().numpy()
            if parameter in GRADIENTS:
                values["grad." + parameter] = tensor.grad.detach().cpu().numpy()
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
    return {"%s/in/%s" % (name, argument): tensor.detach().cpu().numpy() for argument, tensor in inputs.items()}


def write(path, family, source, runs, tensors):
    """Write the file whole or not at all."""
    from safetensors.numpy import save_file

    document = {"format": FORMAT, "family": family, "source": source, "runs": runs}
    arrays = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in tensors.items()}
    partial = path + ".partial"
    save_file(arrays, partial, metadata={"weightport.reference": json.dumps(document, ensure_ascii=False)})
    os.replace(partial, path)


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
    value = config.get(name) if hasattr(config, "get") else getattr(config, name, None)
    return default if value is None else value


def load(arguments):
    """(model, task) by the original's own code."""
    sys.path.insert(0, arguments.repo)
    from fairseq import checkpoint_utils, utils

    utils.import_user_module(argparse.Namespace(user_dir=os.path.join(arguments.repo, "ofa_module")))
    overrides = {"bpe_dir": arguments.bpe_dir} if arguments.bpe_dir else {}
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([arguments.checkpoint], arg_overrides=overrides)
    return models[0].float().eval(), task


def encode(task, text):
    """Ids of a text as the task encodes it, without start and end."""
    return task.tgt_dict.encode_line(line=task.bpe.encode(text), add_if_not_exist=False, append_eos=False).tolist()


def commit_of(repository):
    """The repository's commit, "" where git cannot say."""
    import subprocess

    try:
        return subprocess.check_output(["git", "-C", repository, "rev-parse", "HEAD"]).decode().strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main():
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("out")
    parser.add_argument("--repo", required=True, help="a checkout of https://github.com/OFA-Sys/OFA")
    parser.add_argument("--bpe-dir", help="the folder of vocabularies, where the checkpoint's own does not exist here")
    parser.add_argument("--image", action="append", default=[], help="repeatable; one a prompt")
    parser.add_argument("--prompt", action="append", required=True, help="repeatable")
    parser.add_argument("--target", action="append", default=[], help="repeatable; one a prompt")
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--max-len-b", type=int, default=30)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--float64", action="store_true", help="a float64 run too (twice the memory)")
    arguments = parser.parse_args()
    for name in ("image", "target"):
        count = len(getattr(arguments, name))
        if count not in (0, len(arguments.prompt)):
            parser.error("%d --%s for %d --prompt: give one each, or none" % (count, name, len(arguments.prompt)))

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
    for name, beam in (("greedy", 1), ("beam", arguments.beam)):
        from models.sequence_generator import SequenceGenerator

        generator = SequenceGenerator([model], task.tgt_dict, beam_size=beam, max_len_b=arguments.max_len_b)
        tensors.update(generate(generator, model, source, name))
        tensors.update(given(name, {key: value for key, value in source.items() if key != "src_lengths"}))
        runs[name] = {"kind": "generate", "options": {"beam": beam, "max_len_b": arguments.max_len_b}}
    if arguments.float64:
        model.double()
        wide = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
        tensors.update(forward(model, wide, float64=True))
        tensors.update(train(model, wide, target, arguments.label_smoothing, float64=True))
    about = {
        "project": "OFA-Sys/OFA",
        "commit": commit_of(arguments.repo),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "checkpoint": os.path.basename(arguments.checkpoint),
    }
    write(arguments.out, "ofa", about, runs, tensors)
    print("%s: %d runs, %d tensors" % (arguments.out, len(runs), len(tensors)))


if __name__ == "__main__":
    main()
