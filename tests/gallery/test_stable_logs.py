"""Logarithms of sums of exponentials, finite where autodiff is not."""

import pytest
import torch

import gradtools as gt
from tests.gallery.stating import restated


@pytest.fixture
def names(gallery):
    return gallery("stable_logs")


def test_the_derivative_of_log1pexp_is_finite_where_autodiffs_is_nan(names):
    assert names["by_autograd"].isnan().any()
    torch.testing.assert_close(names["found"], torch.sigmoid(names["x"]))
    s = torch.sigmoid(names["x"])
    torch.testing.assert_close(names["second"], s * (1 - s))


def test_the_value_of_log1pexp_is_softplus(names):
    x = torch.linspace(-100, 100, 51)
    torch.testing.assert_close(names["log1pexp"](x), torch.nn.functional.softplus(x))


def test_the_weights_of_logsumexp_are_finite_where_autodiffs_are_nan(names):
    assert names["by_autograd_sum"].isnan().all()
    rows, weights = names["rows"], names["weights"]
    torch.testing.assert_close(weights[0], rows[0].softmax(-1))
    assert torch.equal(weights[1], torch.zeros(3))


def test_the_values_of_logsumexp_are_torchs(names):
    rows = names["rows"]
    torch.testing.assert_close(names["logsumexp"](rows), rows.logsumexp(-1))
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(names["logsumexp"](x, 1), x.logsumexp(1))


def test_second_derivatives_of_logsumexp_are_torchs(names):
    x = torch.randn(6, dtype=torch.float64)
    found = torch.func.hessian(names["logsumexp"])(x)
    torch.testing.assert_close(found, torch.func.hessian(lambda x: x.logsumexp(-1))(x))


def test_a_softmax_without_its_shift_is_refused(names):
    def bwd(residuals, g):
        (x, dim), out = residuals
        return g.unsqueeze(dim) * x.exp() / out.unsqueeze(dim).exp(), None

    rule = restated(names["logsumexp"], bwd=bwd)
    x = torch.tensor([[1000.0, 1001.0, 999.0]], requires_grad=True)
    with pytest.raises(gt.GradientMismatchError, match="are NaN or infinite"):
        rule(x)


def test_a_softmax_over_the_wrong_dimension_is_refused(names):
    def bwd(residuals, g):
        (x, dim), _ = residuals
        return g.unsqueeze(dim) * x.softmax(0), None

    rule = restated(names["logsumexp"], bwd=bwd)
    with pytest.raises(gt.GradientMismatchError, match=r"args\.x is not the deriv"):
        rule(torch.randn(3, 3, requires_grad=True))
