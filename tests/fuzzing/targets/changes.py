"""How a case is changed: one of its files, by what its name says it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from random import Random

from fuzzing import mutation
from fuzzing.cases import Case
from fuzzing.mutation import Mutation

BY_SUFFIX: Mapping[str, Mutation] = {
    ".json": mutation.of_json,
    ".jsonl": mutation.of_json_lines,
    ".zarray": mutation.of_json,
    ".txt": mutation.of_text,
    ".tsv": mutation.of_text,
    ".csv": mutation.of_text,
    ".bpe": mutation.of_text,
    ".yaml": mutation.of_text,
    ".py": mutation.of_text,
    ".model": mutation.of_message,
    ".safetensors": mutation.of_safetensors,
    ".npy": mutation.of_npy,
    ".pkl": mutation.of_pickle,
}


def _of_member(name: str) -> Mutation:
    if name.endswith((".npy", ".pkl")):
        return BY_SUFFIX[name[-4:]]
    return mutation.of_bytes


ARCHIVES = (".pt", ".npz", ".bin")


def of_file(rng: Random, name: str, data: bytes) -> bytes:
    """`data` changed as what its name and beginning say that it is."""
    if name.endswith(ARCHIVES) and data.startswith(b"PK"):
        return mutation.of_zip(rng, data, _of_member)
    if name.endswith(ARCHIVES) and data[:1] == b"\x80":
        return of_legacy(rng, data)
    suffix = "." + name.rsplit(".", 1)[-1]
    return BY_SUFFIX.get(suffix, mutation.of_bytes)(rng, data)


def of_legacy(rng: Random, data: bytes) -> bytes:
    """One of the five pickles of torch's older format, or the storages after them."""
    parts: list[bytes] = []
    rest = data
    try:
        for _ in range(5):
            *found, rest = mutation.opcodes(rest)
            parts.append(b"".join(found))
    except (ValueError, KeyError, IndexError, OverflowError, mutation.struct.error):
        return mutation.of_bytes(rng, data)
    at = rng.choice((2, 3, 3, 3, 3, 4, 5, 5, rng.randrange(6)))
    parts.append(rest)
    parts[at] = mutation.of_pickle(rng, parts[at]) if at < 5 else mutation.of_bytes(rng, rest)
    return b"".join(parts)


def change(rng: Random, case: Case, corpus: list[Case], *, keep: Callable[[str], bool] = lambda name: False) -> Case:
    """`case` with one file changed; seldom one left out, or with the content of another case's."""
    made = dict(case)
    names = [name for name in made if not keep(name)] or list(made)
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice(names)
        choice = rng.random()
        if choice < 0.02 and len(made) > 1 and name in made:
            del made[name]
        elif choice < 0.05:
            made[name] = rng.choice(corpus).get(name, b"")
        elif name in made:
            made[name] = of_file(rng, name, made[name])
    return made


def keeping(*suffixes: str) -> Callable[[Random, Case, list[Case]], Case]:
    """`change` that leaves files with these suffixes as they are."""
    return partial(change, keep=lambda name: name.endswith(suffixes))
