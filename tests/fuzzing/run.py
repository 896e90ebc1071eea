"""`make fuzz`: fuzz every reader, print what came of it, and keep what was found."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

# No reader may ask the network, and one thread does what there is to do.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

from fuzzing import cases  # noqa: E402
from fuzzing.campaign import Campaign, Result, judged_in_worker, minimised  # noqa: E402
from fuzzing.targets import MILLISECONDS, TARGETS  # noqa: E402

BATCH = 1000
"""Milliseconds that a batch is to take."""
KEPT = HERE / "findings"
COLUMNS = ("inputs", "accepted", "compared", "refused", "finding")


def main() -> int:
    arguments = _arguments()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    names = arguments.target or list(TARGETS)
    shares = _shares(names, arguments.inputs)
    campaigns = {name: Campaign(TARGETS[name], arguments.seed) for name in names}
    print(f"seed {arguments.seed}; {sum(shares.values()):,} inputs for {len(names)} readers", flush=True)
    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):
            _judge(campaigns, shares, arguments.state, started)
        print(_table({name: campaign.result for name, campaign in campaigns.items()}), flush=True)
        return _report(campaigns, arguments.out, arguments.minimise)
    finally:
        for campaign in campaigns.values():
            campaign.close()


def _judge(campaigns: dict[str, Campaign], shares: dict[str, int], state: Path | None, started: float) -> None:
    """Batches of every reader in turn until each has had its share; Ctrl-C ends it with what there is."""
    while left := [name for name in campaigns if campaigns[name].result.inputs < shares[name]]:
        for name in left:
            result = campaigns[name].result
            campaigns[name].batch(max(1, min(int(BATCH / MILLISECONDS[name]), shares[name] - result.inputs)))
            if state:
                _save(state, campaigns)
        print(f"{time.monotonic() - started:7.0f} s  {_total(campaigns)}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="in all (default: a million)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this one; may be repeated")
    parser.add_argument("--out", type=Path, default=KEPT, help="where findings are kept (default: beside this file)")
    parser.add_argument("--minimise", type=float, default=20.0, metavar="SECONDS", help="for each finding")
    parser.add_argument("--state", type=Path, help="a JSON file for the figures, written after every round")
    return parser.parse_args()


def _shares(names: list[str], inputs: int) -> dict[str, int]:
    """How many inputs each reader gets: fewer where one takes long."""
    weights = {name: 1 / MILLISECONDS[name] for name in names}
    return {name: max(1, round(inputs * weight / sum(weights.values()))) for name, weight in weights.items()}


def _total(campaigns: dict[str, Campaign]) -> str:
    results = [campaign.result for campaign in campaigns.values()]
    return (
        f"{sum(result.inputs for result in results):9,} inputs, {sum(len(each.findings) for each in results)} findings"
    )


def _table(results: dict[str, Result]) -> str:
    lines = [f"{'reader':22}" + "".join(f"{name:>11}" for name in (*COLUMNS, "lines", "ms each"))]
    for name, result in results.items():
        counts = [result.inputs, *(result.counts[kind] for kind in COLUMNS[1:]), result.lines]
        each = 1000 * result.seconds / max(result.inputs, 1)
        lines.append(f"{name:22}" + "".join(f"{count:11,}" for count in counts) + f"{each:11.2f}")
    totals = [sum(result.inputs for result in results.values())]
    totals += [sum(result.counts[kind] for result in results.values()) for kind in COLUMNS[1:]]
    return "\n".join([*lines, f"{'all':22}" + "".join(f"{count:11,}" for count in totals)])


def _save(path: Path, campaigns: dict[str, Campaign]) -> None:
    state = {
        name: {
            "inputs": campaign.result.inputs,
            **campaign.result.counts,
            "lines": campaign.result.lines,
            "seconds": campaign.result.seconds,
            "findings": dict(campaign.result.times),
        }
        for name, campaign in campaigns.items()
    }
    path.write_text(json.dumps(state, indent=1))
    for name, campaign in campaigns.items():
        for key, (case, detail) in campaign.result.findings.items():
            folder = path.parent / "raw" / name / "".join(c if c.isalnum() else "-" for c in key)[:80]
            if not folder.exists():
                cases.write(case, folder)
                (folder.parent / f"{folder.name}.txt").write_text(f"{key}\n\n{detail}\n", "utf-8", "backslashreplace")


def _report(campaigns: dict[str, Campaign], out: Path, seconds: float) -> int:
    """Keep each finding, as small as it gets; returns the exit status."""
    count = 0
    for name, campaign in campaigns.items():
        for key, (case, detail) in campaign.result.findings.items():
            count += 1
            small = minimised(TARGETS[name], case, key, seconds)
            again = judged_in_worker(TARGETS[name], small)
            folder = out / name / cases.digest(small)
            cases.write(small, folder)
            times = campaign.result.times[key]
            print(f"\n{name}: {key} ({times} times; {again.kind} when judged alone)\n  {folder}\n{detail}")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
