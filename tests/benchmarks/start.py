"""What it costs to have gradtools at all: import, and to state a rule.

Each figure is the median of fresh processes, see ``fresh``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from tests.benchmarks import ledger, timing
from tests.benchmarks.ledger import Part

MOST_IMPORT, MOST_DEFINITION = 30.0, 5.0  # milliseconds


def measure(times: int = 11) -> Part:
    """Start processes and return the medians of what they found."""
    with tempfile.TemporaryDirectory() as folder:
        started(folder)  # writes bytecode, as pip does, and fills the disk's caches
        found = [started(folder) for _ in range(times)]

    def times_of(name: str) -> np.ndarray:
        return np.array([one[name] for one in found])

    rows = [
        ledger.row(
            "start", work, "", "gradtools", "", "ms", timing.median(times_of(name)), bar
        )
        for work, name, bar in (
            ("import gradtools, after torch", "import", MOST_IMPORT),
            ("state the first rule", "definition", MOST_DEFINITION),
            ("state one more", "again", None),
            ("first call with its check, of 4 numbers", "first call", None),
            ("the same with checks off, first call", "unchecked call", None),
        )
    ]
    foreign, dynamo = found[0]["foreign"], found[0]["dynamo"]
    rows += [
        ledger.exact(
            "start",
            "modules that the import loads beside the standard library's and its own",
            "",
            "gradtools",
            "",
            "count",
            len(foreign),
            0,
            ", ".join(foreign),
        ),
        ledger.exact(
            "start",
            "modules of Dynamo that import and definition load",
            "",
            "gradtools",
            "",
            "count",
            dynamo,
            0,
        ),
    ]
    return Part(rows)


def started(folder: str) -> dict[str, Any]:
    """Return what a fresh process found; bytecode is kept in a folder."""
    command = [sys.executable, "-m", "tests.benchmarks.fresh"]
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1])
