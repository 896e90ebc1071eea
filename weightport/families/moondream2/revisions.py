"""The dated revisions of moondream2: what each computes, and which of them a checkpoint is of.

Sources: vikhyat/moondream at the commits that name each tag. Importing this imports no torch: command lines are made
of the names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from weightport.errors import ConfigurationError

Merge = Literal["none", "grid", "tiles"]
Keys = Literal["2024", "2025"]

UNDECIDED = "undecided"
"""In the place of a revision: whichever fits, for looking at a checkpoint only."""


@dataclass(frozen=True)
class Revision:
    """One revision.

    `keys`: whose names its tensors have. `merge`: see MoondreamConfig.feature_merge. `exact_gelu`: of the vision tower
    and the projector, whose norms then have an epsilon of 1e-6. `image_texts`, `answer_space`, `end_text`,
    `question_space`: see MoondreamProcessor. `region`: the kind of tensors that its region head has, whose sizes are
    on the `size_scale`. `new_tokens`: of an answer at most. `caption_settings`: what captions are generated with,
    where that is not what answers are. `normalize_dtype`: type that pixels are normalised in. `own_tokenizer`: it is
    not GPT-2's, and not what stands beside the weights.
    """

    name: str
    keys: Keys = "2024"
    merge: Merge = "none"
    exact_gelu: bool = False
    image_texts: bool = False
    answer_space: bool = False
    end_text: str | None = None
    question_space: bool = False
    region: Literal["points", "coordinates", "bins"] | None = None
    size_scale: Literal["log", "linear"] = "log"
    new_tokens: int = 512
    caption_settings: tuple[tuple[str, float], ...] = ()
    normalize_dtype: str = "float32"
    own_tokenizer: bool = False

    @property
    def vision_epsilon(self) -> float:
        return 1e-6 if self.exact_gelu else 1e-5


def _early(name: str, **settings: Any) -> Revision:
    return Revision(name, exact_gelu=True, end_text="<END>", **settings)


def _tiled(name: str, **settings: Any) -> Revision:
    defaults: dict[str, Any] = {
        "keys": "2025", "merge": "tiles", "region": "bins", "new_tokens": 768, "normalize_dtype": "float16",
        "question_space": True,
    }  # fmt: skip
    return Revision(name, **(defaults | settings))


REVISIONS = (
    _early("2024-03-04", image_texts=True, answer_space=True),
    _early("2024-03-05", image_texts=True),
    _early("2024-03-06", image_texts=True),
    _early("2024-03-13"),
    Revision("2024-04-02"),
    Revision("2024-05-08"),
    Revision("2024-05-20", merge="grid", new_tokens=256),
    Revision("2024-07-23", merge="grid", new_tokens=256),
    Revision(
        "2024-08-26",
        merge="grid",
        new_tokens=256,
        region="points",
        caption_settings=(("repetition_penalty", 1.2), ("max_new_tokens", 512)),
    ),
    _tiled("2024-late", keys="2024", region="coordinates", size_scale="linear"),
    _tiled("2025-01-09", size_scale="linear"),
    _tiled("2025-03-27"),
    _tiled("2025-04-14"),
    _tiled("2025-06-21", normalize_dtype="bfloat16", question_space=False, own_tokenizer=True),
)
NAMES = tuple(revision.name for revision in REVISIONS)
NEW_TOKENIZER = "moondream/starmie-v1"
OLD_TOKENIZER = "vikhyatk/moondream2"


@dataclass(frozen=True)
class Evidence:
    """What a checkpoint shows. `keys`, `merge` and `region` come from tensors; `config` is config.json's content;
    `code` are the texts of the Python files beside the weights, by name; `new_tokens`: whether the tokenizer beside
    them, if any, has the tokens of 2025-06-21."""

    keys: Keys
    merge: Merge
    region: str | None
    config: Mapping[str, Any] = field(default_factory=dict)
    code: Mapping[str, str] = field(default_factory=dict)
    has_new_tokens: bool = False


@dataclass(frozen=True)
class Decision:
    """A revision, and why."""

    revision: Revision
    because: str


def revision_named(name: str) -> Revision:
    """The revision called `name`, which is one of NAMES."""
    return next(revision for revision in REVISIONS if revision.name == name)


def decide(evidence: Evidence, asked: str | None) -> Decision:
    """The revision of a checkpoint. Raises ConfigurationError where `asked` contradicts its tensors, and where nothing
    tells between revisions that compute different things."""
    possible, why = _by_tensors(evidence)
    if asked is not None and asked != UNDECIDED:
        wanted = revision_named(asked)
        if wanted not in possible:
            raise ConfigurationError(
                f"--revision {asked} does not fit the tensors: {why}, as {_listed(possible)} have it.\n"
                "  Leave --revision out, or convert the file that you mean."
            )
        return Decision(wanted, f"--revision says so; {why}")
    for look in (_by_config, _by_code, _by_tokenizer):
        narrowed = look(evidence, possible)
        if narrowed is not None:
            possible, also = narrowed
            why = f"{why}; {also}"
    if _same(possible):
        return Decision(possible[-1], why)
    if asked == UNDECIDED:
        return Decision(possible[-1], f"or another of {_listed(possible)}, which only --revision tells; {why}")
    raise ConfigurationError(
        f"This checkpoint is of {_listed(possible)}: {why}. They compute different answers, and nothing beside the "
        "weights tells which it is.\n"
        f"  Pass --revision ({_listed(possible, ' or ')}), the Hub revision that the files are from, or put its *.py "
        "files beside the weights."
    )


Narrowed = tuple[tuple[Revision, ...], str] | None


def _by_tensors(evidence: Evidence) -> tuple[tuple[Revision, ...], str]:
    said = {
        "none": "the projector takes the features of one view",
        "grid": "the projector takes twice the tower's width",
        "tiles": "the projector takes twice the tower's width",
    }[evidence.merge]
    found = tuple(
        revision
        for revision in REVISIONS
        if revision.keys == evidence.keys
        and (revision.merge == "none") == (evidence.merge == "none")
        and (revision.region == evidence.region or evidence.keys == "2025")
    )
    if evidence.keys == "2025":
        return found, "its tensors are named as those of 2025"
    region = {
        "points": " and there is a region_model of 2024-08-26",
        "coordinates": " and there is a region_model of late 2024, of which no tag is known",
    }.get(evidence.region or "", "")
    return found, said + region


def _by_config(evidence: Evidence, possible: tuple[Revision, ...]) -> Narrowed:
    if evidence.keys == "2025" or evidence.merge != "none":
        return None
    if "text_config" in evidence.config:
        return _among(possible, {"2024-05-08"}), "config.json has text_config"
    old = evidence.config.get("phi_config")
    if not isinstance(old, Mapping):
        return None
    if "n_embd" in old or "layer_norm_epsilon" in old:
        return _among(possible, {"2024-03-04"}), "config.json has the names of 2024-03-04 (n_embd)"
    later = {"2024-03-05", "2024-03-06", "2024-03-13", "2024-04-02"}
    return _among(possible, later), "config.json has phi_config"


def _by_code(evidence: Evidence, possible: tuple[Revision, ...]) -> Narrowed:
    if not evidence.code:
        return None
    if evidence.keys == "2025":
        return _by_code_of_2025(evidence.code, possible)
    if evidence.merge != "none":
        return None
    vision, model = evidence.code.get("vision_encoder.py"), evidence.code.get("moondream.py")
    said = []
    if vision is not None:
        timm = re.search(r"^\s*(import|from) timm\b", vision, re.MULTILINE) is not None
        possible = tuple(revision for revision in possible if revision.exact_gelu == timm)
        said.append(f"vision_encoder.py {'imports' if timm else 'does not import'} timm")
    if model is not None:
        marked, texts = "<END>" in model, "</image>" in model
        possible = tuple(
            revision
            for revision in possible
            if (revision.end_text is not None) == marked and revision.image_texts == texts
        )
        said.append(f"moondream.py {'has' if marked else 'has no'} <END>")
    if not possible:
        raise ConfigurationError(
            f"The Python files beside the weights contradict each other or the tensors: {' and '.join(said)}.\n"
            "  Pass --revision, the Hub revision that the weights are from."
        )
    return possible, ", ".join(said)


def _by_code_of_2025(code: Mapping[str, str], possible: tuple[Revision, ...]) -> Narrowed:
    model = code.get("moondream.py")
    if model is None:
        return None
    if NEW_TOKENIZER in model:
        return _among(possible, {"2025-06-21"}), f"moondream.py names the tokenizer {NEW_TOKENIZER}"
    if OLD_TOKENIZER not in model:
        return None
    linear = '"long"' not in code.get("config.py", "") and '"long"' not in model
    names = {"2025-01-09"} if linear else {"2025-03-27", "2025-04-14"}
    what = "has no long captions" if linear else "has long captions"
    return _among(possible, names), f"moondream.py names the tokenizer {OLD_TOKENIZER}, and the code {what}"


def _by_tokenizer(evidence: Evidence, possible: tuple[Revision, ...]) -> Narrowed:
    if evidence.keys != "2025" or not evidence.has_new_tokens:
        return None
    return _among(possible, {"2025-06-21"}), "tokenizer.json has <|md_reserved_0|>"


def _among(possible: tuple[Revision, ...], names: set[str]) -> tuple[Revision, ...]:
    """Those of `possible` that have such names; all where none has, as files beside the weights may be of others."""
    return tuple(revision for revision in possible if revision.name in names) or possible


def _same(possible: tuple[Revision, ...]) -> bool:
    """Whether all of them compute the same."""
    return len({tuple(sorted({**vars(revision), "name": ""}.items(), key=str)) for revision in possible}) == 1


def _listed(revisions: tuple[Revision, ...], last: str = " and ") -> str:
    names = [revision.name for revision in revisions]
    return last.join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
