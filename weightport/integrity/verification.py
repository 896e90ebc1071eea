"""verify(): everything that can be told of a model directory without running the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from weightport.checkpoints import Checkpoint, open_checkpoint
from weightport.errors import CheckpointError, WeightportError
from weightport.integrity.companions import check_companions
from weightport.integrity.file_hashes import Advance, check_hashes, present, without_record
from weightport.integrity.findings import Finding, Verification, unchecked, warning, wrong
from weightport.integrity.known_faults import known_faults
from weightport.integrity.notices import CONFIG, read_object
from weightport.integrity.recorded_hashes import recorded_hashes
from weightport.integrity.structure import VerifiedFamily, check_names, load_on_meta
from weightport.model_directory import check_model_directory
from weightport.writing.ownership import RECORD


def verify(
    directory: str | Path,
    family_of: Callable[[object], VerifiedFamily | None],
    *,
    original: VerifiedFamily | None = None,
    start: Callable[[int], None] = lambda total: None,
    advance: Advance = lambda amount: None,
) -> Verification:
    """Look at a model directory: recorded hashes, tensors, names, tokenizer, processor, versions. Nothing is written,
    and no code of the directory is run.

    `family_of` gives the family of a model_type, None for a model of another; `original` is the family whose original
    checkpoint the directory holds, not converted yet. `start` is told the bytes to read,
    `advance` those just read, from several threads in turn. Raises CheckpointError for what is no model directory.
    """
    directory = Path(directory)
    check_model_directory(directory)
    recorded, findings = recorded_hashes(directory)
    files = present(directory, recorded)
    nbytes = sum((directory / name).stat().st_size for name in files)
    start(nbytes)
    begun = time.monotonic()
    findings += check_hashes(directory, recorded, {}, advance)
    seconds = time.monotonic() - begun
    findings += without_record(directory, recorded, RECORD)
    architecture, parameters, tensors, checked, more = _parts(directory, family_of, original)
    sources = tuple(dict.fromkeys(each.source for each in recorded))
    return Verification(
        directory, architecture, parameters, tensors, tuple(files), nbytes, seconds, sources, tuple(checked),
        (*findings, *more),
    )  # fmt: skip


def _parts(
    directory: Path, family_of: Callable[[object], VerifiedFamily | None], original: VerifiedFamily | None
) -> tuple[str | None, int, int, list[str], list[Finding]]:
    """(architecture, parameters, tensors, what was compared, findings)."""
    config = read_object(directory / CONFIG)
    if config is None or not isinstance(config.get("model_type"), str):
        text = "is no JSON object" if config is None else "names no model_type"
        return None, 0, 0, [], [wrong(CONFIG, text)]
    findings = known_faults(config, read_object(directory / "training.json"))
    architecture = str((config.get("architectures") or [None])[0])
    try:
        checkpoint = open_checkpoint(directory)
    except CheckpointError as error:
        return architecture, 0, 0, [], [*findings, wrong("weights", str(error).replace(f"{directory}/", ""))]
    findings += _format(checkpoint)
    parameters = sum(ref.numel for ref in checkpoint.values() if ref.dtype.is_floating_point)
    if original is not None:
        text = f"an original checkpoint of {original.name}, in the names of its own code: convert it first"
        return architecture, parameters, len(checkpoint), [], [*findings, unchecked("model", text)]
    loaded, met = load_on_meta(directory, config, checkpoint)
    findings += met
    checked: list[str] = []
    if loaded is not None:
        if not met:
            checked.append(f"tensors: {len(checkpoint):,} give {loaded.names.architecture} all that it loads")
        family = family_of(config["model_type"])
        if family is not None:
            try:
                findings += check_names(family, loaded, checkpoint)
            except (WeightportError, ValueError) as error:
                findings.append(wrong(CONFIG, str(error)))
        fitting, unfit = check_companions(directory, loaded, family)
        checked += fitting
        findings += unfit
    return architecture, parameters, len(checkpoint), checked, findings


def _format(checkpoint: Checkpoint) -> list[Finding]:
    if checkpoint.format.startswith("safetensors"):
        return []
    text = f"are {checkpoint.format}, which programs read by running what is in them; safetensors hold numbers only"
    return [warning("weights", text)]
