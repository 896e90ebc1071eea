"""Recipes: read from YAML, changed by dotted names, checked, written back so that the file gives the same run."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from weightport.errors import RecipeError
from weightport.finetuning.data.settings import ANSWERS, FORMS, READERS, TURNS, DataSettings
from weightport.finetuning.recipes.settings import (
    DTYPES,
    LOSS_MEANS,
    METHODS,
    SAMPLINGS,
    BatchSettings,
    EvaluationSettings,
    ModelSettings,
    Published,
    Recipe,
)

SECTIONS = {"data": DataSettings, "batch": BatchSettings, "model": ModelSettings, "evaluation": EvaluationSettings}
"""Sections that are our own; `training` and `lora` are libraries' and are checked against them."""

CHOICES = {
    "data.reader": READERS,
    "data.form": FORMS,
    "data.answer": ANSWERS,
    "data.turns": TURNS,
    "batch.loss_mean": LOSS_MEANS,
    "batch.sampling": SAMPLINGS,
    "model.method": METHODS,
    "model.dtype": DTYPES,
    "model.frozen_mode": ("eval", "train"),
}
AT_LEAST = {
    "batch.image_size": 1,
    "batch.max_prompt_length": 1,
    "batch.max_target_length": 3,
    "evaluation.samples": 1,
    "evaluation.batch_size": 1,
    "evaluation.previews": 0,
    "evaluation.rerank": 0,
    "evaluation.early_stopping_patience": 1,
    "evaluation.early_stopping_threshold": 0,
    "evaluation.generation.num_beams": 1,
    "evaluation.generation.max_new_tokens": 1,
    "training.learning_rate": 0,
    "training.weight_decay": 0,
    "training.per_device_train_batch_size": 1,
    "training.per_device_eval_batch_size": 1,
    "training.gradient_accumulation_steps": 1,
    "training.dataloader_num_workers": 0,
}
"""The smallest value of settings whose own libraries notice too late that they cannot be."""
SWITCHES = frozenset({"training.fsdp"})
"""Settings that are true or false, though their library also takes words for them."""

OPEN = ("model.config", "evaluation.generation")
SCHEDULE = "training.lr_scheduler_type"
"""Mappings whose keys belong to the model: checked when it is there."""

ANY = "*"
"""Among a recipe's families: every other one, of any package."""

OURS = ("output_dir", "do_train", "do_eval", "do_predict", "push_to_hub", "remove_unused_columns", "disable_tqdm",
        "resume_from_checkpoint", "label_names", "logging_nan_inf_filter")  # fmt: skip
"""Training arguments that the command itself decides."""


def shipped_recipes() -> dict[str, Recipe]:
    """Every recipe of the package, by name."""
    folder = resources.files(__package__)
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return {recipe.name: recipe for recipe in (parse_recipe(file.read_text("utf-8"), file.name) for file in files)}


def load_recipe(named: str) -> Recipe:
    """The shipped recipe `named`, or the one in the file of that path. Raises RecipeError."""
    path = Path(named)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            return parse_recipe(path.read_text("utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"The recipe {path} cannot be read: {error}.") from error
    known = shipped_recipes()
    if named not in known:
        raise RecipeError(f"There is no recipe {named!r}{_similar(named, known)}. A path to a .yaml file works too.")
    return known[named]


def parse_recipe(text: str, place: str) -> Recipe:
    """A recipe from YAML. Raises RecipeError naming `place` and the key that does not fit."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{place} is no YAML: {error}") from error
    except RecursionError as error:
        raise RecipeError(f"{place} is no recipe: it nests lists or mappings hundreds deep.") from error
    if not isinstance(content, Mapping):
        raise RecipeError(f"{place} is no recipe: expected sections such as data, training, found {content!r:.60}.")
    known = [each.name for each in fields(Recipe)]
    for key in content:
        if key not in known:
            raise RecipeError(f"{place}: {key!r} is no section of a recipe{_similar(str(key), known)}.")
    for key in ("name", "title", "families"):
        if not content.get(key):
            raise RecipeError(f"{place} has no {key!r}.")
    families = content["families"]
    families = {str(name): {} for name in families} if isinstance(families, list) else families
    published = content.get("published") or {}
    for key, found in (("families", families), ("published", published)):
        if not isinstance(found, Mapping) or not all(isinstance(own or {}, Mapping) for own in found.values()):
            raise RecipeError(f"{place}: {key!r} holds model types, each with settings; found {found!r:.60}.")
    for name, own in published.items():
        settings, mistakes = (own or {}).get("settings") or {}, (own or {}).get("mistakes") or []
        if not isinstance(settings, Mapping) or not isinstance(mistakes, list):
            raise RecipeError(
                f"{place}: 'published.{name}' holds settings (names with values) and mistakes (a list); found "
                f"{own!r:.60}."
            )
    recipe = Recipe(
        name=str(content["name"]),
        title=str(content["title"]),
        source=str(content.get("source", "")),
        families={str(name): {str(k): v for k, v in (own or {}).items()} for name, own in families.items()},
        published={
            str(name): Published(
                {str(key): value for key, value in ((each or {}).get("settings") or {}).items()},
                tuple(map(str, (each or {}).get("mistakes") or ())),
            )
            for name, each in published.items()
        },
    )
    settings = {key: content[key] for key in (*SECTIONS, "training", "lora") if content.get(key)}
    return with_settings(recipe, _flat(settings), place)


def for_family(recipe: Recipe, family: str, *, as_published: bool = False) -> Recipe:
    """The recipe for one family: its own settings applied, with `as_published` the guide's too."""
    own = recipe.families.get(family, recipe.families.get(ANY))
    if own is None:
        raise RecipeError(
            f"The recipe {recipe.name!r} is for {', '.join(recipe.families)}, and the model is {family!r}. "
            f"`weightport recipes` lists what there is."
        )
    resolved = with_settings(recipe, own, f"recipe {recipe.name}, families.{family}")
    if as_published:
        if family not in recipe.published:
            raise RecipeError(f"The recipe {recipe.name!r} follows no published guide for {family!r}.")
        published = recipe.published[family]
        resolved = with_settings(resolved, published.settings, f"recipe {recipe.name}, published.{family}")
    return replace(resolved, families={family: {}}, published={})


def with_settings(recipe: Recipe, settings: Mapping[str, Any], place: str) -> Recipe:
    """The recipe with values by dotted name (`training.learning_rate`), or by a last name that is only one's. Another
    schedule has none of the recipe's settings of its own."""
    named = {qualified(key, place): value for key, value in settings.items()}
    if SCHEDULE in named and named[SCHEDULE] != recipe.training.get("lr_scheduler_type"):
        left = {name: value for name, value in recipe.training.items() if name != "lr_scheduler_kwargs"}
        recipe = replace(recipe, training=left)
    for name, value in named.items():
        inner = value.items() if name in OPEN and isinstance(value, Mapping) else None
        for each, own in ((name, value),) if inner is None else ((f"{name}.{key}", own) for key, own in inner):
            recipe = _with_setting(recipe, each, own, place)
    return recipe


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """`key=value` strings of the command line; values are YAML. Raises RecipeError."""
    found = {}
    for each in assignments:
        key, equals, value = each.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {each}: expected key=value, such as training.learning_rate=1e-5.")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {each}: {value!r} is no YAML value: {error}") from error
    return found


def qualified(key: str, place: str) -> str:
    """The dotted name of a setting given by its last part. Raises RecipeError when there is none, or several."""
    known = known_settings()
    if key in known or key.startswith(tuple(f"{name}." for name in OPEN)):
        return key
    if key.startswith("lora.") and not _has_peft():
        # Recipes are shown without peft; training an adapter needs it, and checks.
        return key
    matches = [name for name in known if name.rpartition(".")[2] == key]
    # The recipe's own word comes before a library's.
    own = [name for name in matches if name.split(".")[0] in SECTIONS]
    if len(own or matches) == 1:
        return (own or matches)[0]
    if not matches and key in generation_settings():
        return f"evaluation.generation.{key}"
    if matches:
        raise RecipeError(f"{place}: {key!r} may be {' or '.join(matches)}: write which.")
    every = [*known, *(f"evaluation.generation.{name}" for name in generation_settings())]
    raise RecipeError(f"{place}: there is no setting {key!r}{_similar(key, every)}.")


@cache
def generation_settings() -> frozenset[str]:
    """Names of transformers' GenerationConfig."""
    from transformers import GenerationConfig

    return frozenset(GenerationConfig().to_dict())


@cache
def known_settings() -> dict[str, Any]:
    """Type by dotted name of every setting; those of peft where it is installed."""
    from transformers import TrainingArguments

    libraries: dict[str, Any] = {"training": TrainingArguments}
    if _has_peft():
        from peft import LoraConfig

        libraries["lora"] = LoraConfig
    found: dict[str, Any] = {}
    for section, kind in SECTIONS.items():
        found |= {f"{section}.{name}": hint for name, hint in get_type_hints(kind).items()}
    for section, kind in libraries.items():
        hints = get_type_hints(kind)
        found |= {f"{section}.{f.name}": hints.get(f.name, Any) for f in fields(kind) if f.init}
    for name in OURS:
        del found[f"training.{name}"]
    return found


def _has_peft() -> bool:
    return find_spec("peft") is not None


def _with_setting(recipe: Recipe, key: str, value: Any, place: str) -> Recipe:
    section, _, name = key.partition(".")
    outer = next((open_ for open_ in OPEN if key.startswith(f"{open_}.")), None)
    if outer is not None:
        section, _, name = outer.partition(".")
        _require_least(key, value, place)
        mapping = {**getattr(getattr(recipe, section), name), key.removeprefix(f"{outer}."): value}
        return _replaced(recipe, section, replace(getattr(recipe, section), **{name: mapping}))
    if key in CHOICES and value not in CHOICES[key]:
        raise RecipeError(f"{place}: {key} is one of {', '.join(CHOICES[key])}, found {value!r}.")
    if not (key in SWITCHES and isinstance(value, bool)):
        value = _coerced(value, known_settings().get(key, Any), f"{place}: {key}")
    _require_least(key, value, place)
    current = getattr(recipe, section)
    if is_dataclass(current) and not isinstance(current, type):
        return _replaced(recipe, section, replace(current, **{name: value}))
    return _replaced(recipe, section, {**current, name: value})


def _require_least(key: str, value: Any, place: str) -> None:
    least = AT_LEAST.get(key)
    if least is None or value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
        raise RecipeError(f"{place}: {key} is {least} or more, found {value!r}.")


def _replaced(recipe: Recipe, section: str, changed: Any) -> Recipe:
    return replace(recipe, **{section: changed})


def _coerced(value: Any, hint: Any, place: str) -> Any:
    """`value` as the type that a setting has. YAML reads 5e-5 as text; a list is a tuple here."""
    kinds = get_args(hint) if get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if value is None:
        if type(None) in kinds or hint is Any:
            return None
        raise RecipeError(f"{place} needs a value.")
    if bool in kinds and isinstance(value, bool):
        return value
    if isinstance(value, bool) and str in kinds:
        # YAML reads the word no of `eval_strategy: no` as false.
        return "yes" if value else "no"
    if isinstance(value, bool) and (int in kinds or float in kinds):
        raise RecipeError(f"{place} is a number, found {str(value).lower()}.")
    if float in kinds and not isinstance(value, int):
        try:
            return float(value)
        except (TypeError, ValueError):
            if str not in kinds:
                raise RecipeError(f"{place} is a number, found {value!r}.") from None
    if int in kinds and not isinstance(value, int) and not ({float, str, list, dict, bool} & set(kinds)):
        raise RecipeError(f"{place} is a whole number, found {value!r}.")
    if kinds[0] is bool and len(kinds) == 1:
        raise RecipeError(f"{place} is true or false, found {value!r}.")
    origins = {get_origin(kind) or kind for kind in kinds}
    if tuple in origins:
        if isinstance(value, dict):
            raise RecipeError(f"{place} is a list of names, found {value!r}.")
        return tuple(str(each) for each in (value if isinstance(value, (list, tuple)) else [value]))
    if isinstance(value, (list, dict)):
        if not origins & {type(value), Any} and not (isinstance(value, dict) and Mapping in origins):
            raise RecipeError(f"{place} is {'text' if str in kinds else 'one value'}, found {value!r}.")
        return value
    if origins & {Mapping, dict, list} and not origins & {str, int, float, bool}:
        raise RecipeError(f"{place} holds several values, found {value!r}.")
    return str(value) if kinds[0] is str else value


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`section.name` → value."""
    flat: dict[str, Any] = {}
    for section, values in settings.items():
        if not isinstance(values, Mapping):
            raise RecipeError(f"The section {section!r} holds names with values, found {values!r}.")
        for name, value in values.items():
            if f"{section}.{name}" in OPEN and isinstance(value, Mapping):
                flat |= {f"{section}.{name}.{inner}": each for inner, each in value.items()}
            else:
                flat[f"{section}.{name}"] = value
    return flat


def as_yaml(recipe: Recipe, comments: Sequence[str] = ()) -> str:
    """The recipe as the file that gives it again."""
    head = "".join(f"# {line}\n" for line in comments)
    return head + yaml.safe_dump(plain(recipe), sort_keys=False, allow_unicode=True, width=119)


def plain(recipe: Recipe) -> dict[str, Any]:
    """Dictionaries, lists and scalars; empty sections left out."""
    return {key: value for key, value in _plain(asdict(recipe)).items() if value not in ({}, "", None)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


def _similar(name: str, known: typing.Iterable[str]) -> str:
    names = list(known)
    # A shared section makes names of settings look alike that are not: their last parts decide.
    # No setting has a name of more characters, and comparing takes the square of their number.
    last = name.rpartition(".")[2][:100]
    likeness = {each: difflib.SequenceMatcher(None, last, each.rpartition(".")[2]).ratio() for each in names}
    likeness |= {each: 1.0 for each in names if last and last in each.rpartition(".")[2].split("_")}
    close = sorted((each for each in names if likeness[each] > 0.7), key=lambda each: -likeness[each])[:3]
    if close:
        return f" (did you mean {' or '.join(close)}?)"
    return f" (there are {', '.join(names)})" if len(names) <= 12 else ""
