"""What a wrong cotangent looks like: a sentence that saves an afternoon.

Known from the evidence are, for two random cotangents, what bwd returned for an
argument (a) and what is right (n), element by element or on a sample. Each function
below recognizes one kind of mistake in them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from gradtools.errors import GradientMismatchError, Violation
from gradtools.gradcheck import numeric
from gradtools.gradcheck.numeric import Comparison
from gradtools.gradcheck.reference import Reference
from gradtools.gradcheck.trial import Trial
from gradtools.rules.rule import Approximate, Surrogate, place

__all__ = ["Culprit", "sentence"]

CLOSE = 1e-3
FEW = 0.02  # part of the elements that counts as single ones


@dataclasses.dataclass(frozen=True)
class Culprit:
    """An argument whose cotangent is wrong.

    Attributes:
        trial: Where it was seen.
        place: The argument.
        along: The derivative along a direction that showed it, if one did.
        excess: By how much a budget was left, in the place of that derivative.
    """

    trial: Trial
    place: int
    along: Comparison | None = None
    excess: Violation | None = None

    @functools.cached_property
    def reference(self) -> Reference:
        """What is right, element by element."""
        return Reference(self.trial, self.place)

    @property
    def path(self) -> str:
        """Key path of the argument."""
        return self.trial.probe.paths[self.place]

    def error(self) -> GradientMismatchError:
        """Return the error that says all this."""
        rule = self.trial.subject.rule
        claimed = rule.contract
        what = (
            "outside the budget of its contract"
            if isinstance(claimed, Approximate)
            else "not the derivative of the function"
        )
        role = "bwd"
        function = rule.which("bwd" if rule.bwd is not None else "jvp")
        kind, says = sentence(self)
        fix = _FIXES.get(kind, _FIX_OF_BUDGET if self.excess else _FIX)
        if isinstance(claimed, Surrogate):
            role = "the reference of its contract"
            function = f"reference ({place(claimed.reference)})"
            fix = _FIX_OF_REFERENCE
        return GradientMismatchError(
            f"{rule.name}: what {role} returns for {self.path} is {what}: {says}",
            rule=rule.where,
            function=function,
            violations=list(self.violations()),
            fix=fix,
            kind=kind,
        )

    def violations(self) -> Iterator[Violation]:
        """Yield the worst element, and the direction if there is one."""
        reference = self.reference
        if reference.count:
            index, said, right = reference.worst()
            where = f"{self.path}{list(index) if index else ''}"
            yield Violation(
                where,
                f"{_number(right)}, by {reference.source}",
                f"{_number(said)}{_off(said, right)}{self.far}",
            )
        if self.excess is not None:
            yield self.excess
            return
        item = self.along or self.along_any()
        if item is not None:
            yield Violation(
                self.path,
                f"{item.numeric:.6g} along a random direction, by differences",
                f"{item.analytic:.6g}, off by {item.error:.1e} of its size (allowed: "
                f"{self.trial.tolerance.of_direction(item):.0e})",
            )

    def along_any(self) -> Comparison | None:
        """Return how far off bwd is along a random direction, where that shows."""
        items = self.trial.compared(self.trial.slope([self.place]))
        worst = max(items, key=lambda item: item.error)
        wrong = worst.is_conclusive and not self.trial.tolerance.admits(worst)
        return worst if wrong else None

    @property
    def far(self) -> str:
        """Where the trial was made, if not at the arguments themselves."""
        if self.trial.factor == 1:
            return ""
        return f" (at {self.trial.factor:g} times the arguments)"


_FIX = (
    "Correct bwd; if it is meant to differ, declare contract=Surrogate(...) or "
    "Approximate(...)."
)
_FIX_OF_BUDGET = "Correct bwd, or declare the error that it has: Approximate(rel=...)."
_FIX_OF_REFERENCE = (
    "Correct the reference: it is the derivative itself, what bwd was before it was "
    "deliberately changed."
)
_FIXES = {
    "missing sum": "Sum over the dimensions along which the argument was broadcast: "
    "cotangent.sum_to_size(argument.shape).",
    "swapped": "Return the cotangents in the order of the parameters.",
    "conjugate": "torch's convention: for a holomorphic f return cotangent * "
    "f'(z).conj().",
}


def sentence(culprit: Culprit) -> tuple[str, str]:
    """Return the kind of a mistake and what it looks like."""
    reference = culprit.reference
    if reference.count == 0:
        return "unknown", "directions disagree"
    for recognize in _KINDS:
        found = recognize(culprit, reference)
        if found is not None:
            kind, says = found
            if culprit.trial.factor != 1 and kind != "large":
                times = f"{culprit.trial.factor:g} times as large"
                says += f", only where the arguments are {times}"
            return kind, says
    return "term", "a term is missing, or there is one too many"


Found = tuple[str, str] | None


def _not_finite(culprit: Culprit, reference: Reference) -> Found:
    bad = (~torch.isfinite(reference.said)).any(0)  # with any of the cotangents
    if not bool(bad.any()):
        return None
    return "not finite", f"{int(bad.sum())} of its numbers are NaN or infinite"


def _zero(culprit: Culprit, reference: Reference) -> Found:
    if not bool(reference.said.any()):
        return "zero", "it is zero, and should not be"
    if not bool(reference.right.any()):
        return "zero", "it should be zero"
    return None


def _factor(culprit: Culprit, reference: Reference) -> Found:
    said, right = reference.said, reference.right
    factor = _inner(right, said) / _inner(right, right)
    off = float(torch.linalg.vector_norm(said - factor * right))
    size = float(torch.linalg.vector_norm(right))
    if off > min(CLOSE * abs(factor), 0.1 * abs(factor - 1)) * size:
        return None
    if math.isclose(factor, -1, rel_tol=CLOSE):
        return "sign", "it has the wrong sign"
    count = _mean_over(culprit, factor)
    if count:
        return "mean for sum", (
            f"it is {factor:.4g} times what it should be: a mean over {count} numbers, "
            "it seems, in the place of their sum"
        )
    sign = ", with the wrong sign" if factor < 0 else ""
    return "factor", f"it is {factor:.4g} times what it should be{sign}"


def _mean_over(culprit: Culprit, factor: float) -> int | None:
    """Return the number of elements whose mean, for a sum, gives this factor."""
    trial = culprit.trial
    leaf = trial.probe.leaves[culprit.place]
    shapes = [leaf.shape, *(out.shape for out in trial.outs)]
    shapes += [x.shape for x in trial.probe.leaves if isinstance(x, torch.Tensor)]
    if leaf.dim() < 2 and len(set(shapes)) == 1:  # nothing there that could be summed
        return None
    sizes = {size for shape in shapes for size in shape}
    sizes |= {shape[:k].numel() for shape in shapes for k in range(len(shape) + 1)}
    sizes |= {out.numel() // max(leaf.numel(), 1) for out in trial.outs}
    return next(
        (
            size
            for size in sorted(sizes)
            if size > 1 and math.isclose(factor * size, 1, rel_tol=CLOSE)
        ),
        None,
    )


def _elements(culprit: Culprit, reference: Reference) -> Found:
    wrong = reference.wrong()
    count, total = int(wrong.sum()), reference.count
    if total < 4 or not 0 < count <= max(1, FEW * total):
        return None
    index = list(reference.index(int(wrong.nonzero()[0])))
    sampled = "" if reference.is_complete else " that were looked at"
    return "element", (
        f"{count} of {total} elements{sampled} {'is' if count == 1 else 'are'} wrong, "
        f"such as {culprit.path}{index}"
    )


def _swapped(culprit: Culprit, reference: Reference) -> Found:
    trial = culprit.trial
    shape = trial.probe.leaves[culprit.place].shape
    for other in trial.probe.places:
        if other == culprit.place or trial.probe.leaves[other].shape != shape:
            continue
        right = Reference(trial, other).right
        if right.shape == reference.said.shape and _close(reference.said, right):
            return "swapped", f"it is what {trial.probe.paths[other]} should get"
    return None


def _rearranged(culprit: Culprit, reference: Reference) -> Found:
    """Recognize a transpose, a conjugate and a shift."""
    if not reference.is_complete:
        return None
    shape = (len(reference.said), *culprit.trial.probe.leaves[culprit.place].shape)
    said, right = reference.said.reshape(shape), reference.right.reshape(shape)
    if said.is_complex() and _close(said, right.conj()):
        return "conjugate", "it is the complex conjugate of what it should be"
    for first, second in ((-2, -1), (1, 2)):
        if said.dim() > 2 and said.shape[first] == said.shape[second]:
            turned = right.transpose(first, second)
            if _close(said, turned):
                return "transpose", "it is transposed"
            if _close(said, -turned):
                return "transpose", "it is transposed, with the wrong sign"
    if said.dim() > 1 and said.shape[-1] > 1:
        for step in (1, -1):
            if _close(said, right.roll(step, -1)):
                return "shift", "its elements are shifted by one, along the last dim"
    return None


def _region(culprit: Culprit, reference: Reference) -> Found:
    """Recognize what is wrong on one side of zero only, or far from zero."""
    x = reference.inputs
    wrong, matters = reference.wrong(), reference.matters()
    if x.is_complex() or not bool((matters & ~wrong).any()):
        return None
    name = culprit.path.removeprefix("args.")
    for sign, side in ((x < 0, "<"), (x > 0, ">")):
        if bool((wrong & ~sign).any()) or not bool((wrong & sign).any()):
            continue
        if not bool((matters & sign & ~wrong).any()):
            return "region", f"it is wrong only where {name} {side} 0"
    bound, right = float(x[wrong].abs().min()), x[matters & ~wrong].abs()
    if len(right) >= 0.1 * reference.count and bool((right < bound).all()):
        return "large", f"it is wrong only where |{name}| is large, {bound:.3g} or more"
    return None


def _unsummed(culprit: Culprit, reference: Reference) -> Found:
    """Recognize one slice in the place of a sum over a dimension of the output."""
    for number, out in enumerate(culprit.trial.outs):
        dims = [dim for dim, size in enumerate(out.shape) if size > 1]
        for count in range(1, len(dims) + 1):
            for some in itertools.combinations(dims, count):
                if _close(reference.said, reference.of_slice(number, some)):
                    return "missing sum", _slice_in_words(some, out.shape)
    return None


def _slice_in_words(dims: Sequence[int], shape: Sequence[int]) -> str:
    if len(dims) == 1:
        return (
            f"it lacks the sum over dimension {dims[0]} of the output, of size "
            f"{shape[dims[0]]}: it is the part of index 0 alone"
        )
    return (
        f"it lacks the sum over dimensions {', '.join(map(str, dims))} of the output: "
        "it is the part of index 0 alone"
    )


def _term(culprit: Culprit, reference: Reference) -> Found:
    """Recognize an error that is proportional to something known."""
    error = reference.said - reference.right
    for name, known in _quantities(culprit, reference):
        if known.shape != error.shape:
            continue
        size = _inner(known, known) * _inner(error, error)
        if size > 0 and abs(_inner(known, error)) > 0.9999 * size**0.5:
            return "term", (
                "a term is missing, or there is one too many, that is proportional to "
                + name
            )
    return None


def _term_along(culprit: Culprit, reference: Reference) -> Found:
    """Recognize an error that is a mean or a sum over a dimension, times something.

    Derivatives of norms and of softmaxes consist of such terms.
    """
    if not reference.is_complete:
        return None
    shape = culprit.trial.probe.leaves[culprit.place].shape
    error = reference.said - reference.right
    error = error.reshape(len(error), *shape)
    for dim in range(1, error.dim()):
        if error.shape[dim] < 3 or error.numel() < 6:
            continue
        for name, known in _factors(culprit, reference):
            factor = (
                torch.ones_like(error) if known is None else known.reshape_as(error)
            )
            square = numeric.products(factor, factor).sum(dim, keepdim=True)
            share = (factor.conj() * error).sum(dim, keepdim=True)
            if _close(torch.where(square > 0, share / square, 0) * factor, error):
                return "term", (
                    "a term is missing, or there is one too many, or it has the wrong "
                    f"sign: along dimension {dim - 1} it is {name}"
                )
    return None


def _factors(
    culprit: Culprit, reference: Reference
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield what an error may be proportional to along a dimension, with names."""
    yield "constant, as a mean or a sum is", None
    run, count = culprit.trial.run, len(reference.said)
    for number, kept in enumerate(run.kept):
        if kept.shape == reference.leaf.shape and kept.dtype == reference.leaf.dtype:
            source = run.layout.kept[number]
            if source.kind == "input":
                name = run.probe.paths[source.number]
            else:
                name = "the output" if source.kind == "output" else f"residual {number}"
            yield f"proportional to {name}", reference.sampled([kept] * count)
    for name, known in _quantities(culprit, reference):
        yield f"proportional to {name}", known


def _quantities(
    culprit: Culprit, reference: Reference
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what an error may be proportional to, with names."""
    trial = culprit.trial
    shape = trial.probe.leaves[culprit.place].shape
    leaves = zip(trial.probe.paths, trial.probe.leaves, strict=True)
    like = {path: x for path, x in leaves if isinstance(x, torch.Tensor)}
    for path, leaf in like.items():
        if leaf.shape == shape:
            yield path, reference.sampled([leaf] * len(trial.cotangents))
    for number, out in enumerate(trial.outs):
        if out.shape == shape:
            given = [cotangents[number] for cotangents in trial.cotangents]
            yield "the cotangent", reference.sampled(given)
            for path, leaf in like.items():
                if leaf.shape == shape:
                    both = [g * leaf for g in given]
                    yield f"the cotangent times {path}", reference.sampled(both)
            yield (
                "the cotangent times the output",
                reference.sampled([g * out for g in given]),
            )


_KINDS: Sequence[Callable[[Culprit, Reference], Found]] = (
    _not_finite,
    _zero,
    _factor,
    _region,
    _elements,
    _swapped,
    _rearranged,
    _unsummed,
    _term,
    _term_along,
)


def _inner(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(numeric.products(first, second).sum())


def _close(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are the same to the eye."""
    gap = float(torch.linalg.vector_norm(first - second))
    return gap <= CLOSE * float(torch.linalg.vector_norm(second))


def _number(value: Any) -> str:
    return f"{value:.6g}"


def _off(said: Any, right: Any) -> str:
    gap = abs(said - right)
    if not math.isfinite(gap):
        return ""
    size = f"{gap / abs(right):.1e} of its size" if right else f"{gap:.1e}"
    return f", off by {size}"
