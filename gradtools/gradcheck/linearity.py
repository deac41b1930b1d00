"""Whether bwd is linear in its cotangent, at scales from small to large.

The derivative is; a clip is not, and its numbers for a cotangent of ordinary size may
be right all the same.
"""

from __future__ import annotations

import torch

from gradtools.errors import GradientMismatchError, Violation
from gradtools.gradcheck.report import Evidence
from gradtools.gradcheck.trial import Trial, filled

__all__ = ["linearity"]

LOOSE = 1e-7


def linearity(trial: Trial) -> Evidence:
    """Give bwd tiny and huge cotangents; raise where it does not answer in scale."""
    if not trial.outs:
        return Evidence("linear in the cotangent", "passed", "no output has one")
    first, second = trial.cotangents[0], trial.cotangents[-1]
    narrow = any(out.dtype == torch.float16 for out in trial.outs)
    for a, b in ((-1e-3, 0.0), (1e2, -1e2) if narrow else (1e4, -1e4)):
        mixed = [a * u + b * v for u, v in zip(first, second, strict=True)]
        values = trial.subject.bwd(trial.run, mixed)
        for place in trial.probe.places:
            leaf = trial.probe.leaves[place]
            one = filled(trial.values[0][place], leaf)
            two = filled(trial.values[-1][place], leaf)
            got, wanted = filled(values[place], leaf), a * one + b * two
            least = trial.least(place, mixed)
            clipped = got if abs(a) > 1 else one
            _compare(trial, place, got, wanted, least, clipped)
    return Evidence("linear in the cotangent", "passed", "from 1e-3 to 1e4")


def _compare(
    trial: Trial,
    place: int,
    got: torch.Tensor,
    wanted: torch.Tensor,
    least: float,
    clipped: torch.Tensor,
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
        + (_clipped(clipped) or ": multiples of one disagree"),
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


def _clipped(values: torch.Tensor) -> str:
    """Say at which number the values seem to be clipped, if they do."""
    sizes = values.abs().flatten()
    bound = sizes.max()
    at_bound = int((sizes >= bound * (1 - 1e-12)).sum())
    if at_bound > 1 or (sizes.numel() == 1 and 0 < float(bound) < 1e3):
        return f": it seems to be clipped at {float(bound):.4g}"
    return ""
