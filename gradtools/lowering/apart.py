"""bwd as a function of its own.

Where torch cannot look into bwd (it is opaque, or must be vectorized by its own means),
bwd is lowered like a rule: it then runs on plain tensors whatever transform is active.
Its own derivative is that of its code, or a refusal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gradtools.lowering import preconditions
from gradtools.lowering.flat import Lowerable, Optional, Tensors
from gradtools.lowering.forward_mode import pulled_back
from gradtools.lowering.residuals import Layout, lay_out
from gradtools.lowering.state import State
from gradtools.trees import Structure

__all__ = ["BackwardPlan"]


class BackwardPlan:
    """The backward of a plan, at one layout, as a plan.

    Its leaves are the kept tensors, the cotangents, and then the arguments on which the
    residuals may depend past torch's sight, for a refusal to reach; its outputs are
    the cotangents of the arguments.
    """

    primal = False
    has_jvp = False
    order = 1

    def __init__(self, plan: Lowerable, layout: Layout, needs: Sequence[bool]) -> None:
        self.plan = plan
        self.layout = layout
        self.wanted = tuple(needs)
        self.rule = plan.rule
        self.signature = plan.signature
        self.moving = plan.moving
        self.autocast = plan.autocast
        self.state = State(
            watched={"fwd", "bwd"},
            second_order=plan.state.second_order,
            tested={"second_order", "linear", "jvp_linear"},
        )

    def first_use(self, leaves: Sequence[Any]) -> None:
        """Do nothing: the rule itself has been checked."""

    def first_batch(self, batched: Any, leaves: Sequence[Any]) -> None:
        """Do nothing: the rule itself has been checked."""

    def first_derived(self, what: str) -> None:
        """Do nothing: the rule itself has been checked."""

    def forward(
        self, leaves: Sequence[Any], *, leading: tuple[int, ...] = ()
    ) -> tuple[Tensors, Tensors, Layout]:
        """Run bwd."""
        values = self._run(leaves, leading=leading)
        outs, outputs = Structure.split(values)
        tensors, residuals = Structure.split(list(leaves))
        layout, new = lay_out(outputs, outs, residuals, tensors, leaves)
        return [out.view_as(out) for out in outs], new, layout

    def backward(
        self,
        layout: Layout,
        kept: Tensors,
        cotangents: Optional,
        needs: Sequence[bool],
        *,
        leading: tuple[int, ...] = (),
    ) -> Optional:
        """Differentiate bwd, or refuse."""
        error = preconditions.refusal(self.plan)
        if error is not None:
            preconditions.refuse_nonzero(error, cotangents)
            return [
                torch.zeros_like(leaf) if need else None
                for leaf, need in zip(layout.rebuild(kept), needs, strict=True)
            ]
        # An element of the batch has a derivative of its own, also in what is shared.
        given = [_with_leading(leaf, leading) for leaf in layout.rebuild(kept)]
        places = [i for i, need in enumerate(needs) if need]
        chosen = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]

        def function(*moved: torch.Tensor) -> list[torch.Tensor]:
            leaves = list(given)
            for place, value in zip(places, moved, strict=True):
                leaves[place] = value
            outs = Structure.split(self._run(leaves, leading=leading))[0]
            return [_with_leading(outs[i], leading) for i in chosen]

        known = [_with_leading(cotangents[i], leading) for i in chosen]
        primals = [given[place] for place in places]
        values = iter(pulled_back(function, primals, known, given))
        return [next(values) if need else None for need in needs]

    def jvp(
        self,
        layout: Layout,
        leaves: Sequence[Any],
        tangents: Optional,
        outs: Tensors,
        kept: Tensors = (),
        *,
        leading: tuple[int, ...] = (),
    ) -> Optional:
        """Refuse: asked only of rules with a jvp rule of their own."""
        raise NotImplementedError

    def _run(self, leaves: Sequence[Any], *, leading: tuple[int, ...]) -> list[Any]:
        count = len(self.layout.kept)
        end = count + self.layout.outputs.count
        kept, cotangents = leaves[:count], leaves[count:end]
        return list(
            self.plan.backward(
                self.layout, kept, cotangents, self.wanted, leading=leading
            )
        )


def _with_leading(value: Any, leading: tuple[int, ...]) -> Any:
    """Give a tensor the leading dimensions in full, where it has some of size 1."""
    if not leading or not isinstance(value, torch.Tensor):
        return value
    return value.expand(*leading, *value.shape[len(leading) :])
