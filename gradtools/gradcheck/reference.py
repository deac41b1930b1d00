"""What a cotangent should be, element by element: where a check has failed.

By autograd where the function is torch code; else by differences along single elements,
of a sample of them. That is dear, and is done for the message only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gradtools.gradcheck import numeric, probes
from gradtools.gradcheck.report import Figures
from gradtools.gradcheck.trial import Trial, filled

__all__ = ["Reference", "figures"]

MOST_SAMPLED = 64
FEW_SUSPECTS = 8


class Reference:
    """The cotangent of one argument: as bwd has it, and as it should be.

    Elements are counted along the sample: all of them, or some drawn at random. The
    first dimension of the tensors is that of the trial's cotangents.

    Attributes:
        places: Positions of the sample in the flattened argument.
        source: Where the reference comes from.
        said: What bwd returned.
    """

    def __init__(self, trial: Trial, place: int) -> None:
        self.trial = trial
        self.place = place
        self.leaf = trial.probe.leaves[place]
        self.by_autograd = trial.reference is not None and self._trusts_autograd()
        self.source = "autograd" if self.by_autograd else "differences"
        total = self.leaf.numel()
        self.is_complete = self.by_autograd or total <= MOST_SAMPLED
        self.places = torch.arange(total, device="cpu")
        if not self.is_complete:
            drawn = torch.randperm(
                total, generator=trial.subject.generator, device="cpu"
            )
            some = torch.cat([drawn[:MOST_SAMPLED], self._suspects(total)])
            self.places = some.unique()
        self.said = self.sampled([values[place] for values in trial.values])

    def _suspects(self, total: int) -> torch.Tensor:
        """Return a few neighbours among which is what is most wrong, by bisection."""
        low, high = 0, total
        while high - low > FEW_SUSPECTS:
            middle = (low + high) // 2
            halves = (low, middle), (middle, high)
            low, high = max(halves, key=lambda half: self._gap(*half))
        return torch.arange(low, high, device="cpu")

    def _gap(self, low: int, high: int) -> float:
        """Return how far bwd is from differences along some of the elements."""
        move = torch.zeros_like(self.leaf).flatten()
        signs = numeric.signs(move[low:high], self.trial.subject.generator)
        move[low:high] = signs * probes.scale_of(self.leaf)
        moves = {self.place: move.reshape(self.leaf.shape)}
        items = self.trial.compared(self.trial.slope_along(moves))
        gaps = [abs(item.analytic - item.numeric) for item in items]
        return max(np.inf if np.isnan(gap) else gap for gap in gaps)

    @property
    def count(self) -> int:
        """How many elements are looked at."""
        return len(self.places)

    def sampled(self, values: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Return the sample of tensors in the shape of the argument."""
        tensors = [filled(value, self.leaf).detach().flatten() for value in values]
        return torch.stack([t[self.places.to(t.device)] for t in tensors])

    @functools.cached_property
    def right(self) -> torch.Tensor:
        """What bwd should have returned."""
        return self.of(self.trial.cotangents)

    def of(self, cotangents: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        """Return what bwd should return for some cotangents."""
        if self.by_autograd:
            assert self.trial.by_autograd is not None
            found = [self.trial.by_autograd(given) for given in cotangents]
            return self.sampled([values[self.place] for values in found])
        return torch.stack([self._by_columns(given) for given in cotangents])

    def of_slice(self, number: int, dims: Sequence[int]) -> torch.Tensor:
        """Return what bwd would return if one slice of an output were all of it.

        Args:
            number: The output.
            dims: The dimensions of which index 0 alone counts.
        """
        chosen = []
        for given in self.trial.cotangents:
            part = tuple(
                slice(0, 1) if dim in dims else slice(None)
                for dim in range(given[number].dim())
            )
            only = [torch.zeros_like(g) for g in given]
            only[number][part] = given[number][part]
            chosen.append(only)
        return self.of(chosen)

    @functools.cached_property
    def columns(self) -> list[torch.Tensor]:
        """The derivative of each output along each element of the sample."""
        return self._columns(1.0)

    @functools.cached_property
    def imaginary_columns(self) -> list[torch.Tensor]:
        """The same along the imaginary parts."""
        return self._columns(1j)

    def _columns(self, unit: complex) -> list[torch.Tensor]:
        rows: list[list[torch.Tensor]] = []
        scale = probes.scale_of(self.leaf)
        for place in self.places.tolist():
            move = torch.zeros_like(self.leaf).flatten()
            move[place] = torch.tensor(scale * unit, dtype=move.dtype)
            found = self.trial.slope_along({self.place: move.reshape(self.leaf.shape)})
            rows.append([value.flatten() / scale for value in found.value])
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    def _by_columns(self, given: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the derivative of <given, fun> from those of the outputs."""
        real = _against(given, self.columns)
        if not self.leaf.is_complex():
            return real.to(self.leaf.dtype)
        # the conjugate derivative, as torch has it
        imaginary = _against(given, self.imaginary_columns)
        return torch.complex(real, imaginary).to(self.leaf.dtype)

    @property
    def inputs(self) -> torch.Tensor:
        """The argument itself."""
        return self.sampled([self.leaf])[0]

    def wrong(self) -> torch.Tensor:
        """Return which elements are wrong, for any of the cotangents."""
        gap, size = (self.said - self.right).abs(), self.right.abs()
        loose = 3 if self.by_autograd else 100
        tolerance = self.trial.tolerance
        largest = float(size.max()) if size.numel() else 0.0
        allowed = loose * (tolerance.relative * size + tolerance.floor * largest)
        if not self.by_autograd:
            allowed = allowed + 1e-6 * largest
        wrong = (~(gap <= allowed)).any(0)
        return wrong if bool(wrong.any()) else (gap >= 0.5 * gap.max()).any(0)

    def matters(self) -> torch.Tensor:
        """Return the elements whose cotangent is not next to nothing."""
        size = self.right.abs().amax(0)
        return size > 1e-6 * size.max()

    def worst(self) -> tuple[tuple[int, ...], Any, Any]:
        """Return the index of the worst element, what bwd says there, what is right."""
        gap = torch.nan_to_num((self.said - self.right).abs(), nan=float("inf"))
        row, column = divmod(int(gap.argmax()), self.count)
        said, right = self.said[row, column].item(), self.right[row, column].item()
        return self.index(column), said, right

    def index(self, number: int) -> tuple[int, ...]:
        """Return the index in the argument of an element of the sample."""
        flat = int(self.places[number])
        return tuple(int(i) for i in np.unravel_index(flat, self.leaf.shape))

    def _trusts_autograd(self) -> bool:
        """Whether differences along a direction agree with autograd here."""
        trial = self.trial
        assert trial.reference is not None
        found = trial.slope([self.place])
        items = [
            numeric.compare(found, trial.outs, given, right)
            for given, right in zip(trial.cotangents, trial.reference, strict=True)
        ]
        return all(
            not item.is_conclusive or trial.tolerance.admits(item) for item in items
        )


def _against(
    given: Sequence[torch.Tensor], columns: Sequence[torch.Tensor]
) -> torch.Tensor:
    parts = [
        numeric.products(g.flatten().expand_as(c), c).sum(-1)
        for g, c in zip(given, columns, strict=True)
    ]
    return torch.stack(parts).sum(0)


def figures(trial: Trial) -> tuple[Figures, ...]:
    """Measure what the pictures of a report show, for every argument."""
    return tuple(_figures(trial, place) for place in trial.probe.places)


def _figures(trial: Trial, place: int) -> Figures:
    reference = Reference(trial, place)
    steps, errors = _by_step(trial, place)
    return Figures(
        trial.probe.paths[place],
        tuple(reference.leaf.shape),
        reference.places.numpy(),
        reference.said[0].cpu().numpy(),
        reference.right[0].cpu().numpy(),
        reference.source,
        steps,
        errors,
    )


def _by_step(trial: Trial, place: int) -> tuple[Any, Any]:
    """Return step sizes, and how far central differences are from bwd with each."""
    steps = np.logspace(-1, -11, 21)
    moves = numeric.direction(trial.probe, [place], trial.subject.generator)
    given, said = trial.cotangents[0], trial.values[0]
    errors = []
    for step in steps:
        value = numeric.difference(trial.fun, trial.probe, moves, float(step))
        zeros = [torch.zeros_like(v) for v in value]
        found = numeric.Slope(moves, value, zeros, 0.0)
        item = numeric.compare(found, trial.outs, given, said)
        errors.append(abs(item.analytic - item.numeric) / (item.scale or 1.0))
    return steps, np.array(errors)
