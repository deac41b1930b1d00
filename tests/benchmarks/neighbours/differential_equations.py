"""torchdiffeq: the adjoint method, and what its solvers apply inside."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchdiffeq
from torchdiffeq._impl.adjoint import OdeintAdjointMethod
from torchdiffeq._impl.misc import _StitchGradient
from torchdiffeq._impl.odeint import ImplicitFnGradientRerouting
from torchdiffeq._impl.rk_common import _UncheckedAssign

from tests.benchmarks.neighbours import Case, harvest


class _Field(torch.nn.Module):
    """A small vector field."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.tensor([[-0.3, 1.0], [-1.0, -0.2]], dtype=torch.float64)
        self.weight = torch.nn.Parameter(weight)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return dy/dt."""
        return torch.tanh(y @ self.weight) + 0.1 * t


_Y = torch.tensor([0.7, -0.4], dtype=torch.float64)
_T = torch.linspace(0.0, 1.0, 3, dtype=torch.float64)


def _adjoint() -> Case:
    y = _Y.clone().requires_grad_()
    run = lambda: torchdiffeq.odeint_adjoint(
        _Field(), y, _T, method="rk4", options={"step_size": 0.05}
    )
    return Case(OdeintAdjointMethod, harvest(OdeintAdjointMethod, run))


def _rerouting() -> Case:
    event_t = torch.tensor(0.4, dtype=torch.float64)
    return Case(
        ImplicitFnGradientRerouting,
        (_Field(), lambda t, y: y[0] - t, event_t, _Y.clone().requires_grad_()),
    )


CASES: dict[str, Callable[[], Case]] = {
    "torchdiffeq OdeintAdjointMethod": _adjoint,
    "torchdiffeq ImplicitFnGradientRerouting": _rerouting,
    "torchdiffeq _StitchGradient": lambda: Case(
        _StitchGradient, (_Y.clone().requires_grad_(), torch.nextafter(_Y, _Y + 1))
    ),
    "torchdiffeq _UncheckedAssign": lambda: Case(
        _UncheckedAssign,
        (
            torch.zeros(2, 2, dtype=torch.float64),
            _Y.clone().requires_grad_(),
            (Ellipsis, 1),
        ),
    ),
}
