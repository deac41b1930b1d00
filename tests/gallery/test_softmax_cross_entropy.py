"""Softmax and cross-entropy in one rule."""

import pytest
import torch
import torch.nn.functional as F

import gradtools as gt
from tests.gallery.stating import restated


@pytest.fixture
def names(gallery):
    return gallery("softmax_cross_entropy")


def test_the_digits_are_learned_with_the_gradient_of_torch(names):
    assert names["accuracy"] > 0.88
    assert names["gap"].abs().max() < 1e-7


@pytest.mark.parametrize("scale", [1.0, 100.0, 10000.0])
def test_values_gradients_and_second_derivatives_are_torchs(names, scale):
    logits = scale * torch.randn(5, 4, dtype=torch.float64)
    labels = torch.tensor([0, 3, 1, 1, 2])
    for transform in (lambda f: f, torch.func.grad, torch.func.hessian):
        found, expected = (
            transform(f)(logits, labels)
            for f in (names["cross_entropy"], F.cross_entropy)
        )
        torch.testing.assert_close(found, expected)


def test_a_forgotten_mean_is_refused(names):
    def bwd(residuals, g):
        p, labels = residuals
        return g * (p - F.one_hot(labels, p.shape[-1])), None

    with pytest.raises(gt.GradientMismatchError, match="it is 7 times what it should"):
        restated(names["cross_entropy"], bwd=bwd)(
            torch.randn(7, 4, requires_grad=True), torch.arange(7) % 4
        )


def test_a_gradient_for_the_labels_is_refused(names):
    def bwd(residuals, g):
        p, labels = residuals
        wrong = g / len(labels) * (p - F.one_hot(labels, p.shape[-1]))
        return wrong, torch.zeros_like(labels)

    with pytest.raises(gt.BackwardContractError, match=r"where +args\.labels"):
        restated(names["cross_entropy"], bwd=bwd)(
            torch.randn(7, 4, requires_grad=True), torch.arange(7) % 4
        )
