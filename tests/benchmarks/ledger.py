"""What is measured, as records: rows of tables, curves of plots, and runs on disk."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.timing import Figure

# A ratio counts as met with its whole interval under the bar and this much.
ALLOWANCE = 0.02

MEAN = "geometric mean"


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        section: The part of the benchmark that it comes from.
        work: What was done.
        rule: With which rule, or the mean over all.
        contender: Who did it.
        reference: In comparison with whom; empty for a figure that stands alone.
        unit: ``ratio``, ``us``, ``ms``, ``s``, ``bytes``, ``count``.
        value: The figure.
        low: Where its 95% interval begins; where it ends for one without noise.
        high: Where its interval ends.
        bar: What it may be at most; None where nothing was promised.
        note: What else there is to say.
    """

    section: str
    work: str
    rule: str
    contender: str
    reference: str
    unit: str
    value: float
    low: float
    high: float
    bar: float | None = None
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What makes it the same row in two runs."""
        return self.section, self.work, self.rule, self.contender, self.reference

    @property
    def is_exact(self) -> bool:
        """Whether it has no noise."""
        return self.low == self.high

    @property
    def is_met(self) -> bool:
        """Whether it keeps to its bar."""
        if self.bar is None:
            return True
        if self.unit == "ratio" and not self.is_exact:
            return self.high <= self.bar + ALLOWANCE
        return self.high <= self.bar + 1e-9


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line of a plot, by the name of the plot and its own label."""

    plot: str
    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Part:
    """What one section found."""

    rows: Sequence[Row]
    curves: Sequence[Curve] = ()


@dataclasses.dataclass(frozen=True)
class Run:
    """What was found at one time on one machine."""

    date: str
    number: int
    device: str
    machine: dict[str, Any]
    rows: Sequence[Row]
    curves: Sequence[Curve]

    @property
    def name(self) -> str:
        """Date and number of that day."""
        return f"{self.date}-{self.number}"


def row(
    section: str,
    work: str,
    rule: str,
    contender: str,
    reference: str,
    unit: str,
    figure: Figure,
    bar: float | None = None,
    note: str = "",
) -> Row:
    """Return a row with a figure that was timed."""
    value, low, high = figure
    return Row(
        section, work, rule, contender, reference, unit, value, low, high, bar, note
    )


def exact(
    section: str,
    work: str,
    rule: str,
    contender: str,
    reference: str,
    unit: str,
    value: float,
    bar: float | None = None,
    note: str = "",
) -> Row:
    """Return a row with a figure that was counted."""
    figure = Figure(value, value, value)
    return row(section, work, rule, contender, reference, unit, figure, bar, note)


def described_machine(device: str) -> dict[str, Any]:
    """Return what a figure depends on: processor, cores, versions."""
    machine = {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def store(device: str, parts: Iterable[Part], folder: Path) -> Run:
    """Write what was found to a file of its own, and return it."""
    parts = list(parts)
    date = datetime.date.today().isoformat()
    taken = [run.number for run in load(folder) if run.date == date]
    run = Run(
        date,
        max(taken, default=0) + 1,
        device,
        described_machine(device),
        [row for part in parts for row in part.rows],
        [curve for part in parts for curve in part.curves],
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{run.name}.json"
    path.write_text(_lines(run), encoding="utf-8")
    return run


def _lines(run: Run) -> str:
    """Return JSON with one line per record, so that runs can be compared as text."""
    head = {"date": run.date, "number": run.number, "device": run.device}
    head["machine"] = run.machine
    parts = [json.dumps(head, indent=1)[:-2]]
    for name in ("rows", "curves"):
        records = [_shortened(dataclasses.asdict(r)) for r in getattr(run, name)]
        lines = ",\n".join(f"  {json.dumps(record)}" for record in records)
        parts.append(f' "{name}": [\n{lines}\n ]')
    return ",\n".join(parts) + "\n}\n"


def _shortened(value: Any) -> Any:
    """Return a record with five digits a figure: the sixth is noise."""
    match value:
        case float():
            return float(f"{value:.5g}") if abs(value) < 1e5 else round(value)
        case dict():
            return {name: _shortened(each) for name, each in value.items()}
        case list() | tuple():
            return [_shortened(each) for each in value]
        case _:
            return value


def load(folder: Path) -> list[Run]:
    """Return all runs that were stored, the oldest first."""
    found = [_read(path) for path in folder.glob("*.json")]
    return sorted(found, key=lambda run: (run.date, run.number))


def _read(path: Path) -> Run:
    record = json.loads(path.read_text(encoding="utf-8"))
    record["rows"] = [Row(**one) for one in record["rows"]]
    record["curves"] = [Curve(**one) for one in record["curves"]]
    return Run(**record)


@dataclasses.dataclass(frozen=True)
class History:
    """A row as it was measured last, and its values in all runs."""

    row: Row
    values: Sequence[float]

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest value of all runs."""
        return min(self.values), max(self.values)


def histories(runs: Sequence[Run]) -> list[History]:
    """Return every row that any run has, as the last that has it shows it."""
    values: dict[tuple[str, ...], list[float]] = {}
    last: dict[tuple[str, ...], Row] = {}
    for run in runs:
        for one in run.rows:
            values.setdefault(one.key, []).append(one.value)
            last[one.key] = one
    return [History(one, values[key]) for key, one in last.items()]
