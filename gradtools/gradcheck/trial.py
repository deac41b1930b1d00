"""A rule and its function side by side, at one probe, for a few cotangents."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradtools.gradcheck import numeric
from gradtools.gradcheck.autodiff import pullback
from gradtools.gradcheck.numeric import Comparison, Slope, dense
from gradtools.gradcheck.probes import Probe, scale_of
from gradtools.gradcheck.subject import Run, Subject, floats
from gradtools.rules.rule import Contract, Exact

__all__ = ["Tolerance", "Trial", "filled"]

Tensors = Sequence[torch.Tensor]
Optional = Sequence[torch.Tensor | None]


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """What may differ: little, plus what the reference itself may be wrong by.

    Attributes:
        along: Relative, along a direction.
        relative: Relative, element by element.
        floor: Element by element, relative to the largest element.
        wide_relative: What the contract allows beyond.
        wide_absolute: Likewise, absolute.
    """

    along: float
    relative: float
    floor: float
    wide_relative: float = 0.0
    wide_absolute: float = 0.0

    @classmethod
    def of(cls, contract: Contract, values: Sequence[Any]) -> Tolerance:
        """Return the tolerance for numbers of the coarsest dtype among the values."""
        epsilons = [torch.finfo(v.dtype).eps for v in values if floats(v)]
        root = max(epsilons, default=0.0) ** 0.5
        own = cls(max(1e-5, 10 * root), max(1e-6, 3 * root), max(1e-9, 0.3 * root))
        if not isinstance(contract, Exact):
            return own
        wide = contract.rtol or 0.0, contract.atol or 0.0
        return dataclasses.replace(own, wide_relative=wide[0], wide_absolute=wide[1])

    def admits(self, item: Comparison) -> bool:
        """Whether a derivative along a direction is right."""
        return item.error <= self.of_direction(item)

    def of_direction(self, item: Comparison) -> float:
        """Return the relative error that is allowed along a direction."""
        wide = self.wide_relative + self.wide_absolute / (item.scale or 1.0)
        return self.along + 10 * item.precision + wide


@dataclasses.dataclass(frozen=True)
class Trial:
    """What bwd says for some cotangents, and what others say.

    Attributes:
        subject: The rule under examination.
        run: Of fwd.
        cotangents: Some sets of cotangents, each with one per floating output.
        values: For each of them what bwd returned, per leaf.
        tolerance: What may differ.
        factor: The probe is the original one times this.
    """

    subject: Subject
    run: Run
    cotangents: Sequence[Tensors]
    values: Sequence[Optional]
    tolerance: Tolerance
    factor: float = 1.0

    @classmethod
    def at(cls, subject: Subject, probe: Probe, count: int, factor: float = 1) -> Trial:
        """Run fwd at a probe, and bwd for a number of random cotangents."""
        return cls.of(subject, subject.fwd(probe), count, factor=factor)

    @classmethod
    def of(
        cls,
        subject: Subject,
        run: Run,
        count: int,
        cotangents: Sequence[Tensors] = (),
        values: Sequence[Optional] = (),
        factor: float = 1.0,
    ) -> Trial:
        """Run bwd for some more random cotangents."""
        drawn = [
            [numeric.signs(out, subject.generator) for out in run.outs if floats(out)]
            for _ in range(count)
        ]
        said = [subject.bwd(run, given) for given in drawn]
        tolerance = Tolerance.of(subject.rule.contract, (*run.outs, *run.probe.leaves))
        every = (*cotangents, *drawn), (*values, *said)
        return cls(subject, run, *every, tolerance, factor)

    @property
    def probe(self) -> Probe:
        """Where the rule was run."""
        return self.run.probe

    @functools.cached_property
    def outs(self) -> Tensors:
        """The outputs that have a derivative."""
        return [out for out in self.run.outs if floats(out)]

    def fun(self, leaves: Sequence[Any]) -> Tensors:
        """Return the floating outputs of the function itself."""
        outs = self.subject.fun(self.probe, leaves)
        return [out for out in outs if floats(out)]

    @functools.cached_property
    def by_autograd(self) -> Callable[[Optional], Optional] | None:
        """The vjp of the function by autograd, where torch sees into it."""
        return pullback(self.fun, self.probe.leaves, self.probe.places)

    @functools.cached_property
    def reference(self) -> Sequence[Optional] | None:
        """For each set of cotangents what autograd says of the function, per leaf."""
        if self.by_autograd is None:
            return None
        try:
            found = [self.by_autograd(given) for given in self.cotangents]
        except Exception:  # an operation without a derivative
            return None
        self.subject.evaluations += len(found)
        return found

    def mismatch(self, place: int) -> list[torch.Tensor] | None:
        """Return where bwd and autograd differ, per set of cotangents; None: nowhere.

        What autograd cannot tell (NaN) is no mismatch.
        """
        assert self.reference is not None
        masks = [
            self._differ(place, given, said[place], right[place])
            for given, said, right in zip(
                self.cotangents, self.values, self.reference, strict=True
            )
        ]
        return masks if any(bool(mask.any()) for mask in masks) else None

    def _differ(
        self,
        place: int,
        given: Tensors,
        said: torch.Tensor | None,
        right: torch.Tensor | None,
    ) -> torch.Tensor:
        leaf, tolerance = self.probe.leaves[place], self.tolerance
        said, right = filled(said, leaf), filled(right, leaf)
        gap, size = (said - right).abs(), right.abs()
        known = torch.isfinite(right)
        if not bool(known.any()):
            return torch.zeros_like(known)
        largest = float(size[known].max())
        # Far out much is tiny; what is found there has to be confirmed.
        is_far = self.factor != 1
        floor = tolerance.floor * (0.01 if is_far else 1)
        least = max(floor * largest, self.least(place, given, is_far=is_far))
        allowed = tolerance.relative * size + least
        if tolerance.wide_relative or tolerance.wide_absolute:
            mean = float(size[known].square().mean().sqrt())
            allowed = allowed + tolerance.wide_absolute
            allowed = allowed + tolerance.wide_relative * size.clamp(min=mean)
        return known & ~(gap <= allowed)

    def least(self, place: int, given: Tensors, *, is_far: bool = False) -> float:
        """Return the size of a cotangent's element that is nothing, next to fun.

        Args:
            place: The argument.
            given: The cotangents of the outputs.
            is_far: Rounding alone is nothing.
        """
        parts = (
            numeric.products(c, o).square().sum()
            for c, o in zip(given, self.outs, strict=True)
        )
        leaf = self.probe.leaves[place]
        size = float(sum(parts)) ** 0.5
        natural = size / (max(leaf.numel(), 1) ** 0.5 * scale_of(leaf))
        epsilon = max(torch.finfo(t.dtype).eps for t in (leaf, *self.outs))
        rounding = min(500 * epsilon, numeric.FLAT)
        part = rounding if is_far else max(10 * epsilon, numeric.FLAT)
        return part * natural if natural < float("inf") else 0.0

    def slope(self, places: Sequence[int], **how: Any) -> Slope:
        """Return the slope of the function along a random direction."""
        moves = numeric.direction(
            self.probe, places, self.subject.generator, self.values, **how
        )
        return self.slope_along(moves)

    def slope_along(self, moves: numeric.Moves, *, finely: bool = False) -> Slope:
        """Return the slope of the function along a direction."""
        tensors = (*self.outs, *moves.values())
        return numeric.slope(
            self.fun,
            self.probe,
            moves,
            [tensor.dtype for tensor in tensors],
            closely=self.reference is None,
            finely=finely,
        )

    def compared(self, found: Slope) -> list[Comparison]:
        """Compare bwd with a slope, for every set of cotangents."""
        return [
            numeric.compare(found, self.outs, given, said)
            for given, said in zip(self.cotangents, self.values, strict=True)
        ]


def filled(value: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Return a cotangent as a tensor, zeros for None."""
    return torch.zeros_like(like) if value is None else dense(value)
