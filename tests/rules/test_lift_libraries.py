"""Classes of other libraries, lifted unchanged; the benchmark ``lifted`` has more."""

import linear_operator
import pytest
import torch
import torchdiffeq
from linear_operator.functions._matmul import Matmul
from torch.testing import assert_close
from torchdiffeq._impl import adjoint

import gradtools as gt
from tests.rules.stating import gradients

GENERATOR = torch.Generator().manual_seed(3)
MATRIX = torch.randn(4, 4, generator=GENERATOR, dtype=torch.float64)
RHS = torch.randn(4, 2, generator=GENERATOR, dtype=torch.float64)
TREE = linear_operator.to_linear_operator(MATRIX).representation_tree()
matmul = gt.lift(Matmul)


def lifted_product(matrix, rhs):
    return matmul(TREE, rhs, matrix)


USES = {
    "grad": lambda f: torch.func.grad(lambda m: f(m, RHS).sin().sum())(MATRIX),
    "jvp": lambda f: torch.func.jvp(f, (MATRIX, RHS), (MATRIX.cos(), RHS.cos())),
    "vmap": lambda f: torch.func.vmap(f)(MATRIX.expand(3, 4, 4), RHS.expand(3, 4, 2)),
    "vmap of grad": lambda f: torch.func.vmap(
        torch.func.grad(lambda m, r: f(m, r).sin().sum()), in_dims=(None, 0)
    )(MATRIX, torch.stack([RHS, RHS.exp()])),
    "hessian": lambda f: torch.func.hessian(lambda m: f(m, RHS).sin().sum())(MATRIX),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_an_operator_kept_on_ctx_follows_its_arguments(use):
    """linear_operator keeps the operator that forward built on ctx."""
    assert_close(use(lifted_product), use(torch.matmul))


class Field(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(-MATRIX[:2, :2].exp())

    def forward(self, t, y):
        return torch.tanh(y @ self.weight) + t


def solve(field, y):
    times = torch.linspace(0, 1, 3)
    options = {"method": "rk4", "options": {"step_size": 0.1}}
    return torchdiffeq.odeint_adjoint(field, y, times, **options)


def test_the_adjoint_method_with_the_parameters_of_its_module(monkeypatch):
    field, y = Field(), torch.tensor([0.5, -1.0], requires_grad=True)
    wanted = gradients(solve(field, y).sin(), y, field.weight)
    lifted = gt.lift(adjoint.OdeintAdjointMethod, contract=gt.Approximate(rel=1e-3))
    calls = type("Calls", (), {"apply": staticmethod(lifted)})
    monkeypatch.setattr(adjoint, "OdeintAdjointMethod", calls)
    out = solve(field, y)
    assert_close(gradients(out.sin(), y, field.weight), wanted)
    assert len(lifted.reports) == 1
