"""The check of a first call beside the work of the operator; in full, see ``cost``."""

from __future__ import annotations

from tests.benchmarks import cost, ledger
from tests.benchmarks.ledger import Curve, Part

OPERATORS = ("swish", "layer_norm", "linear", "cross_entropy", "numpy cube")
BY_HAND = "one fwd + bwd"


def measure(most: int = 6, repeats: int = 3) -> Part:
    """Measure sizes up to a power of ten."""
    rows, curves = [], []
    for name in OPERATORS:
        found = [cost.measure(name, 10**power, repeats) for power in range(2, most + 1)]
        sizes = [one.size for one in found]
        curves += [
            Curve("check", name, sizes, [one.check for one in found]),
            Curve("check", f"{name}, {BY_HAND}", sizes, [one.by_hand for one in found]),
        ]
        small = [one for one in found if one.size <= cost.SMALL]
        rows += [
            ledger.exact(
                "check",
                "evaluations, in pairs of fwd and bwd",
                name,
                "gradtools",
                BY_HAND,
                "count",
                max(one.evaluations for one in found) / 2,
                cost.MOST_PAIRS,
            ),
            ledger.exact(
                "check",
                f"time up to {cost.SMALL:,} numbers",
                name,
                "gradtools",
                "",
                "s",
                max(one.check for one in small),
                cost.MOST_SECONDS,
            ),
            ledger.exact(
                "check",
                f"time with {found[-1].size:,} numbers",
                name,
                "gradtools",
                BY_HAND,
                "ratio",
                found[-1].ratio,
            ),
        ]
    return Part(rows, curves)
