"""Complex numbers, numbers of two bits, and reversed gradients."""

import pytest
import torch

import gradtools as gt
from tests.gallery.stating import restated


@pytest.fixture
def waves(gallery):
    return gallery("complex_numbers")


def test_the_waves_meet_at_one_place(waves):
    assert waves["before"] < 0.2 * waves["best"]
    assert waves["after"] > 0.99 * waves["best"]
    torch.testing.assert_close(waves["mine"], waves["theirs"])


def test_a_forgotten_conjugate_is_refused_by_name(waves):
    square = restated(waves["square"], bwd=lambda residuals, g: g * 2 * residuals[0][0])
    with pytest.raises(gt.GradientMismatchError) as caught:
        square(torch.randn(4, dtype=torch.complex64).requires_grad_())
    assert caught.value.kind in {"conjugate", "term"}
    assert "args.z" in caught.value.what


def test_a_holomorphic_formula_for_what_is_not_holomorphic_is_refused(waves):
    intensity = restated(
        waves["intensity"], bwd=lambda residuals, g: g * 2 * residuals[0][0].conj()
    )
    with pytest.raises(gt.GradientMismatchError, match="the complex conjugate of what"):
        intensity(torch.randn(4, dtype=torch.complex64).requires_grad_())


def test_few_weights_learn_almost_as_much(gallery):
    names = gallery("quantizer")
    assert names["values"] == 3
    assert names["low"] > 0.85
    assert names["full"] - names["low"] < 0.05
    w = torch.randn(5, requires_grad=True)
    (g,) = torch.autograd.grad(names["rounded"](w).sum(), w)
    assert torch.equal(g, torch.ones(5))
    assert torch.equal(names["rounded"](w), w.round())


def test_a_straight_through_gradient_is_not_reported_as_a_derivative(gallery):
    (*_, report) = gallery("quantizer")["rounded"].reports
    assert report.contract == "Surrogate()"
    assert "a surrogate, not compared" in str(report)


def test_a_straight_through_gradient_that_claims_to_be_exact_is_refused():
    @gt.custom_vjp
    def rounded(x):
        return torch.round(x)

    rounded.def_bwd(lambda residuals, g: g)
    with pytest.raises(gt.GradientMismatchError, match="it should be zero"):
        rounded(torch.randn(5, requires_grad=True))


def test_a_quantizer_that_changes_the_shape_is_refused():
    first = gt.straight_through(lambda x: x[:1])
    with pytest.raises(gt.ForwardContractError, match=r"shape \(1,\)"):
        first(torch.randn(5, requires_grad=True))


def test_the_features_forget_the_scanner_and_not_the_digit(gallery):
    (digit, told), (digit_reversed, told_reversed) = gallery("domain_adaptation")[
        "found"
    ].values()
    assert told > 0.9
    assert told_reversed < 0.65  # a coin gives a half
    assert digit_reversed > digit - 0.05


def test_a_reversed_gradient_that_claims_to_be_exact_is_refused():
    @gt.custom_vjp
    def reverse(x):
        return x.clone()

    reverse.def_bwd(lambda residuals, g: -g)
    with pytest.raises(gt.GradientMismatchError, match="it has the wrong sign"):
        reverse(torch.randn(5, requires_grad=True))
