"""How many instructions a call takes, which no other load of the machine changes.

``python -m tests.benchmarks.instructions`` under valgrind is what :func:`measure`
starts: one process for all contenders, which tells callgrind when to count, as
``torch.utils.benchmark.Timer.collect_callgrind`` does in a process for each; to import
torch under valgrind takes more than a minute.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks import ledger, timing
from tests.benchmarks.ledger import Part, Row
from tests.benchmarks.rivals import CONTESTS, TINY, Contest
from tests.benchmarks.rivals.contest import COMBINED, COMPOSABLE, COMPOSITE, GRADTOOLS

MOST = {COMBINED: 1.05, COMPOSABLE: 0.75}
CONTENDERS = (GRADTOOLS, COMBINED, COMPOSABLE, COMPOSITE)
WORKS = "instructions, forward + backward, tiny", "instructions, under no_grad, tiny"
CALLS = 50
WARM_UP = 5


def measure() -> Part | str:
    """Count, or return why not."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    if not torch._C._valgrind_supported_platform():
        return "this torch has no hooks for valgrind"
    counts = counted()
    names = iter(scenarios())
    found: dict[str, dict[str, dict[str, float]]] = {work: {} for work in WORKS}
    baseline = counts.pop(0)
    for count, (work, rule, contender) in zip(counts, names, strict=True):
        per_call = (count - baseline) / CALLS
        found[work].setdefault(rule, {})[contender] = per_call
    return Part([row for work in WORKS for row in rows_of(work, found[work])])


def rows_of(work: str, found: dict[str, dict[str, float]]) -> list[Row]:
    """Return ratios for each rule and their mean, and the counts themselves."""
    rows = []
    names = "instructions", work
    with_backward = work == WORKS[0]
    for reference, bar in MOST.items():
        ratios = {
            rule: counts[GRADTOOLS] / counts[reference]
            for rule, counts in found.items()
        }
        mean = timing.geometric_mean([np.array([ratio]) for ratio in ratios.values()])
        rows += [
            ledger.exact(*names, rule, GRADTOOLS, reference, "ratio", ratio)
            for rule, ratio in ratios.items()
        ]
        most = bar if with_backward else None
        middle = mean.value
        rows.append(
            ledger.exact(
                *names, ledger.MEAN, GRADTOOLS, reference, "ratio", middle, most
            )
        )
    for contender in CONTENDERS:
        rows += [
            ledger.exact(*names, rule, contender, "", "count", counts[contender])
            for rule, counts in found.items()
        ]
    return rows


def scenarios() -> list[tuple[str, str, str]]:
    """Return what is counted, in this order: work, rule, contender."""
    return [(w, rule, name) for w in WORKS for rule in CONTESTS for name in CONTENDERS]


def counted() -> list[int]:
    """Run the child under callgrind and return what it counted, call for call."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "valgrind",
            "--tool=callgrind",
            f"--callgrind-out-file={folder}/out",
            "--instr-atstart=yes",
            "--collect-atstart=no",
            sys.executable,
            "-m",
            __name__,
        ]
        # Without the seed, the order of sets differs from process to process.
        surroundings = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, capture_output=True, env=surroundings)
        dumps = sorted(Path(folder).glob("out.*"), key=lambda p: int(p.suffix[1:]))
        return [total(dump) for dump in dumps]


def total(dump: Path) -> int:
    """Return the instructions of a dump."""
    text = dump.read_text(encoding="utf-8", errors="replace")
    return int(re.findall(r"^(?:totals|summary):\s+(\d+)", text, re.MULTILINE)[-1])


# The child.


def nothing() -> None:
    """Do nothing: the baseline."""


def run_of(contest: Contest, work: str, name: str) -> Callable[[], Any]:
    """Return what is counted."""
    spelling, args = contest.spellings[name], contest.arguments(TINY)
    if work == WORKS[0]:
        return contest.step(spelling, args)
    args = contest.active(args)

    def run() -> Any:
        with torch.no_grad():
            return spelling(*args)

    return run


def count(run: Callable[[], Any]) -> None:
    """Have callgrind count a number of calls, and write down what it counted."""
    for _ in range(WARM_UP):
        run()
    torch._C._valgrind_toggle()
    for _ in range(CALLS):
        run()
    torch._C._valgrind_toggle_and_dump_stats()


def main() -> None:
    """Count the baseline, then every scenario."""
    torch.set_num_threads(1)
    runs = [run_of(CONTESTS[rule], work, name) for work, rule, name in scenarios()]
    for run in (nothing, *runs):
        count(run)


if __name__ == "__main__":
    main()
