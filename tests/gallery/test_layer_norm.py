"""Layer norm, and five classic mistakes."""

import pytest
import torch

import gradtools as gt
from tests.gallery.stating import restated


@pytest.fixture
def names(gallery):
    return gallery("layer_norm")


def test_value_gradient_and_second_derivative_are_torchs(names):
    assert set(names["gaps"]) == {"value", "gradient", "second derivative"}
    assert max(names["gaps"].values()) < 5e-6


def formula(x, scale, shift):
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-5) * scale + shift


def test_the_second_derivative_is_that_of_the_formula(names):
    x, scale, shift = (t.double() for t in (names["x"], names["scale"], names["shift"]))
    rows = [
        torch.func.jacrev(torch.func.jacrev(lambda *a: f(*a).sin().sum(), (0, 1)), 0)(
            x, scale, shift
        )
        for f in (names["layer_norm"], formula)  # of torch's, 2.13 has it wrong
    ]
    torch.testing.assert_close(*rows)


NAMED = {
    "lost keepdim": r"args\.x is not the derivative.*a term is missing",
    "sign": r"args\.x .* sign: along dimension 1 it is proportional to residual 0",
    "missing term": r"args\.x .* along dimension 1 it is constant, as a mean or a sum",
    "mean for sum": r"args\.scale .* a mean over 5 numbers",
    "sum over features": r"args\.scale is not the derivative of the function",
}


def test_all_five_mistakes_of_the_script_are_here(names):
    assert set(names["says"]) == set(names["mistakes"]) == set(NAMED)


@pytest.mark.parametrize("mistake", NAMED)
def test_the_mistake_is_refused_and_named(names, mistake):
    assert not isinstance(names["says"][mistake], torch.Tensor)  # it was an error
    place, formula = names["mistakes"][mistake]

    def bwd(residuals, g):
        (xhat, rstd, scale), found = residuals, list(names["bwd"](residuals, g))
        found[place] = formula(g, xhat) if place else rstd * formula(g * scale, xhat)
        return found

    rule = restated(names["layer_norm"], bwd=bwd)
    args = (t.clone().requires_grad_() for t in (names[k] for k in NEEDED))
    with pytest.raises(gt.GradientMismatchError, match=NAMED[mistake]) as caught:
        rule(*args)
    assert caught.value.what == names["says"][mistake]
    assert caught.value.function.startswith(f"bwd ({__file__}:")


NEEDED = ("x", "scale", "shift")


def test_torch_itself_says_nothing_to_any_of_them(names):
    for place, formula in names["mistakes"].values():

        class Mistaken(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, scale, shift):
                out, residuals = names["fwd"](x, scale, shift)
                ctx.save_for_backward(*residuals)
                return out

            @staticmethod
            def backward(ctx, g):
                found = list(names["bwd"](ctx.saved_tensors, g))[:3]
                xhat, rstd, scale = ctx.saved_tensors
                h = g * scale
                found[place] = formula(g, xhat) if place else rstd * formula(h, xhat)
                return tuple(found)

        args = [names[k].clone().requires_grad_() for k in NEEDED]
        Mistaken.apply(*args).sin().sum().backward()
        assert args[place].grad is not None
