"""Where the modules that an adapter names stand in the base's files.

transformers renames tensors while it loads: a file may say `language_model.model.layers.0…` for what the running
model, and so the adapter, calls `model.language_model.layers.0…`. A module is found by its exact name, or else by the
one tensor whose name ends the same way and whose beginning holds the same words; anything less certain is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

from weightport.checkpoints import TensorRef

# Words that transformers puts before or takes from names without their meaning anything.
_FILLERS = frozenset(
    {"model", "base_model", "transformer", "bert", "roberta", "decoder", "language_model", "vision_model"}
)


class BaseNames:
    """The names of a base's tensors, to be found by the names that a running model has for them."""

    def __init__(self, tensors: Mapping[str, TensorRef]) -> None:
        self._tensors = tensors
        self._by_leaf: dict[str, list[str]] = {}
        for name in tensors:
            self._by_leaf.setdefault(".".join(name.split(".")[-2:]), []).append(name)

    def find(self, name: str, shapes: Iterable[tuple[int, ...]] = ()) -> str | None:
        """The base's name of the tensor that the model calls `name`; None when there is none, or more than one.

        `shapes` narrows the choice to tensors of one of these shapes (empty: any).
        """
        if name in self._tensors:
            return name
        wanted = name.split(".")
        fitting = set(shapes)
        ranked: dict[int, list[str]] = {}
        for candidate in self._by_leaf.get(".".join(wanted[-2:]), ()):
            if fitting and self._tensors[candidate].shape not in fitting:
                continue
            common = _common_ending(wanted, candidate.split("."))
            if _same_beginning(wanted[: len(wanted) - common], candidate.split(".")[:-common]):
                ranked.setdefault(common, []).append(candidate)
        best = ranked[max(ranked)] if ranked else []
        return best[0] if len(best) == 1 else None

    def near(self, name: str) -> Sequence[str]:
        """A few names like `name`, for an error message."""
        return get_close_matches(name, self._tensors, n=2, cutoff=0.6)


def _common_ending(a: Sequence[str], b: Sequence[str]) -> int:
    count = 0
    for x, y in zip(reversed(a), reversed(b)):
        if x != y:
            break
        count += 1
    return count


def _same_beginning(a: Sequence[str], b: Sequence[str]) -> bool:
    """Whether two beginnings hold the same words but for fillers, and the same numbers in the same order."""
    if [word for word in a if word.isdigit()] != [word for word in b if word.isdigit()]:
        return False
    rest_a, rest_b = Counter(a), Counter(b)
    return _only_fillers(rest_a - rest_b) and _only_fillers(rest_b - rest_a)


def _only_fillers(words: Counter[str]) -> bool:
    return all(word in _FILLERS for word in words)
