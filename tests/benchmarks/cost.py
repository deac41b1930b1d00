"""What the check of a first call costs, in time and in memory.

``python -m tests.benchmarks.cost [--op NAME] [--most 7] [--repeats 3] [--huge]``

For six operators in float32, from a hundred numbers to ten million: the time of one
fwd and bwd by hand, called directly, beside that of the check, whose report also says
how often functions of the rule ran. Memory is the peak of a process that makes a first
call and its backward, less that of one in which checks are off. ``--huge`` adds two
gigabytes of bfloat16. The bars stand next to the figures; nothing here fails.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

import gradtools as gt
from tests.benchmarks.false_alarms import (
    GALLERY,
    Entry,
    activated,
    first_call,
    normal,
    rule_of,
    seconds_by_hand,
)

MOST_PAIRS = 40  # of fwd and bwd
SMALL, MOST_SECONDS = 10**4, 0.1
HUGE = 2**30


def cube(x):
    """Cube in numpy, which autograd cannot see into."""
    return torch.as_tensor(x.detach().numpy() ** 3, dtype=x.dtype)


def cube_fwd(x):
    return cube(x), x


def cube_bwd(x, g):
    return g * 3 * x * x


OPERATORS: dict[str, Entry] = {
    **{
        name: GALLERY[name]
        for name in ("swish", "layer_norm", "linear", "cross_entropy", "tanh")
    },
    "numpy cube": Entry(cube, cube_fwd, cube_bwd, lambda size: (normal(size),)),
}


class Row(NamedTuple):
    """One operator on one size."""

    name: str
    size: int
    by_hand: float
    check: float
    evaluations: int
    outcome: str

    @property
    def ratio(self) -> float:
        """How many fwd and bwd the check takes."""
        return self.check / self.by_hand


def measure(name: str, size: int, repeats: int) -> Row:
    """Measure both in turns, since the machine is not equally fast all the time."""
    entry = OPERATORS[name]
    args = entry.args(size)
    by_hand, checks = [], []
    for _ in range(repeats):
        by_hand.append(seconds_by_hand(entry.fwd, entry.bwd, args))
        checks.append(checked(entry, args))
        by_hand.append(seconds_by_hand(entry.fwd, entry.bwd, args))
    return Row(
        name,
        size,
        statistics.median(by_hand),
        statistics.median(seconds for seconds, _, _ in checks),
        max(evaluations for _, evaluations, _ in checks),
        checks[0][2],
    )


def checked(entry: Entry, args: tuple[Any, ...]) -> tuple[float, int, str]:
    """Return seconds, evaluations and outcome of a check by a first call."""
    rule = rule_of(entry.fun, entry.fwd, entry.bwd)
    outcome, _, reports = first_call(rule, activated(args), {})
    return reports[0].seconds, reports[0].evaluations, outcome


# Memory: a process for each figure.


def peak_of(name: str, size: int, policy: str) -> float:
    """Return the peak of a child that makes a first call, in bytes."""
    command = [sys.executable, "-m", "tests.benchmarks.cost"]
    command += ["--child", name, str(size), policy]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # One that was killed for its memory has no figure.
    return float(done.stdout.split()[-1]) if done.returncode == 0 else float("nan")


def child(name: str, size: int, policy: Any) -> None:
    """Make a first call and its backward, and print the peak of this process."""
    entry = OPERATORS.get(name) or GALLERY[name.removeprefix("huge ")]
    args = huge_args(size) if name.startswith("huge ") else entry.args(size)
    rule = rule_of(entry.fun, entry.fwd, entry.bwd)
    with gt.gradcheck_policy(policy):
        out = rule(*activated(args))
        torch.autograd.backward(out, torch.ones_like(out))
    # Not ru_maxrss: on Linux a child begins with the peak of its parent.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    print(int(status.partition("VmHWM:")[2].split()[0]) * 1024)


def extra_memory(name: str, size: int) -> str:
    """Return in words by how much a check raises the peak."""
    off, on = peak_of(name, size, "off"), peak_of(name, size, "first")
    return f"{on / 2**20:8.0f} MiB, without check {off / 2**20:6.0f} MiB, extra " + (
        f"{(on - off) / 2**20:6.0f} MiB"
    )


def huge_args(size: int) -> tuple[Any, ...]:
    """Return many numbers in bfloat16, drawn in parts since randn takes float32."""
    x = torch.empty(size, dtype=torch.bfloat16)
    part = normal(min(size, 2**20)).to(x.dtype)
    for begin in range(0, size, len(part)):
        x[begin : begin + len(part)] = part[: size - begin]
    return (x,)


# What is printed.


def print_cold() -> None:
    """Print what the very first check of a process takes."""
    entry = OPERATORS["swish"]
    seconds, _, outcome = checked(entry, entry.args(100))
    print(f"first check of the process, swish of 100: {seconds:.3f} s ({outcome})\n")


def print_row(row: Row) -> None:
    """Print a line, with a mark where a figure is over its bar."""
    is_slow = row.size <= SMALL and row.check > MOST_SECONDS
    # One fwd and bwd are two evaluations.
    is_much = row.evaluations > 2 * MOST_PAIRS
    print(
        f"{row.name:<15}{row.size:>12,}{row.by_hand * 1e3:>12.3f} ms"
        f"{row.check:>9.3f} s{' !' if is_slow else '  '}"
        f"{row.evaluations:>7}{' !' if is_much else '  '}{row.ratio:>11.0f}"
        f"   {row.outcome}",
        flush=True,
    )


def print_times(names: list[str], sizes: list[int], repeats: int) -> list[Row]:
    """Measure and print the table."""
    print(
        f"{'operator':<15}{'numbers':>12}{'fwd+bwd':>15}{'check':>11}{'runs':>9}"
        f"{'check/fwd+bwd':>15}"
    )
    rows = []
    for name in names:
        for size in sizes:
            rows.append(measure(name, size, repeats))
            print_row(rows[-1])
    return rows


def print_bars(rows: list[Row]) -> None:
    """Print the bars, and how the figures stand to them."""
    most = max(row.evaluations for row in rows)
    print(
        f"\nruns of fun, fwd and bwd: at most {most}; "
        f"bar {MOST_PAIRS} fwd+bwd, which are {2 * MOST_PAIRS} runs"
    )
    largest = max(row.ratio for row in rows)
    print(f"in time, a check takes as long as {largest:.0f} fwd+bwd at most")
    small = [row.check for row in rows if row.size <= SMALL]
    if small:
        print(
            f"check up to {SMALL:,} numbers: at most {max(small):.3f} s; "
            f"bar {MOST_SECONDS} s"
        )
    for name in dict.fromkeys(row.name for row in rows):
        counts = [row.evaluations for row in rows if row.name == name]
        is_constant = "constant" if len(set(counts)) == 1 else f"vary: {counts}"
        print(f"runs over the sizes, {name}: {is_constant}")


def print_memory(names: list[str], size: int) -> None:
    """Measure and print peaks."""
    print(f"\npeak memory of a process, {size:,} numbers ({4 * size / 2**20:.0f} MiB)")
    for name in names:
        print(f"{name:<15}{extra_memory(name, size)}", flush=True)


def print_huge() -> None:
    """Measure and print two gigabytes in bfloat16."""
    entry, args = GALLERY["tanh"], huge_args(HUGE)
    by_hand = seconds_by_hand(entry.fwd, entry.bwd, args, times=1)
    row = Row("bfloat16 tanh", HUGE, by_hand, *checked(entry, args))
    print("\nbfloat16 input of 2 GB, elementwise")
    print_row(row)
    del args
    print(f"{row.name:<15}{extra_memory('huge tanh', HUGE)}")


def main() -> None:
    """Run the benchmark as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--op", choices=list(OPERATORS))
    parser.add_argument("--most", type=int, default=7, help="power of ten of numbers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--huge", action="store_true", help="2 GB of bfloat16 too")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        name, size, policy = options.child
        child(name, int(size), policy)
        return
    print(f"torch {torch.__version__}, {datetime.date.today()}, one thread")
    print_cold()
    names = [options.op] if options.op else list(OPERATORS)
    sizes = [10**power for power in range(2, options.most + 1)]
    print_bars(print_times(names, sizes, options.repeats))
    print_memory(names, sizes[-1])
    if options.huge:
        print_huge()


if __name__ == "__main__":
    main()
