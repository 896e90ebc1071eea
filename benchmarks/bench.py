#!/usr/bin/env python3
"""Runs every benchmark of this folder and writes RESULTS.md: what each job costs beside its named peer and `cp`.

    make bench                                    everything (about half an hour on 2 idle cores, 12 GB of disk)
    python benchmarks/bench.py --only merging     one of them, in the place of its earlier rows
    python benchmarks/bench.py --tiny --runs 1    all of them, tiny: whether they run

Ratios are made of medians of processes that ran in turn, so that other work on the machine hits both sides; the
seconds beside them are of that moment.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from processes import Figures, Timing, load

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"
FIGURES = HERE / "results.json"


@dataclass(frozen=True)
class Benchmark:
    """A script with its arguments, in full and tiny."""

    script: str
    full: tuple[str, ...] = ()
    tiny: tuple[str, ...] = ()


BENCHMARKS: Mapping[str, Benchmark] = {
    "converting-ofa": Benchmark("convert.py", (), ("--layers", "1")),
    "converting-florence2": Benchmark(
        "convert.py", ("--family", "florence2"), ("--family", "florence2", "--layers", "1")
    ),
    "converting-paligemma2": Benchmark("convert.py", ("--family", "paligemma2", "--layers", "4"), ("--help",)),
    "converting-moondream2": Benchmark("convert.py", ("--family", "moondream2"), ("--help",)),
    "converting-blip2": Benchmark("convert_blip2.py", ("--layers", "4"), ("--help",)),
    "merging": Benchmark("merge.py", ("--gigabytes", "0.8"), ("--tiny", "--gigabytes", "0.001")),
    "importing": Benchmark("everyday.py", ("--only", "import"), ("--only", "import", "--tiny")),
    "inspecting": Benchmark("everyday.py", ("--only", "inspect"), ("--only", "inspect", "--tiny")),
    "extracting": Benchmark("everyday.py", ("--only", "extraction"), ("--only", "extraction", "--tiny")),
    "verifying": Benchmark("everyday.py", ("--only", "verification"), ("--only", "verification", "--tiny")),
    "parity": Benchmark("everyday.py", ("--only", "parity"), ("--only", "parity", "--tiny")),
    "generating": Benchmark("generation.py", (), ("--tiny", "--pictures", "1")),
    "reading-data": Benchmark("reading_data.py", (), ("--images", "4", "--captions", "2")),
    "training": Benchmark("finetune.py", (), ("--images", "4", "--steps", "3", "--only", "ofa")),
}  # fmt: skip
"""What is measured, by name; tiny sizes that would still be gigabytes are only asked for their help."""


def run(benchmark: Benchmark, arguments: argparse.Namespace) -> list[Figures]:
    """The figures of one benchmark."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        file = Path(place) / "figures.json"
        given = benchmark.tiny if arguments.tiny else benchmark.full
        command = [sys.executable, str(HERE / benchmark.script), *given, "--json", str(file)]
        command += ["--runs", str(arguments.runs)]
        subprocess.run(command, check=True, env={**os.environ, "TMPDIR": place})
        return load(file) if file.exists() else []


def machine() -> str:
    """The machine in words, without its name."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    found = dict(line.split("\t: ", 1) for line in info.splitlines() if "\t: " in line)
    processor = " ".join(found.get("model name", platform.processor() or platform.machine()).split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return (
        f"{os.cpu_count()} cores ({processor}), {memory:.0f} GB of memory, {platform.system()}, Python "
        f"{platform.python_version()}, {libraries}"
    )


def page(measured: Mapping[str, Mapping[str, object]]) -> str:
    """RESULTS.md of everything measured."""
    lines = [
        "# Results of the benchmarks",
        "",
        "Written by `make bench` (benchmarks/bench.py); a line is medians of whole processes that ran in turn in one",
        "run, ours and its peer. Ratios are what counts: seconds depend on the machine and on what else ran there.",
        "`× cp` is what ours takes beyond the start of its interpreter, in copies of the same bytes to the disk",
        "(`cp`, then `sync`). Private memory is the peak of RssAnon: anonymous pages, without pages of mapped files;",
        "USS adds the private pages of mapped files. benchmarks/processes.py says it in full.",
        "",
        "| what | ours | peer | times as fast | × cp | private MB | of the peer | USS MB | of the peer |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    runs: dict[str, list[str]] = {}
    for name, entry in measured.items():
        runs.setdefault(str(entry["machine"]), []).append(f"{name} ({entry['date']}, load {entry['load']})")
        lines += [_row(Figures(**each)) for each in _restored(entry["figures"])]
    lines += ["", "Measured on:", ""]
    lines += [f"- {where}: {', '.join(names)}" for where, names in runs.items()]
    return "\n".join(lines) + "\n"


def _restored(figures: object) -> Iterable[dict]:
    assert isinstance(figures, list)
    for each in figures:
        yield {**each, "rows": {name: Timing(**row) for name, row in each["rows"].items()}}


def _row(figures: Figures) -> str:
    ours, peer = figures.rows[figures.ours], figures.rows.get(figures.peer)
    unit = f" for {figures.unit}" if figures.unit else ""
    copies = "–"
    if figures.copy:
        start = figures.rows[figures.start].seconds if figures.start else 0.0
        copies = f"{(ours.seconds - start) / figures.rows[figures.copy].seconds:.1f}"
    found = [f"{figures.title}: {figures.ours}", f"{ours.seconds:.2f} s{unit}"]
    found.append(f"{figures.peer}, {peer.seconds:.2f} s" if peer is not None else "–")
    found += [f"{peer.seconds / ours.seconds:.2f}" if peer is not None else "–", copies]
    for of in ("megabytes", "unique"):
        found += [f"{value:.0f}" if (value := getattr(row, of, 0.0)) else "–" for row in (ours, peer)]
    return f"| {' | '.join(found)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=BENCHMARKS, action="append")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; RESULTS.md stays as it is")
    parser.add_argument("--runs", type=int, default=3, help="of each command")
    parser.add_argument("--folder", type=Path, help="where to work")
    arguments = parser.parse_args()
    measured: dict[str, dict] = {}
    if FIGURES.is_file() and not arguments.tiny:
        measured = json.loads(FIGURES.read_text())
    failed = []
    for name in arguments.only or BENCHMARKS:
        print(f"== {name}", flush=True)
        load_before = os.getloadavg()[0]
        try:
            found = run(BENCHMARKS[name], arguments)
        except subprocess.CalledProcessError as error:
            failed.append(name)
            print(f"{name}: {error}", file=sys.stderr)
            continue
        measured[name] = {
            "figures": [asdict(each) for each in found],
            "machine": machine(),
            "date": time.strftime("%Y-%m-%d"),
            "load": f"{load_before:.0f}",
        }
        if not arguments.tiny:
            ordered = {each: measured[each] for each in BENCHMARKS if each in measured}
            FIGURES.write_text(json.dumps(ordered, indent=1) + "\n")
            RESULTS.write_text(page(ordered))
    print(page({name: entry for name, entry in measured.items() if entry["figures"]}))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
