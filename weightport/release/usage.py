"""The card's example: from nothing but the repository's name to an answer."""

from __future__ import annotations

from weightport.release.checking import CheckedDirectory

_PROCESSORS = frozenset({"processor_config.json", "preprocessor_config.json"})

# What to ask of a model whose family does not say, as Python.
_WORDS = '"What is this?"'

RETRIEVAL = "AutoModelForZeroShotImageClassification"
"""Of models that say how well a picture and a text fit."""

_CODE_NOTE = (
    "\n\nTransformers has no class for this model: the modeling code is in the repository and is run with "
    "`trust_remote_code=True`. Read it first, or install weightport and leave the argument out."
)


def usage(found: CheckedDirectory, repo: str) -> str:
    """The section "Use": code that generates, where the architecture can."""
    remote = ", trust_remote_code=True" if found.needs_code else ""
    automodel = auto_class(found)
    reader = "AutoProcessor" if _PROCESSORS & set(found.published) else "AutoTokenizer"
    pictures = automodel in ("AutoModelForImageTextToText", RETRIEVAL)
    lines = [
        *(["from PIL import Image"] if pictures else []),
        f"from transformers import {automodel}, {reader}",
        "",
        f'model = {automodel}.from_pretrained("{repo}"{remote})',
        f'processor = {reader}.from_pretrained("{repo}"{remote})',
        "",
    ]
    prompt = (found.family.card_prompt if found.family else None) or _WORDS
    if automodel == RETRIEVAL:
        lines += [
            'image = Image.open("image.jpg").convert("RGB")',
            'texts = ["a photo of a cat", "a photo of a dog"]',
            'inputs = processor(images=image, text=texts, padding=True, return_tensors="pt").to(model.dtype)',
        ]
    elif pictures:
        lines += [
            'image = Image.open("image.jpg").convert("RGB")',
            f'inputs = processor(images=image, text={prompt}, return_tensors="pt").to(model.dtype)',
        ]
    else:
        lines += [f'inputs = processor({_WORDS}, return_tensors="pt")']
    if automodel == RETRIEVAL:
        lines += ["print(dict(zip(texts, model(**inputs).logits_per_image[0].tolist())))  # similarity of each text"]
    elif automodel == "AutoModel":
        lines += ["outputs = model(**inputs)", "print({name: value.shape for name, value in outputs.items()})"]
    else:
        asked = [] if has_encoder(found) else ['ids = ids[:, inputs["input_ids"].shape[1] :]  # without the prompt']
        lines += [
            "ids = model.generate(**inputs, max_new_tokens=50)",
            *asked,
            "print(processor.batch_decode(ids, skip_special_tokens=True)[0])",
        ]
    note = _CODE_NOTE if found.needs_code else ""
    return "## Use\n\n```python\n" + "\n".join(lines) + f"\n```{note}"


def hub_task(found: CheckedDirectory) -> str | None:
    """What the Hub calls the model's task; None where the model is of no family."""
    if auto_class(found) == RETRIEVAL:
        return "zero-shot-image-classification"
    return found.family.hub_task if found.family else None


def has_encoder(found: CheckedDirectory) -> bool:
    """Whether an encoder reads the prompt: a decoder alone generates it again before the answer."""
    from transformers import CONFIG_MAPPING

    from weightport import modeling  # noqa: F401 - registers the families that transformers lacks

    model_type = str(found.config.get("model_type"))
    default = (
        getattr(CONFIG_MAPPING[model_type], "is_encoder_decoder", False) if model_type in CONFIG_MAPPING else False
    )
    return bool(found.config.get("is_encoder_decoder", default))


def auto_class(found: CheckedDirectory) -> str:
    """The Auto class that loads the directory's architecture with what it generates by."""
    name = str((found.config.get("architectures") or [""])[0])
    if name.endswith("ForImageTextRetrieval"):
        return RETRIEVAL
    if "vision_config" in found.config or found.needs_code or _PROCESSORS & set(found.published):
        generates = name.endswith(("ForConditionalGeneration", "ForImageTextToText")) or found.needs_code
        return "AutoModelForImageTextToText" if generates else "AutoModel"
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "AutoModelForCausalLM"
    return "AutoModelForSeq2SeqLM" if name.endswith("ForConditionalGeneration") else "AutoModel"
