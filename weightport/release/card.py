"""The model card, from what the directory knows: where the model comes from, what was done to it, and how it was
proven."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightport.release.checking import CheckedDirectory
from weightport.release.usage import hub_task, usage

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class CardOptions:
    """What only the user can say. `base_model` is a Hub id, by default what the records know; `language` codes as the
    Hub has them."""

    repo: str
    licence: str
    base_model: str | None = None
    language: Sequence[str] = ()


def model_card(found: CheckedDirectory, options: CardOptions) -> str:
    """README.md: the Hub's metadata as YAML, then what the records say. No sentence claims what no record holds."""
    sections = [
        _metadata(found, options),
        f"# {options.repo.rpartition('/')[2]}\n\n{_summary(found)}",
        usage(found, options.repo),
        _provenance(found),
        _training(found),
        _merge(found),
        _parity(found),
        _metrics(found),
        _files(found),
        _limits(found),
        _licence(found, options),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _metadata(found: CheckedDirectory, options: CardOptions) -> str:
    model_type = str(found.config.get("model_type"))
    merged = "merge.json" in found.records
    base = options.base_model or base_model(found)
    fields: dict[str, Any] = {
        "license": options.licence,
        "library_name": "transformers",
        "pipeline_tag": hub_task(found),
        "base_model": base,
        "base_model_relation": ("merge" if merged else "finetune") if base else None,
        "language": list(options.language) or None,
        "tags": [model_type, "weightport", *(["custom_code"] if found.needs_code else [])],
        "model-index": _model_index(found, options.repo),
    }
    # JSON strings and lists are YAML too, and need no other quoting rules.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items() if value is not None]
    return "---\n" + "\n".join(lines) + "\n---"


def _model_index(found: CheckedDirectory, repo: str) -> list[dict[str, Any]] | None:
    """The metrics as the Hub lists them, where the records say on which data they were measured."""
    data = _evaluated(found)
    metrics = _numbers(found.records.get("metrics.json"))
    if not data or not metrics:
        return None
    result = {
        "task": {"type": hub_task(found) or "image-text-to-text"},
        "dataset": {"name": data["name"], "type": data["name"]},
        "metrics": [{"type": name, "value": value} for name, value in metrics.items() if name != "eval_loss"],
    }
    return [{"name": repo.rpartition("/")[2], "results": [result]}] if result["metrics"] else None


def _evaluated(found: CheckedDirectory) -> Mapping[str, Any]:
    """Name and number of the samples that metrics.json was measured on; empty when no record says so."""
    training = found.records.get("training.json")
    data = training.get("eval_data") if isinstance(training, Mapping) else None
    return data if isinstance(data, Mapping) and "name" in data else {}


def _summary(found: CheckedDirectory) -> str:
    conversion = found.records.get("conversion.json", {})
    title = conversion.get("title") or (found.config.get("architectures") or ["A model"])[0]
    dtype = str(found.dtype).removeprefix("torch.")
    return f"{title}, {found.parameters / 1e6:,.1f} M parameters, {dtype}, for transformers 5."


def base_model(found: CheckedDirectory) -> str | None:
    """The Hub's name of the base that the merged adapters were trained on; None where the record names none, or
    several, or a folder."""
    record = found.records.get("merge.json")
    adapters = record.get("adapters") if isinstance(record, Mapping) else None
    names = {each.get("base_model") for each in adapters or () if isinstance(each, Mapping)}
    name = names.pop() if len(names) == 1 else None
    return name if isinstance(name, str) and _HUB_NAME.fullmatch(name) else None


def _provenance(found: CheckedDirectory) -> str:
    record = found.records.get("conversion.json")
    if not record:
        return ""
    sources = record.get("sources", {}).values()
    rows = [
        (str(file.get("name")), f"{file.get('size', 0):,}", f"`{file.get('sha256')}`")
        for source in sources
        for file in source.get("files", ())
    ]
    formats = ", ".join(dict.fromkeys(str(source.get("format")) for source in sources))
    notes = "".join(f"\n- {note}" for note in record.get("notes", ()))
    return (
        f"## Where it comes from\n\nConverted by weightport {record.get('versions', {}).get('weightport', '')} from "
        f"the original checkpoint ({formats}):\n\n{_table(('file', 'bytes', 'SHA-256'), rows)}"
        + (f"\n{notes}" if notes else "")
        + "\n\n`conversion.json` names every tensor's source."
    )


def _training(found: CheckedDirectory) -> str:
    """The record that `port-finetune` left."""
    record = found.records.get("training.json")
    if not isinstance(record, Mapping) or not isinstance(record.get("recipe"), Mapping):
        return ""
    recipe, data = record["recipe"], record.get("data") or {}
    model, training = recipe.get("model") or {}, recipe.get("training") or {}
    shares = record.get("trainable") or {}
    trained, total = (sum(share[i] for share in shares.values()) for i in (0, 1))
    rows = [
        ("recipe", f"{recipe.get('name')}: {recipe.get('title')}"),
        ("after", str(recipe.get("source") or "")),
        ("as published", "yes, mistakes included" if record.get("as_published") else ""),
        ("method", str(model.get("method") or "")),
        ("standing still", ", ".join(model.get("freeze") or ())),
        ("trained", f"{trained:,} of {total:,} parameters" if total else ""),
        ("data", f"{data.get('name')}, {data.get('samples'):,} samples" if data else ""),
        (
            "steps",
            f"{record.get('steps'):,} of {record.get('samples_per_step')} samples, {record.get('epochs'):g} epochs",
        ),
        ("learning rate", f"{training['learning_rate']:g}" if "learning_rate" in training else ""),
        ("final loss", "" if record.get("final_loss") is None else f"{record['final_loss']:.4g}"),
    ]
    return (
        f"## How it was fine-tuned\n\nBy weightport {record.get('versions', {}).get('weightport', '')}; "
        "`training.json` has every setting.\n\n" + _table(("setting", "value"), [row for row in rows if row[1]])
    )


def _merge(found: CheckedDirectory) -> str:
    record = found.records.get("merge.json")
    if not record:
        return ""
    rows = [
        (str(a.get("name")), *(_stated(a.get(key)) for key in ("weight", "rank", "alpha", "modules")))
        for a in record.get("adapters", ())
    ]
    text = (
        f"## What was merged\n\n{len(record.get('changed', {}))} tensors changed, {record.get('unchanged')} are the "
        f"base's bytes.\n\n{_table(('adapter', 'weight', 'rank', 'alpha', 'modules'), rows)}"
    )
    checked = record.get("verification")
    if checked:
        seams = {seam["seam"]: seam for seam in checked["seams"]}
        shown = [seams[name] for name in ("logits", *(n for n in seams if n != "logits")) if name in seams][:6]
        text += "\n\nBase with adapter in peft against the merged weights, in float32:\n\n" + _table(
            ("output", "largest difference", "scale"),
            [(seam["seam"], f"{seam['difference']:.1e}", f"{seam['scale']:.1e}") for seam in shown],
        )
    return text


def _stated(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else "–"


CARD_SEAMS = ("vision", "projector", "encoder", "logits", "loss", "sequences", "scores")
"""Seams of a parity report that a card shows; the report itself has all."""


def _parity(found: CheckedDirectory) -> str:
    """The report that `port-parity --json` wrote beside the model: its verdict, and the worst of every main seam."""
    record = found.records.get("parity.json")
    if not isinstance(record, Mapping) or not isinstance(record.get("comparisons"), list):
        return ""
    worst: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for each in record["comparisons"]:
        key = (each["seam"], each["dtype"], each["against"])
        if each["seam"] in CARD_SEAMS and (each["relative"] or 0.0) >= (worst.get(key, {}).get("relative") or 0.0):
            worst[key] = each
    rows = [
        (
            each["seam"],
            f"{each['dtype']} / {each['against']}",
            "" if each["largest"] is None else f"{each['largest']:.1e}",
            "" if each["allowed"] is None else f"{each['allowed']:.1e}",
            each["verdict"],
        )
        for _, each in sorted(worst.items(), key=lambda item: (CARD_SEAMS.index(item[0][0]), item[0][1:]))
    ]
    source = record.get("source") or {}
    against = ", ".join(str(source[key]) for key in ("project", "commit") if key in source)
    return (
        f"## Parity with the original implementation\n\n{record.get('verdict', '')}"
        + (f" ({against})" if against else "")
        + ".\n\n"
        + _table(("seam", "native / original", "largest difference", "allowed", "verdict"), rows)
    )


def _metrics(found: CheckedDirectory) -> str:
    rows = [(name, _shown(value)) for name, value in _numbers(found.records.get("metrics.json")).items()]
    data = _evaluated(found)
    training = found.records.get("training.json")
    step = training.get("result_step") if isinstance(training, Mapping) else None
    at = f", by the model of step {step:,}, which is this one" if isinstance(step, int) else ""
    where = f"On {data['name']}, {data.get('samples'):,} samples{at}:\n\n" if data else ""
    return "## Metrics\n\n" + where + _table(("metric", "value"), rows) if rows else ""


def _numbers(record: Any) -> dict[str, float]:
    if not isinstance(record, Mapping):
        return {}
    return {str(name): value for name, value in record.items() if type(value) in (int, float)}


def _files(found: CheckedDirectory) -> str:
    return "## Weights\n\n" + _table(
        ("file", "SHA-256"), [(name, f"`{value}`") for name, value in found.hashes.items()]
    )


def _limits(found: CheckedDirectory) -> str:
    unknown = [
        what
        for name, what in (("parity.json", "parity with the original"), ("metrics.json", "quality on a task"))
        if name not in found.records
    ]
    measured = f" Not measured here: {' and '.join(unknown)}." if unknown else ""
    return (
        "## Limits\n\nThe model has the limits and biases of the model it was made from; see that model's card."
        f"{measured}"
    )


def _licence(found: CheckedDirectory, options: CardOptions) -> str:
    """What the family's own licence asks to be said of every model made from it."""
    family = found.family
    if family is None or not family.licence_note or family.licence not in (None, options.licence):
        return ""
    return f"## Licence\n\n{family.licence_note}"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows])
