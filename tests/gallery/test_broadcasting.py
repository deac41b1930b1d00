"""Arithmetic that broadcasts, and reductions."""

import pytest
import torch

import gradtools as gt
from tests.gallery.stating import restated


@pytest.fixture
def names(gallery):
    return gallery("broadcasting")


@pytest.fixture
def reductions(gallery):
    return gallery("reductions")


def test_all_gradients_are_torchs(names, reductions):
    assert len(names["gaps"]) == 9
    assert max(names["gaps"].values()) < 1e-5
    assert len(reductions["gaps"]) == 9
    assert max(reductions["gaps"].values()) < 1e-6


def test_second_derivatives_of_a_product_of_matrices_are_torchs(names):
    a = torch.randn(2, 1, 2, 3, dtype=torch.float64)
    b = torch.randn(2, 3, 2, dtype=torch.float64)
    found, expected = (
        torch.func.hessian(lambda a, b: f(a, b).sin().sum(), (0, 1))(a, b)
        for f in (names["matmul"], torch.matmul)
    )
    torch.testing.assert_close(found, expected)


def test_a_gradient_in_the_shape_of_the_output_is_refused(names):
    rule = restated(names["add"], bwd=lambda residuals, g: (g, g))
    with pytest.raises(gt.BackwardContractError, match=r"where +args\.b") as caught:
        rule(torch.randn(4, 3), torch.randn(3, requires_grad=True))
    assert "sum_to_size" in caught.value.fix


def test_one_slice_in_the_place_of_the_sum_is_refused(names):
    rule = restated(names["add"], bwd=lambda residuals, g: (g, g[0]))
    with pytest.raises(
        gt.GradientMismatchError, match="lacks the sum over dimension 0"
    ) as caught:
        rule(torch.randn(4, 3), torch.randn(3, requires_grad=True))
    assert "sum_to_size" in caught.value.fix


def test_a_product_with_its_factors_exchanged_is_refused(names):
    def bwd(residuals, g):
        (a, b), _ = residuals
        return b.mT @ g, g @ a.mT

    with pytest.raises(gt.GradtoolsError, match=r"args\.[ab]"):
        restated(names["matmul"], bwd=bwd)(
            torch.randn(3, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
        )


def test_a_transpose_that_was_forgotten_is_refused(names):
    def bwd(residuals, g):
        (a, b), _ = residuals
        return g @ b, a.mT @ g

    with pytest.raises(gt.GradientMismatchError, match=r"args\.a is not the deriv"):
        restated(names["matmul"], bwd=bwd)(
            torch.randn(3, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
        )


def test_a_mean_whose_gradient_is_not_divided_is_refused(reductions):
    def bwd(residuals, g):
        (x, dim, keepdim), _ = residuals
        return reductions["spread"](g, dim, keepdim).expand(x.shape)

    rule = restated(reductions["mean"], bwd=bwd)
    with pytest.raises(gt.GradientMismatchError, match="it is 3 times what it should"):
        rule(torch.randn(4, 3, requires_grad=True), (1,))


def test_a_lost_keepdim_is_refused_where_torch_would_broadcast_it(reductions):
    def bwd(residuals, g):
        (x, _, _), _ = residuals
        return g.expand(x.shape) / x.shape[1]

    rule = restated(reductions["mean"], bwd=bwd)
    with pytest.raises(gt.GradientMismatchError, match="it is transposed"):
        rule(torch.randn(4, 4, requires_grad=True), (1,))


def test_the_norm_has_a_gradient_at_zero(reductions):
    x = torch.zeros(3, requires_grad=True)
    reductions["norm"](x, (0,)).backward()
    assert torch.equal(x.grad, torch.zeros(3))
