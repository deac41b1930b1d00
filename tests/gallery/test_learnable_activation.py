"""A learnable activation: what it promises, and what it refuses."""

import pytest
import torch

import gradtools as gt
from tests.gallery.stating import restated


@pytest.fixture
def names(gallery):
    return gallery("learnable_activation")


def test_the_digits_are_learned_and_so_are_the_slopes(names):
    assert names["accuracy"] > 0.88
    for layer in (names["model"][1], names["model"][3]):
        assert (layer.beta - 1).abs().max() > 0.05


def test_the_check_ran_by_itself_and_says_how_long_it_took(names):
    reports = names["swish"].reports
    shapes = {report.signature.partition("beta: ")[2] for report in reports}
    assert shapes == {"(48,) float32", "() float32"}
    for report in reports:
        assert report.outcome == "passed"
        assert report.evaluations > 20
        assert 0 < report.seconds < 60


@pytest.mark.parametrize("shape", [(), (4,), (6, 1), (1, 4)])
def test_the_gradient_of_beta_is_autograds_whatever_it_was_broadcast_along(
    names, shape
):
    x = torch.randn(6, 4, dtype=torch.float64)
    beta = torch.rand(shape, dtype=torch.float64)
    g = torch.randn(6, 4, dtype=torch.float64)
    found = torch.func.vjp(names["swish"], x, beta)[1](g)
    plain = torch.func.vjp(lambda x, b: x * torch.sigmoid(b * x), x, beta)[1](g)
    torch.testing.assert_close(found, plain)


def slopes(residuals, g):
    x, beta, s = residuals
    return g * (s + x * beta * s * (1 - s)), g * x * x * s * (1 - s)


@pytest.mark.parametrize("shape", [(), (4,)])
def test_a_gradient_of_beta_that_is_not_summed_is_refused(names, shape):
    swish = restated(names["swish"], bwd=slopes)
    with pytest.raises(gt.BackwardContractError, match=r"where +args\.beta") as caught:
        swish(torch.randn(6, 4), torch.ones(shape, requires_grad=True))
    assert "sum_to_size" in caught.value.fix


def test_a_mean_in_the_place_of_the_sum_is_refused(names):
    def mean(residuals, g):
        dx, dbeta = slopes(residuals, g)
        return dx, dbeta.mean(0)

    swish = restated(names["swish"], bwd=mean)
    with pytest.raises(gt.GradientMismatchError, match="a mean over 6 numbers"):
        swish(torch.randn(6, 4), torch.ones(4, requires_grad=True))


def test_the_sum_over_all_where_beta_is_per_channel_is_refused(names):
    def summed(residuals, g):
        dx, dbeta = slopes(residuals, g)
        return dx, dbeta.sum()

    swish = restated(names["swish"], bwd=summed)
    with pytest.raises(gt.BackwardContractError, match=r"expected +a tensor of shape"):
        swish(torch.randn(6, 4), torch.ones(4, requires_grad=True))


@pytest.mark.parametrize("needed", [(True, False), (False, True), (True, True)])
def test_bwd_is_told_what_is_needed_and_nothing_else_gets_a_gradient(names, needed):
    asked = []

    def bwd(residuals, g, *, needs):
        asked.append(needs)
        found = names["swish"].rule.bwd(residuals, g, needs=needs)
        assert [value is not None for value in found] == list(needs)
        return found

    swish = restated(names["swish"], bwd=bwd)
    x = torch.randn(6, 4, requires_grad=needed[0])
    beta = torch.ones(4, requires_grad=needed[1])
    out = swish(x, beta)
    assert set(asked) == {needed}  # in the check as well
    out.sum().backward()
    assert set(asked) == {needed}
    assert [x.grad is not None, beta.grad is not None] == list(needed)


def test_a_gradient_for_what_needs_none_goes_nowhere(names):
    def careless(residuals, g):
        dx, dbeta = slopes(residuals, g)
        return dx, dbeta.sum(0)

    x, beta = torch.randn(6, 4), torch.ones(4, requires_grad=True)
    restated(names["swish"], bwd=careless)(x, beta).sum().backward()
    assert x.grad is None
