"""Hessian-vector products of a form that is not symmetric."""

import pytest
import torch

import gradtools as gt
from tests.gallery.stating import restated


@pytest.fixture
def names(gallery):
    return gallery("hessian_products")


def test_three_ways_give_the_hessian_times_the_vector(names):
    assert len(names["errors"]) == 3
    assert max(names["errors"].values()) < 1e-5


def test_the_gradients_of_a_batch_are_those_of_its_rows(names):
    A, batch = names["A"], names["batch"]
    assert set(names["gradients"]) == {"in one call", "by vmap"}
    for found in names["gradients"].values():
        torch.testing.assert_close(found, batch @ (A + A.T))


def test_the_second_order_is_checked(names):
    capabilities = {item.capability for item in names["report"].evidence}
    assert capabilities == {"reverse", "forward mode", "second order", "vmap"}
    assert names["report"].outcome == "passed"


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
def test_the_gradient_of_the_matrix_is_autograds(names, shape):
    x = torch.randn(shape, dtype=torch.float64)
    A = torch.randn(6, 6, dtype=torch.float64)
    found, expected = (
        torch.func.jacrev(f, (0, 1))(x, A)
        for f in (names["quadratic"], lambda x, A: (x @ A * x).sum(-1))
    )
    torch.testing.assert_close(found, expected)


def symmetric_alone(residuals, g):
    (x, A), _ = residuals
    g = g.unsqueeze(-1)
    rows = x.reshape(-1, len(A))
    return g * 2 * (x @ A), (g * x).reshape(-1, len(A)).T @ rows


@pytest.mark.parametrize("is_symmetric", [False, True])
def test_a_formula_for_symmetric_matrices_is_refused_whatever_the_call(
    names, is_symmetric
):
    rule = restated(names["quadratic"], bwd=symmetric_alone, probe=PROBE)
    A = torch.randn(6, 6)
    A = A + A.T if is_symmetric else A
    with pytest.raises(gt.GradientMismatchError, match=r"args\.x is not the deriv"):
        rule(torch.randn(6, requires_grad=True), A)


PROBE = lambda: (torch.randn(5, 6), torch.randn(6, 6))


def hvps(rule, names):
    """Return three ways to a second derivative."""
    f = lambda x: rule(x, names["A"])
    x, v = names["x"], names["v"]
    return [
        lambda: gt.hvp(f, (x,), (v,)),
        lambda: gt.hvp_fn(f, x)(v),
        lambda: gt.jvp(gt.grad(f), (x,), (v,)),
        lambda: gt.hessian(f)(x),
        lambda: torch.func.hessian(f)(x),
    ]


@pytest.mark.parametrize("way", range(5))
def test_a_second_derivative_through_a_detached_residual_is_refused(names, way):
    def fwd(x, A):
        return (x @ A * x).sum(-1), (x.detach(), A)

    def bwd(residuals, g, *, needs):
        return names["quadratic"].rule.bwd((residuals, None), g, needs=needs)

    rule = restated(names["quadratic"], fwd=fwd, bwd=bwd)
    names["quadratic"](names["x"], names["A"])  # the first derivative is none the worse
    with pytest.raises(gt.TransformError, match=r"depends on residuals\[0\]") as caught:
        hvps(rule, names)[way]()
    assert "no .detach()" in caught.value.fix


@pytest.mark.parametrize("way", range(5))
def test_a_second_derivative_through_a_detach_in_bwd_is_refused(names, way):
    def bwd(residuals, g, *, needs):
        (x, A), out = residuals
        return names["quadratic"].rule.bwd(((x.detach(), A), out), g, needs=needs)

    rule = restated(names["quadratic"], bwd=bwd)
    with pytest.raises(gt.TransformError, match="bwd cannot be differentiated"):
        hvps(rule, names)[way]()
