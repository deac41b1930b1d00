"""Whether bwd is linear in its cotangent, at scales from small to large.

The derivative is; a clip is not, and its numbers for a cotangent of ordinary size may
be right all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradtools.errors import GradientMismatchError, Violation
from gradtools.gradcheck import probes
from gradtools.gradcheck.report import Evidence
from gradtools.gradcheck.trial import Trial, filled

__all__ = ["linearity"]

LOOSE = 1e-7


def linearity(trial: Trial) -> Evidence:
    """Give bwd tiny and huge cotangents; raise where it does not answer in scale."""
    if not trial.outs:
        return Evidence("linear in the cotangent", "passed", "no output has one")
    first, second = trial.cotangents[0], trial.cotangents[-1]
    for a, b in _multiples(trial):
        mixed = [a * u + b * v for u, v in zip(first, second, strict=True)]
        values = trial.subject.bwd(trial.run, mixed)
        for place in trial.probe.places:
            leaf = trial.probe.leaves[place]
            one = filled(trial.values[0][place], leaf)
            two = filled(trial.values[-1][place], leaf)
            wide = probes.WIDER.get(leaf.dtype, leaf.dtype)
            wanted = a * one.to(wide) + b * two.to(wide)
            got = filled(values[place], leaf).to(wide)
            least = trial.least(place, mixed)
            limits = torch.finfo(leaf.dtype)  # below, numbers have few digits
            least += 10 * (abs(a) + abs(b)) * limits.tiny * limits.eps
            least += 10 * limits.eps * _largest(mixed)  # what cancels leaves as much
            looks = _clipped(got, alone=True) if abs(a) > 1 else _clipped(one)
            _compare(trial, place, got, wanted, least, looks)
    return Evidence("linear in the cotangent", "passed", "from 1e-3 to 1e4")


def _multiples(trial: Trial) -> Sequence[tuple[float, float]]:
    """Return what to multiply two cotangents by, before they are added.

    In half precision a difference has few digits, and small numbers have few too.
    """
    dtypes = {out.dtype for out in trial.outs}
    if torch.float16 in dtypes:
        return (-0.5, 0.0), (16.0, 0.0)
    if torch.bfloat16 in dtypes:
        return (-1e-3, 0.0), (1e4, 0.0)
    return (-1e-3, 0.0), (1e4, -1e4)


def _largest(tensors: Sequence[torch.Tensor]) -> float:
    return max(float(t.abs().max()) if t.numel() else 0.0 for t in tensors)


def _compare(
    trial: Trial,
    place: int,
    got: torch.Tensor,
    wanted: torch.Tensor,
    least: float,
    looks: str,
) -> None:
    gap = (got - wanted).abs()
    finite = torch.isfinite(gap)
    if not bool(finite.any()):
        return
    size = wanted[finite].abs().max()
    loose = max(LOOSE, trial.tolerance.relative)
    if bool(gap[finite].max() <= loose * size + least):
        return
    rule, path = trial.subject.rule, trial.probe.paths[place]
    index = int(torch.where(finite, gap, 0).argmax())
    raise GradientMismatchError(
        f"{rule.name}: what bwd returns for {path} is not linear in the cotangent"
        + (looks or ": multiples of one disagree"),
        rule=rule.where,
        function=rule.which("bwd"),
        violations=[
            Violation(
                path,
                f"{wanted.flatten()[index].item():.6g} for a multiple of a cotangent",
                f"{got.flatten()[index].item():.6g}",
            )
        ],
        fix="A derivative is linear. Declare a deliberate change: contract="
        "Surrogate(reference=...), or gradtools.clip_grad around an exact rule.",
        kind="not linear",
    )


def _clipped(values: torch.Tensor, *, alone: bool = False) -> str:
    """Say at which number the values seem to be clipped, if they do.

    Args:
        values: What bwd returned.
        alone: A single number that is small where it should be huge counts too.
    """
    if values.numel() == 0:
        return ""
    sizes = values.abs().flatten()
    bound = sizes.max()
    at_bound = int((sizes >= bound * (1 - 1e-12)).sum())
    small = alone and sizes.numel() == 1 and 0 < float(bound) < 1e3
    if small or (at_bound > 1 and float(bound) > 0):
        return f": it seems to be clipped at {float(bound):.4g}"
    return ""
