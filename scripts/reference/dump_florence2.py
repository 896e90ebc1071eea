"""Dump what Florence-2's remote code computes, as a reference file for port-parity.

Environment: Python 3.10 or 3.11 with the transformers of the remote code's day, see requirements-florence2.txt:

    python3.11 -m venv florence2 && . florence2/bin/activate && pip install -r requirements-florence2.txt

    python dump_florence2.py Florence-2-base-ft/ reference.safetensors --repo Florence-2-base-ft/ \\
        --image car.jpg --prompt "<CAPTION>" --target "A green car." --float64

`--repo` is the folder with the original's code (modeling_florence2.py, processing_florence2.py); the code is executed:
dump only what you trust. weightport is not needed here; of its format this file knows all there is (version 1): one
safetensors file, tensors named <run>/in/<argument> and <run>/out/<seam>[@float64], and one metadata entry.
"""

# ruff: noqa: UP031 - written as the Pythons of these environments have it
import argparse
import json
import os
import sys

import numpy as np

FORMAT = 1
START, PAD = 2, 1
LAYER_PARTS = ("self_attn", "encoder_attn", "fc1", "fc2")
GRADIENTS = ("image_projection", "language_model.model.decoder.layers.0.self_attn.q_proj.weight")


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
                first = output[0] if not hasattr(output, "detach") else output
                self.values[seam] = first.detach().cpu().numpy()

        self.hooks.append(module.register_forward_hook(keep))

    def hook_input(self, module, seam):
        def keep(module, args):
            if args and seam not in self.values:
                self.values[seam] = args[0].detach().cpu().numpy()

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
        with torch.no_grad():
            logits = model(**inputs).logits
    finally:
        recorder.close()
    seams = dict(recorder.values, logits=logits.detach().cpu().numpy())
    return {"%s/out/%s%s" % (name, seam, suffix): value for seam, value in seams.items()}


def train(model, inputs, name="train", float64=False):
    """Loss and gradients of one step in evaluation mode; `inputs` has `labels`, whose padding counts, as it does in
    the original."""
    suffix = "@float64" if float64 else ""
    model.eval()
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    values = {"loss": loss.detach().cpu().numpy()}
    for parameter, tensor in model.named_parameters():
        if tensor.grad is not None:
            values["grad_norm." + parameter] = tensor.grad.double().norm().cpu().numpy()
            if parameter in GRADIENTS:
                values["grad." + parameter] = tensor.grad.detach().cpu().numpy()
    model.zero_grad()
    return {"%s/out/%s%s" % (name, seam, suffix): value for seam, value in values.items()}


def generate(model, inputs, name, **settings):
    """The best hypothesis of each sample: ids [batch, 1, length], without the decoder's start."""
    import torch

    with torch.no_grad():
        ids = model.generate(**dict(inputs, do_sample=False, **settings))
    return {name + "/out/sequences": ids[:, None, 1:].cpu().numpy()}


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


def main():
    import torch
    import transformers
    from PIL import Image
    from transformers import AutoModelForCausalLM, AutoProcessor

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a folder with the weights, config.json and tokenizer")
    parser.add_argument("out")
    parser.add_argument("--repo", help="the folder with the original's code; the checkpoint's own if not given")
    parser.add_argument("--image", action="append", required=True, help="repeatable; one a prompt")
    parser.add_argument("--prompt", action="append", required=True, help="repeatable")
    parser.add_argument("--target", action="append", default=[], help="repeatable; one a prompt")
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=30)
    parser.add_argument("--float64", action="store_true", help="a float64 run too (twice the memory)")
    arguments = parser.parse_args()
    for name in ("image", "target"):
        count = len(getattr(arguments, name))
        if count != len(arguments.prompt) and (count or name == "image"):
            parser.error("%d --%s for %d --prompt: give one each" % (count, name, len(arguments.prompt)))

    # Code and weights may stand apart: a class of the first folder reads the second.
    code = arguments.repo or arguments.checkpoint
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    kind = get_class_from_dynamic_module("modeling_florence2.Florence2ForConditionalGeneration", code)
    config = get_class_from_dynamic_module("configuration_florence2.Florence2Config", code)
    AutoModelForCausalLM.register(config, kind, exist_ok=True)
    model = kind.from_pretrained(
        arguments.checkpoint,
        config=config.from_pretrained(arguments.checkpoint),
        torch_dtype=torch.float32,
        attn_implementation="eager",
    ).eval()
    processor = AutoProcessor.from_pretrained(code, trust_remote_code=True)
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
    if arguments.float64:
        model.double()
        wide = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
        tensors.update(forward(model, wide, float64=True))
        wide.pop("decoder_input_ids")
        tensors.update(train(model, dict(wide, labels=labels), float64=True))
    about = {
        "project": "Florence-2 remote code",
        "code": os.path.basename(os.path.abspath(code)),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "checkpoint": os.path.basename(os.path.abspath(arguments.checkpoint)),
    }
    write(arguments.out, "florence2", about, runs, tensors)
    print("%s: %d runs, %d tensors" % (arguments.out, len(runs), len(tensors)))


if __name__ == "__main__":
    main()
