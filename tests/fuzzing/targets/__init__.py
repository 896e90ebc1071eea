"""What is fuzzed: every reader, by name."""

from __future__ import annotations

from fuzzing.campaign import Target
from fuzzing.targets import adapters, data, plans, settings, vocabularies, weights

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (weights, vocabularies, adapters, settings, data, plans)
    for target in module.TARGETS
}
