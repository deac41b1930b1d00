"""What ``external`` adds to a call of the C kernel of ``examples/c_kernel.py``.

    python -m tests.benchmarks.external

Each round calls the kernel through ctypes alone and through the external, turn about,
and notes the difference; printed is the median of the differences in microseconds, with
a 95% interval of that median by bootstrap. Beside it, for forward and backward: the
same two kernels in a hand-written ``autograd.Function``.
"""

from __future__ import annotations

import argparse
import runpy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gradtools as gt

EXAMPLE = Path(__file__).parents[2] / "examples" / "c_kernel.py"
LIMIT = 30.0  # microseconds that a call may cost


def main(rounds: int = 2000, sizes: tuple[int, ...] = (10, 1_000_000)) -> dict:
    names = runpy.run_path(str(EXAMPLE))
    library, parabola = names["library"], names["parabola"]

    def by_ctypes(x):
        out = torch.empty_like(x)
        library.forward(out.data_ptr(), x.data_ptr(), 0.5, 1.0, x.numel())
        return out

    class ByHand(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return by_ctypes(x)

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            (x,) = ctx.saved_tensors
            g = g.contiguous()  # that of a sum has one number, and strides of zero
            out = torch.empty_like(x)
            library.backward(out.data_ptr(), x.data_ptr(), g.data_ptr(), 0.5, x.numel())
            return out

    def by_rule(x):
        return parabola(x, 0.5, 1.0)

    def step(function, x, g):
        return lambda: torch.autograd.grad(function(x), x, g)

    found = {}
    for size in sizes:
        x = torch.randn(size)
        leaf, g = x.clone().requires_grad_(), torch.ones(size)
        pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "forward": (lambda x=x: by_ctypes(x), lambda x=x: by_rule(x)),
            "forward and backward, over a Function by hand": (
                step(ByHand.apply, leaf, g),
                step(by_rule, leaf, g),
            ),
            "forward, gradient wanted": (
                lambda x=x: by_ctypes(x),
                lambda leaf=leaf: by_rule(leaf),
            ),
        }
        for what, (bare, ours) in pairs.items():
            found[what, size] = _difference(bare, ours, rounds)
            middle, low, high, alone = found[what, size]
            print(
                f"{size:>9,} {what:<46} {middle:6.1f} us more a call "
                f"({low:.1f} to {high:.1f}), of {alone:.1f} us alone"
            )
    worst = max(value[0] for key, value in found.items() if key[0] == "forward")
    print(f"bar: {LIMIT:.0f} us a call; forward takes {worst:.1f}")
    return found


def _difference(
    bare: Callable[[], Any], ours: Callable[[], Any], rounds: int
) -> tuple[float, float, float, float]:
    for _ in range(20):
        bare(), ours()  # checks, learned code, memory
    times = np.array([_timed(bare, ours, turn) for turn in range(rounds)]) * 1e6
    gaps = times[:, 1] - times[:, 0]
    draws = np.random.default_rng(0).choice(gaps, (200, rounds))
    low, high = np.quantile(np.median(draws, 1), [0.025, 0.975])
    return statistics.median(gaps), low, high, statistics.median(times[:, 0])


def _timed(bare: Callable[[], Any], ours: Callable[[], Any], turn: int) -> list[float]:
    """Return the times of one call each, in seconds; who is first takes turns."""
    found = [0.0, 0.0]
    for which in (0, 1) if turn % 2 else (1, 0):
        start = time.perf_counter()
        out = (bare, ours)[which]()
        found[which] = time.perf_counter() - start
        del out
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2000)
    torch.set_num_threads(1)
    with gt.gradcheck_policy("first"):
        main(parser.parse_args().rounds)
