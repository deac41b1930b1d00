"""Whether bwd is the derivative of the function.

Two witnesses are heard. Autograd, where the function is differentiable torch code,
speaks of every element. Differences speak of a few directions, and of any code. Where
the two contradict each other, differences along the elements in dispute decide.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from gradtools.gradcheck import numeric, probes
from gradtools.gradcheck.diagnosis import Culprit
from gradtools.gradcheck.numeric import Comparison
from gradtools.gradcheck.probes import Probe
from gradtools.gradcheck.report import Evidence
from gradtools.gradcheck.trial import Trial, filled

__all__ = ["at_other_sizes", "derivative"]

TRIES = 3
FACTORS = (10.0, 100.0)
FEW = 3  # arguments that are looked at one by one, far out
MOST_NAMES = 3  # in a question
GROSS = 1e-3  # without differences, autograd alone convicts from here on
COARSE = 1e-2  # differences that are known no better prove nothing


def derivative(trial: Trial, probe: Probe) -> list[Evidence]:
    """Compare bwd with autograd and with differences; raise where it is wrong.

    Args:
        trial: The rule beside its function.
        probe: Where else to look, when a kink is in the way.
    """
    if not trial.outs or not trial.probe.places:
        return [Evidence("derivative", "passed", "nothing here has a derivative")]
    evidence, disputed = _by_elements(trial)
    settled = trial.reference is not None and not disputed
    lost = not_numbers(trial)
    places = [place for place in trial.probe.places if place not in lost]
    for some in filter(None, (places, list(lost))):
        found = by_differences(trial, probe, some, settled)
        is_told = found.outcome == "passed" or some is places
        evidence += [found] if is_told else lost.values()
    return evidence


def of_every_element(trial: Trial) -> list[Evidence]:
    """Compare bwd with autograd alone; raise where it is wrong."""
    evidence = [*_by_elements(trial)[0], *not_numbers(trial).values()]
    whole = [f"{item.question}, all elements" for item in evidence]
    pairs = zip(evidence, whole, strict=True)
    return [dataclasses.replace(item, question=asked) for item, asked in pairs]


def _by_elements(trial: Trial) -> tuple[list[Evidence], list[int]]:
    if trial.reference is None:
        return [], []
    disputed = by_elements(trial)
    seen = [place for place in trial.probe.places if place not in disputed]
    seen = [place for place in seen if _has_numbers(trial, place)]
    if not seen:
        return [], disputed
    error = _distance(trial, seen)
    asked = question(trial, seen) + " by autograd"
    detail = f"to {error:.0e}, element by element"
    return [Evidence(asked, "passed", detail, error)], disputed


def _has_numbers(trial: Trial, place: int) -> bool:
    """Whether autograd tells any element of an argument, or there is none."""
    leaf = trial.probe.leaves[place]
    return leaf.numel() == 0 or not bool(
        _not_finite(trial.reference or (), place, leaf).all()
    )


def not_numbers(trial: Trial) -> dict[int, Evidence]:
    """Say of each argument where bwd and autograd agree on NaN, or on infinity.

    Nothing can be told from that, and along a direction it would drown all the rest.
    """
    found: dict[int, Evidence] = {}
    for place in trial.probe.places if trial.reference is not None else ():
        leaf = trial.probe.leaves[place]
        said = _not_finite(trial.values, place, leaf)
        both = said & _not_finite(trial.reference or (), place, leaf)
        both &= torch.isfinite(leaf)  # of infinity, a mask, nothing else is expected
        if not bool(both.any()):
            continue
        index = both.nonzero()[0].tolist()
        value = filled(trial.values[0][place], leaf)[tuple(index)].abs().item()
        detail = (
            f"bwd and autograd both give {'infinity' if math.isinf(value) else 'NaN'} "
            f"at {trial.probe.paths[place]}{index or ''} "
            f"({int(both.sum())} of {both.numel()} numbers)"
        )
        found[place] = Evidence(question(trial, [place]), "not checked", detail)
    return found


def _not_finite(
    rows: Sequence[Sequence[torch.Tensor | None]], place: int, like: torch.Tensor
) -> torch.Tensor:
    finite = [torch.isfinite(filled(row[place], like)) for row in rows]
    return ~torch.stack(finite).all(0)


def by_elements(trial: Trial) -> list[int]:
    """Hear autograd; return the places where differences prove it wrong, not bwd."""
    disputed = []
    for place in trial.probe.places:
        masks = trial.mismatch(place)
        if masks is None:
            continue
        if is_guilty(trial, place, masks):
            raise Culprit(trial, place).error()
        disputed.append(place)
    return disputed


def is_guilty(
    trial: Trial, place: int, masks: Sequence[torch.Tensor], *, gross: bool = True
) -> bool:
    """Let differences decide between bwd and autograd, along what is in dispute.

    Args:
        trial: The rule beside its function.
        place: The argument.
        masks: Where the two contradict each other.
        gross: What to answer where differences tell nothing and the two are far apart.
    """
    assert trial.reference is not None
    which = max(range(len(masks)), key=lambda i: int(masks[i].sum()))
    leaf = trial.probe.leaves[place]
    said = filled(trial.values[which][place], leaf)
    right = filled(trial.reference[which][place], leaf)
    gap = torch.where(masks[which], said - right, 0)
    if not bool(torch.isfinite(gap).all()):
        return True
    move = gap.sgn() * probes.scale_of(leaf)
    found = trial.slope_along({place: move})
    given = trial.cotangents[which]
    by_rule = numeric.compare(found, trial.outs, given, trial.values[which])
    by_autograd = numeric.compare(found, trial.outs, given, trial.reference[which])
    numbers = by_rule.analytic, by_autograd.analytic, by_rule.numeric
    width = abs(numbers[0] - numbers[1])
    if math.isfinite(numbers[2]) and by_rule.noise <= 0.2 * width:
        if abs(numbers[1] - numbers[2]) <= 0.25 * width:
            return True
        if abs(numbers[0] - numbers[2]) <= 0.25 * width:
            return False
    size = float(torch.where(masks[which], right, 0).abs().sum())
    return gross and float(gap.abs().sum()) > GROSS * size


def is_steady(trial: Trial, place: int, masks: Sequence[torch.Tensor]) -> bool:
    """Whether bwd and autograd stay apart when the argument moves by its rounding.

    For small elements, which differences do not see. Where the two are apart by
    rounding, they move about as far as they are apart.
    """
    assert trial.reference is not None
    leaf = trial.probe.leaves[place]
    if torch.finfo(leaf.dtype).eps > 1e-6:
        return False
    signs = numeric.signs(leaf, trial.subject.generator)
    moved = leaf + leaf * signs * torch.finfo(leaf.dtype).eps
    near = Trial.of(
        trial.subject, trial.subject.fwd(trial.probe.replaced({place: moved})), 0
    )
    near = dataclasses.replace(
        near,
        cotangents=trial.cotangents,
        values=[trial.subject.bwd(near.run, given) for given in trial.cotangents],
    )
    if near.reference is None:
        return False
    for row, mask in enumerate(masks):
        said, right = (
            filled(values[row][place], leaf)
            for values in (trial.values, trial.reference)
        )
        other_said, other_right = (
            filled(values[row][place], leaf) for values in (near.values, near.reference)
        )
        shift = (other_said - said).abs() + (other_right - right).abs()
        gap = (said - right).abs()
        floor = 100 * trial.least(place, trial.cotangents[row], is_far=True)
        apart = mask & (gap > 100 * shift + floor) & (gap > 0.1 * right.abs())
        if bool(apart.any()):
            return True
    return False


def by_differences(
    trial: Trial, probe: Probe, places: Sequence[int], settled: bool
) -> Evidence:
    """Hear differences, along some arguments together; then one by one if wrong.

    Args:
        trial: The rule beside its function.
        probe: Where else to look.
        places: The arguments.
        settled: Autograd has found nothing wrong.
    """
    found = _along(trial, places)
    if _prove(trial, found):
        found += _along(trial, places, part=1 / 8)
    for attempt in range(1, 2 if settled else TRIES):
        if _prove(trial, found):
            break
        if not settled:
            near = probes.moved_off_kinks(probe, trial.subject.generator)
            trial = Trial.at(trial.subject, near, len(trial.cotangents))
        other = _along(trial, places, relative=attempt == 1)
        found = min(found, other, key=_worst_of(trial))
    if _prove(trial, found):
        bound = max(max(item.error, item.precision) for item in found)
        detail = f"relative error below {bound:.0e} along {len(found)} directions"
        asked = question(trial, places) + " by differences"
        return Evidence(asked, "passed", detail, bound)
    if not settled:
        return one_by_one(trial, places)
    asked = question(trial, places) + " by differences"
    if _refute(trial, found):
        detail = "they contradict autograd too: fun is not smooth, or has a detach()"
        return Evidence(asked, "not checked", detail)
    return Evidence(asked, "passed", "they do not converge here")


def one_by_one(trial: Trial, places: Sequence[int]) -> Evidence:
    """Find the argument that is wrong, by differences alone."""
    found = {place: _along(trial, [place]) for place in places}
    worst = sorted(places, key=lambda place: max(map(_error, found[place])))
    for place in reversed(worst):
        items = found[place]
        if _refute(trial, items) and _is_no_accident(trial, place):
            raise Culprit(trial, place, max(items, key=_error)).error()
    return Evidence(
        question(trial, places) + " by differences",
        "not checked",
        "they do not converge here",
    )


def _is_no_accident(trial: Trial, place: int) -> bool:
    """Whether bwd is also wrong where no number crosses zero, and with a small step."""
    if not _refute(trial, _along(trial, [place], relative=True)):
        return False
    if not trial.subject.in_double:
        return True
    moves = numeric.direction(
        trial.probe, [place], trial.subject.generator, trial.values
    )
    return _refute(trial, trial.compared(trial.slope_along(moves, finely=True)))


def at_other_sizes(trial: Trial) -> list[Evidence]:
    """Look at larger arguments, where the function takes them."""
    evidence, subject = [], trial.subject
    if trial.tolerance.relative > COARSE:  # half precision: nothing is known there
        return []
    for factor in FACTORS:
        try:
            large = probes.scaled(trial.probe, factor)
            outs = subject.fun(large)
            if not all(bool(torch.isfinite(out).all()) for out in outs):
                continue
            far = Trial.at(subject, large, 1, factor)
        except Exception:  # outside the domain, with whatever the code then raises
            continue
        if trial.reference is not None:
            evidence += _by_elements_far(far)
        elif subject.in_double:
            evidence += _by_differences_far(far)
    return evidence


def _by_elements_far(trial: Trial) -> list[Evidence]:
    if trial.reference is None:
        return []
    for place in trial.probe.places:
        masks = trial.mismatch(place)
        if masks is None:
            continue
        if is_guilty(trial, place, masks, gross=False) or is_steady(
            trial, place, masks
        ):
            raise Culprit(trial, place).error()
    detail = "element by element, by autograd"
    return [
        Evidence(f"derivative at {trial.factor:g} times the size", "passed", detail)
    ]


def _by_differences_far(trial: Trial) -> list[Evidence]:
    places = trial.probe.places
    # One that says little would drown in the noise of the others, far out.
    groups = [[p] for p in places] if len(places) <= FEW else [places]
    errors = []
    for group in groups:
        found = _along(trial, group)
        if not all(item.is_conclusive for item in found):
            continue
        if not all(map(trial.tolerance.admits, found)):
            one_by_one(trial, group)
        errors += [max(item.error, item.precision) for item in found]
    if not errors:
        return []
    detail = f"relative error below {max(errors):.0e} along a direction"
    return [
        Evidence(f"derivative at {trial.factor:g} times the size", "passed", detail)
    ]


def question(trial: Trial, places: Sequence[int]) -> str:
    """Name what is asked about some arguments."""
    names = [trial.probe.paths[place].removeprefix("args.") for place in places]
    if len(names) > MOST_NAMES + 1:  # a network has hundreds
        names[MOST_NAMES:] = [f"{len(names) - MOST_NAMES} more"]
    return f"derivative in {', '.join(names)}"


def _along(trial: Trial, places: Sequence[int], **how: object) -> list[Comparison]:
    return trial.compared(trial.slope(places, **how))


def _prove(trial: Trial, found: Sequence[Comparison]) -> bool:
    return all(
        item.is_conclusive
        and (item.precision <= COARSE or item.noise <= numeric.FLAT * item.size)
        and trial.tolerance.admits(item)
        for item in found
    )


def _refute(trial: Trial, found: Sequence[Comparison]) -> bool:
    return all(item.is_conclusive for item in found) and not all(
        map(trial.tolerance.admits, found)
    )


def _error(item: Comparison) -> float:
    return item.error


def _worst_of(trial: Trial):  # noqa: ANN202
    def key(found: Sequence[Comparison]) -> tuple[bool, float]:
        return not _prove(trial, found), max(map(_error, found), default=0.0)

    return key


def _distance(trial: Trial, places: Sequence[int]) -> float:
    """Return the largest difference from autograd, relative to the largest element."""
    assert trial.reference is not None
    worst = 0.0
    for said, right in zip(trial.values, trial.reference, strict=True):
        for place in places:
            leaf = trial.probe.leaves[place]
            here, there = filled(said[place], leaf), filled(right[place], leaf)
            known = torch.isfinite(there)
            if bool(known.any()):
                size = float(there[known].abs().max())
                gap = float((here - there)[known].abs().max())
                worst = max(worst, gap / size if size else gap)
    return worst
