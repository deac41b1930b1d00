"""Time of a call: plain autograd, no gradient at all, and vmap.

Whoever gradtools is compared with runs in the same turns, see ``timing``; the other
spellings run along and are shown without a bar.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tests.benchmarks import ledger, timing
from tests.benchmarks.ledger import Curve, Part, Row
from tests.benchmarks.rivals import CONTESTS, TINY, Contest
from tests.benchmarks.rivals.contest import (
    COMBINED,
    COMPOSABLE,
    COMPOSITE,
    CUSTOM_OP,
    GENERATED,
    GRADTOOLS,
    OWN_VMAP,
    TRANSFORMS,
)

LARGE = 10**6
MOST_OVER_COMBINED = 1.05
MOST_OVER_COMPOSABLE = 0.75
MOST_OVER_GENERATED = 0.75
MOST_WITHOUT_GRADIENT = 2.0  # microseconds more than the function itself

FUN = "the function itself"
SAMPLE, BATCH = 8, 32  # numbers in a sample of a vmap, and samples
EAGER = (GRADTOOLS, COMBINED, COMPOSABLE, GENERATED, CUSTOM_OP, COMPOSITE)
VMAPPED = (GRADTOOLS, GENERATED, OWN_VMAP, COMPOSITE)


@dataclasses.dataclass(frozen=True)
class Effort:
    """On what, and how thoroughly, it is measured."""

    device: str = "cpu"
    rounds: int = 200
    rounds_large: int = 80
    rounds_of_a_point: int = 40
    largest: int = 7  # power of ten

    @classmethod
    def quick(cls, device: str) -> Effort:
        """Return an effort that shows no more than that everything runs."""
        return cls(device, 15, 3, 5, 5)

    def race(self, rounds: int) -> timing.Race:
        """Return a race of so many rounds."""
        return timing.Race(rounds, clock=timing.stopwatch(self.device))

    def race_of_processors(self, rounds: int) -> timing.Race:
        """Return one that does not see what else the machine does."""
        race = self.race(rounds)
        return (
            race if self.device == "cuda" else race._replace(clock=timing.by_processor)
        )


def measure(effort: Effort) -> Part:
    """Measure plain reverse mode."""
    rows = [
        *forward_and_backward("tiny", TINY, effort, effort.rounds),
        *forward_and_backward("a million", LARGE, effort, effort.rounds_large),
        *forward_alone(effort),
        *general_way(effort),
    ]
    return Part(rows, against_size(effort))


def measure_vmap(effort: Effort) -> Part:
    """Measure vmap and its compositions with grad."""
    rows = [row for work in TRANSFORMS for row in vectorized(work, effort)]
    return Part(rows, against_batch(effort))


# Rows.


def compared(
    section: str,
    work: str,
    found: Mapping[str, timing.Rounds],
    contender: str,
    reference: str,
    bar: float | None = None,
) -> list[Row]:
    """Return the ratio of two contenders by rule, and the mean, with the bar."""
    ratios = {
        rule: rounds.ratios(contender, reference) for rule, rounds in found.items()
    }
    names = section, work
    rows = [
        ledger.row(*names, rule, contender, reference, "ratio", timing.median(values))
        for rule, values in ratios.items()
    ]
    mean = timing.geometric_mean(list(ratios.values()))
    return [
        *rows,
        ledger.row(*names, ledger.MEAN, contender, reference, "ratio", mean, bar),
    ]


def each_time(
    section: str, work: str, found: Mapping[str, timing.Rounds], contender: str
) -> list[Row]:
    """Return the time of a contender for each rule."""
    return [
        ledger.row(section, work, rule, contender, "", "us", rounds.time(contender))
        for rule, rounds in found.items()
    ]


def forward_and_backward(
    size_name: str, size: int, effort: Effort, rounds: int
) -> list[Row]:
    """Compare all spellings in a step."""
    found = effort.race(rounds).run_rules(
        {
            name: steps(contest, size, effort.device, EAGER)
            for name, contest in CONTESTS.items()
        }
    )
    work = f"forward + backward, {size_name}"
    bars = {COMBINED: MOST_OVER_COMBINED, COMPOSABLE: MOST_OVER_COMPOSABLE}
    rows = [
        row
        for reference, bar in bars.items()
        # On large tensors the arithmetic is most of it: only equality can be asked.
        for row in compared(
            "speed",
            work,
            found,
            GRADTOOLS,
            reference,
            bar if size == TINY or reference == COMBINED else None,
        )
    ]
    for other in EAGER:
        if other not in {GRADTOOLS, COMBINED}:
            rows += compared("speed", work, found, other, COMBINED)
    for spelling in EAGER:
        rows += each_time("speed", work, found, spelling)
    return rows


def steps(
    contest: Contest, size: int, device: str, names: Sequence[str]
) -> dict[str, timing.Run]:
    """Return forward and backward of some spellings."""
    args = contest.arguments(size, device=device)
    return {name: contest.step(contest.spellings[name], args) for name in names}


def called(function: Callable[..., Any], args: Sequence[Any]) -> timing.Run:
    """Return a call."""
    if len(args) == 1:
        (x,) = args
        return lambda: function(x)
    return lambda: function(*args)


def without_gradient(function: Callable[..., Any], args: Sequence[Any]) -> timing.Run:
    """Return a call under no_grad, which is part of what is timed."""

    def run() -> Any:
        with torch.no_grad():
            return function(*args)

    return run


def forward_alone(effort: Effort) -> list[Row]:
    """Compare calls without a backward with the function itself."""
    active: dict[str, dict[str, timing.Run]] = {}
    no_grad: dict[str, dict[str, timing.Run]] = {}
    passive: dict[str, dict[str, timing.Run]] = {}
    for name, contest in CONTESTS.items():
        args = contest.arguments(TINY, device=effort.device)
        wanted = contest.active(args)
        functions = {
            GRADTOOLS: contest.spellings[GRADTOOLS],
            COMBINED: contest.spellings[COMBINED],
            FUN: contest.fun,
        }
        active[name] = {who: called(f, wanted) for who, f in functions.items()}
        no_grad[name] = {
            who: without_gradient(f, wanted) for who, f in functions.items()
        }
        passive[name] = {who: called(f, args) for who, f in functions.items()}
    race = effort.race(effort.rounds).run_rules
    with_graph = race(active)
    rows = compared("speed", "forward alone, tiny", with_graph, GRADTOOLS, COMBINED)
    for work, found, bar in (
        ("forward alone, tiny", with_graph, None),
        ("under no_grad, tiny", race(no_grad), MOST_WITHOUT_GRADIENT),
        ("nothing requires a gradient, tiny", race(passive), None),
    ):
        for contender in (GRADTOOLS, COMBINED):
            rows += [
                ledger.row(
                    "speed",
                    work,
                    name,
                    contender,
                    FUN,
                    "us",
                    rounds.over(contender, FUN),
                    bar if contender == GRADTOOLS else None,
                )
                for name, rounds in found.items()
            ]
    return rows


def general_way(effort: Effort) -> list[Row]:
    """Compare a step under autocast, which no code is written for."""
    runs = {
        name: steps(contest, TINY, effort.device, (GRADTOOLS, COMBINED))
        for name, contest in CONTESTS.items()
    }
    with torch.autocast(effort.device, torch.bfloat16):
        found = effort.race(effort.rounds).run_rules(runs)
    work = "the general way: a step under autocast, tiny"
    return [
        *compared("speed", work, found, GRADTOOLS, COMBINED),
        *each_time("speed", work, found, GRADTOOLS),
        *each_time("speed", work, found, COMBINED),
    ]


def batched(
    contest: Contest, work: str, batch: int, device: str, names: Sequence[str]
) -> dict[str, timing.Run]:
    """Return some spellings under transforms, over a batch."""
    args = contest.arguments(SAMPLE, device=device, batch=batch)
    return {
        name: called(contest.transformed(work, contest.spellings[name], args), args)
        for name in names
    }


def vectorized(work: str, effort: Effort) -> list[Row]:
    """Compare the spellings that vmap accepts."""
    found = effort.race(effort.rounds).run_rules(
        {
            name: batched(contest, work, BATCH, effort.device, VMAPPED)
            for name, contest in CONTESTS.items()
        }
    )
    rows = compared("vmap", work, found, GRADTOOLS, GENERATED, MOST_OVER_GENERATED)
    for other in (OWN_VMAP, COMPOSITE):
        rows += compared("vmap", work, found, GRADTOOLS, other)
    for spelling in VMAPPED:
        rows += each_time("vmap", work, found, spelling)
    return rows


# Curves.


def curves(
    plot: str, points: Mapping[int, timing.Rounds], names: Sequence[str], reference: str
) -> list[Curve]:
    """Return the ratio of each to a reference, against what points are named by."""
    return [
        Curve(
            plot,
            name,
            list(points),
            [rounds.ratio(name, reference).value for rounds in points.values()],
        )
        for name in names
    ]


def against_size(effort: Effort) -> list[Curve]:
    """Compare a step of the swish from one number to ten million."""
    names = (GRADTOOLS, COMPOSABLE, CUSTOM_OP, COMPOSITE)
    points = {}
    for power in range(effort.largest + 1):
        rounds = effort.rounds_of_a_point if power < 6 else effort.rounds_large // 5
        runs = steps(CONTESTS["swish"], 10**power, effort.device, (*names, COMBINED))
        points[10**power] = effort.race(max(3, rounds)).run(runs)
    return curves("size", points, names, COMBINED)


def against_batch(effort: Effort) -> list[Curve]:
    """Compare transforms of the swish for several sizes of the batch."""
    contest, names = CONTESTS["swish"], (GRADTOOLS, OWN_VMAP, COMPOSITE)
    found = []
    for work in TRANSFORMS:
        points = {
            batch: effort.race(effort.rounds_of_a_point).run(
                batched(contest, work, batch, effort.device, (*names, GENERATED))
            )
            for batch in (1, 8, 64, 512, 4096, 32768)
        }
        found += curves(work, points, names, GENERATED)
    return found
