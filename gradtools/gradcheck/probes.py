"""The inputs on which a rule is checked.

The user's own arguments, in float64, moved off the exact kinks (a zero under relu, a
tie under max) where the function allows it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from gradtools.lowering.flat import Plan, State
from gradtools.rules.signature import CallSignature, flatten_entries

__all__ = ["Probe", "in_double", "moved_off_kinks", "of_entries"]

WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}


@dataclasses.dataclass(frozen=True)
class Probe:
    """A plan and the leaves to run it on."""

    plan: Plan
    leaves: tuple[Any, ...]

    @property
    def places(self) -> list[int]:
        """The leaves whose derivative is claimed and wanted."""
        needs = self.plan.signature.needs
        return [
            i for i, meta in enumerate(self.plan.signature.metas) if meta and needs[i]
        ]

    def with_leaves(self, leaves: Sequence[Any]) -> Probe:
        """Return the probe on other leaves of the same structure."""
        old = self.plan.signature
        entries = tuple(old.entries(leaves))
        signature = CallSignature(old.parameters, entries, leaves, old.spec, old.needs)
        plan = dataclasses.replace(
            self.plan,
            signature=signature,
            state=State(watched={"fwd", "bwd", "jvp"}),
            autocast=(),
            check=None,
        )
        return Probe(plan, tuple(leaves))


def of_entries(plan: Plan, entries: tuple[Any, ...]) -> Probe:
    """Return the probe that a user's ``probe=`` gave."""
    leaves, spec = flatten_entries(entries)
    needs = tuple(
        isinstance(x, torch.Tensor) and x.dtype.is_floating_point for x in leaves
    )
    signature = CallSignature(plan.rule.parameters, entries, leaves, spec, needs)
    return Probe(dataclasses.replace(plan, signature=signature), ()).with_leaves(
        [x.detach() if isinstance(x, torch.Tensor) else x for x in leaves]
    )


def in_double(probe: Probe) -> Probe:
    """Return the probe with its floating tensors in double precision."""
    return probe.with_leaves(
        [
            leaf.detach().to(WIDER.get(leaf.dtype, leaf.dtype), copy=True)
            if isinstance(leaf, torch.Tensor)
            else leaf
            for leaf in probe.leaves
        ]
    )


def moved_off_kinks(probe: Probe, generator: torch.Generator) -> Probe:
    """Return the probe with every differentiable number moved by some 0.1 permille."""
    leaves = list(probe.leaves)
    for place in probe.places:
        leaf = leaves[place]
        noise = torch.rand(leaf.shape, generator=generator, dtype=torch.float64)
        step = (noise.to(leaf.device) + 0.5) * 1e-4
        leaves[place] = leaf + (step * (leaf.abs() + 1e-2 * scale_of(leaf))).to(
            leaf.dtype
        )
    return probe.with_leaves(leaves)


def scale_of(tensor: torch.Tensor) -> float:
    """Return the root mean square of a tensor, 1 where that says nothing."""
    if tensor.numel() == 0:
        return 1.0
    scale = tensor.abs().to(torch.float64).square().mean().sqrt().item()
    return scale if 0 < scale < float("inf") else 1.0
