"""A rule under examination: its functions, run on probes and counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from gradtools.gradcheck.probes import Probe
from gradtools.gradcheck.surroundings import Randomness
from gradtools.rules.rule import Rule
from gradtools.trees import Structure

__all__ = ["Run", "Subject", "floats"]

T = TypeVar("T")
Tensors = Sequence[torch.Tensor]
Optional = Sequence[torch.Tensor | None]


@dataclasses.dataclass(frozen=True)
class Run:
    """What fwd returned on a probe.

    Attributes:
        probe: Where.
        outs: The output tensors.
        new: The residuals that are neither argument nor output.
        layout: How the tensors and the rest hang together.
    """

    probe: Probe
    outs: Tensors
    new: Tensors
    layout: Any

    @property
    def kept(self) -> list[torch.Tensor]:
        """The residual tensors."""
        return self.layout.pick(self.probe.leaves, self.outs, self.new)


class Subject:
    """A rule whose functions run with the same random numbers every time.

    Attributes:
        rule: The rule.
        evaluations: How often fun, fwd, bwd or jvp has run.
        generator: Where probes and directions draw from.
        in_double: The functions take double precision.
        draws: They draw random numbers, as far as is known.
        is_settled: All of them have run, so that this is known.
        edited: Leaves without a gradient that fun edits in place.
    """

    def __init__(self, rule: Rule, leaves: Sequence[Any]) -> None:
        self.rule = rule
        self.evaluations = 0
        self.generator = torch.Generator().manual_seed(0)
        self.in_double = False
        self.draws = False
        self.is_settled = False
        self.edited: frozenset[int] = frozenset()
        self.randomness = Randomness(leaves)

    def again(self, function: Callable[[], T]) -> T:
        """Run a function with the random numbers of the first time."""
        self.evaluations += 1
        if self.is_settled and not self.draws:
            return function()
        with self.randomness.rewound():
            result = function()
            if not self.is_settled and not self.draws:
                self.draws = not self.randomness.is_untouched()
        return result

    def fun(self, probe: Probe, leaves: Sequence[Any] | None = None) -> Tensors:
        """Return the outputs of the function itself."""
        signature = probe.plan.signature
        leaves = self.apart(probe.leaves if leaves is None else leaves)
        entries = signature.entries(leaves)
        out = self.again(
            lambda: signature.parameters.call(probe.plan.rule.fun, entries)
        )
        return Structure.split(out)[0]

    def fwd(self, probe: Probe) -> Run:
        """Run fwd."""
        if self.edited:
            probe = Probe(probe.plan, tuple(self.apart(probe.leaves)))
        return Run(probe, *self.again(lambda: probe.plan.forward(probe.leaves)))

    def apart(self, leaves: Sequence[Any]) -> Sequence[Any]:
        """Return the leaves, with copies of those that fun edits."""
        if not self.edited:
            return leaves
        return [x.clone() if i in self.edited else x for i, x in enumerate(leaves)]

    def bwd(self, run: Run, cotangents: Tensors, *, anew: bool = False) -> Optional:
        """Return one cotangent per leaf, given one per floating output.

        Args:
            run: Of fwd.
            cotangents: The outputs'.
            anew: Let it draw other random numbers than before.
        """
        plan = run.probe.plan
        every = [
            given if floats(out) else None
            for out, given in zip(run.outs, spread(run.outs, cotangents), strict=True)
        ]

        def bwd() -> Optional:
            return plan.backward(run.layout, run.kept, every, plan.signature.needs)

        if not anew:
            return self.again(bwd)
        self.evaluations += 1
        with self.randomness.rewound():
            self.randomness.advance()
            return bwd()


def floats(value: Any) -> bool:
    """Whether a value is a tensor that has derivatives."""
    return isinstance(value, torch.Tensor) and (
        value.is_floating_point() or value.is_complex()
    )


def spread(outs: Tensors, cotangents: Tensors) -> list[torch.Tensor | None]:
    """Give every output its cotangent, None to those that have none."""
    rest = iter(cotangents)
    return [next(rest) if floats(out) else None for out in outs]
