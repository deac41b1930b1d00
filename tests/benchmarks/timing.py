"""How contenders are timed: in turns, so that a slow moment of the machine hits all.

In each of many rounds every contender runs a block of calls, in an order that is drawn
anew. What counts are the ratios within a round: their median, with a 95% interval by
bootstrap over the rounds.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

Run = Callable[[], Any]
# Runs something a number of times and returns the seconds of all of them together.
Stopwatch = Callable[[Run, int], float]

RESAMPLES = 2000
WARM_UP, TRIES = 10, 3


class Figure(NamedTuple):
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


def on_cpu(run: Run, calls: int) -> float:
    """Time by the clock on the wall."""
    begin = time.perf_counter_ns()
    for _ in itertools.repeat(None, calls):
        run()
    return (time.perf_counter_ns() - begin) * 1e-9


def by_processor(run: Run, calls: int) -> float:
    """Time by what this thread has had of a processor.

    On a machine that others use as well the clock on the wall says who had their turn.
    All work must be done in this thread: with one thread of torch's it is.
    """
    begin = time.thread_time_ns()
    for _ in itertools.repeat(None, calls):
        run()
    return (time.thread_time_ns() - begin) * 1e-9


def on_cuda(run: Run, calls: int) -> float:
    """Time by events in the stream: what the device waits for is counted too."""
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in itertools.repeat(None, calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def stopwatch(device: str) -> Stopwatch:
    """Return what times work on a device."""
    return on_cuda if device == "cuda" else on_cpu


class Race(NamedTuple):
    """How long, and by which clock, contenders are measured.

    Attributes:
        rounds: How often each has its turn.
        block: Seconds that one turn lasts, or one call if that takes longer.
        clock: What times a block.
        seed: Of the order of the turns.
        warm_up: How often each is called before the clock starts.
    """

    rounds: int
    block: float = 2e-3
    clock: Stopwatch = on_cpu
    seed: int = 0
    warm_up: int = WARM_UP

    def run(self, contenders: Mapping[Any, Run]) -> Rounds:
        """Return the seconds of a call, for each contender and round."""
        for run in contenders.values():
            for _ in range(self.warm_up):  # first calls compile, check, fill caches
                run()
        calls = {
            name: self.calls_of_block(run, self.block)
            for name, run in contenders.items()
        }
        found = {name: np.empty(self.rounds) for name in contenders}
        order = np.random.default_rng(self.seed)
        names = list(contenders)
        with no_collection():
            for number in range(self.rounds):
                for index in order.permutation(len(names)):
                    name = names[index]
                    seconds = self.clock(contenders[name], calls[name])
                    found[name][number] = seconds / calls[name]
                gc.collect(0)
        return Rounds(found)

    def run_rules(
        self, contenders: Mapping[str, Mapping[str, Run]]
    ) -> dict[str, Rounds]:
        """Return the seconds by rule; all rules take turns, as contenders do."""
        flat = {
            (rule, name): run
            for rule, runs in contenders.items()
            for name, run in runs.items()
        }
        found = self.run(flat).seconds
        return {
            rule: Rounds({name: found[rule, name] for name in runs})
            for rule, runs in contenders.items()
        }

    def calls_of_block(self, run: Run, seconds: float) -> int:
        """Return how many calls take that long.

        The faster of several tries counts: a call alone is slower than one of many, and
        a block that is too short for once would be so in all rounds.
        """
        calls = 1
        while (
            taken := min(self.clock(run, calls) for _ in range(TRIES))
        ) < seconds / 2:
            calls *= 2
        return max(1, round(calls * seconds / taken))


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Keep the collector of garbage out of the blocks."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def keep_memory() -> None:
    """Let glibc keep what is freed, as the allocators of accelerators do.

    Otherwise a large tensor is new pages from the system in some rounds and not in
    others, which takes longer than the arithmetic.
    """
    trim_threshold, mmap_max = -1, -4
    mallopt = None
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


class Rounds:
    """Seconds of a call by contender and round."""

    def __init__(self, seconds: Mapping[Any, np.ndarray]) -> None:
        self.seconds = seconds

    def ratios(self, name: str, reference: str) -> np.ndarray:
        """Return how many times as long a contender took, by round."""
        return self.seconds[name] / self.seconds[reference]

    def ratio(self, name: str, reference: str) -> Figure:
        """Return the median of the ratios."""
        return median(self.ratios(name, reference))

    def time(self, name: str) -> Figure:
        """Return the median time of a call, in microseconds."""
        return median(self.seconds[name] * 1e6)

    def over(self, name: str, reference: str) -> Figure:
        """Return by how many microseconds a contender took longer."""
        return median((self.seconds[name] - self.seconds[reference]) * 1e6)


def _resampled_medians(values: np.ndarray, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    picks = draw.integers(0, len(values), (RESAMPLES, len(values)))
    return np.median(values[picks], axis=1)


def median(values: np.ndarray) -> Figure:
    """Return the median over rounds, which are drawn again for its interval."""
    low, high = np.quantile(_resampled_medians(values, 0), (0.025, 0.975))
    return Figure(float(np.median(values)), float(low), float(high))


def geometric_mean(ratios: Sequence[np.ndarray]) -> Figure:
    """Return the geometric mean of the medians of several rules.

    Args:
        ratios: By rule, the ratios of the rounds; they are drawn again within a rule.
    """
    logs = [np.log(_resampled_medians(one, seed)) for seed, one in enumerate(ratios)]
    low, high = np.exp(np.quantile(np.mean(logs, axis=0), (0.025, 0.975)))
    middle = np.exp(np.mean([np.log(np.median(one)) for one in ratios]))
    return Figure(float(middle), float(low), float(high))
