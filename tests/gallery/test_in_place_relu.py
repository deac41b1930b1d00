"""A ReLU that saves memory, without edits in place."""

import pytest
import torch

import gradtools as gt
from tests.gallery.stating import restated


@pytest.fixture
def names(gallery):
    return gallery("in_place_relu")


def test_the_pure_form_keeps_what_the_form_in_place_keeps(names):
    assert names["memory"]["relu"] == names["in_place"]
    one = 1797 * 64 * 4
    assert names["in_place"] == 9 * one  # the digits, and what each layer gives
    assert names["memory"]["relu_of_input"] == (9 + 8) * one


@pytest.mark.parametrize("name", ["relu", "relu_of_input"])
def test_the_gradient_is_torchs(names, name):
    x = torch.randn(50)
    g = torch.randn(50)
    found = torch.func.vjp(names[name], x)[1](g)
    torch.testing.assert_close(found, torch.func.vjp(torch.relu, x)[1](g))


def inputs():
    """Return a tensor inside of a graph, as a layer's output is, and its values."""
    leaf = torch.randn(8, requires_grad=True)
    x = leaf * 1.0
    return x, x.detach().clone()


def clamped(x):
    return x.clamp_(min=0)


def clamped_data(x):
    return x.data.clamp_(min=0)


def assigned(x):
    with torch.no_grad():
        x[x < 0] = 0
    return x.detach()


EDITS = [clamped, clamped_data, assigned]


@pytest.mark.parametrize("edit", EDITS)
def test_a_forward_that_edits_its_input_is_refused_and_the_input_is_whole(names, edit):
    def fwd(x):
        out = edit(x)
        return out, out

    relu = restated(names["relu"], fwd=fwd)
    x, before = inputs()
    with pytest.raises(
        gt.GradientMismatchError, match=r"relu: fwd changes args\.x in place"
    ) as caught:
        relu(x)
    assert torch.equal(x, before)
    assert caught.value.fix.startswith("Compute a new tensor")


def test_a_function_that_edits_its_input_is_refused(names):
    relu = gt.custom_vjp(clamped)
    relu.def_bwd(lambda residuals, g: g * (residuals[1] > 0))
    x, before = inputs()
    with pytest.raises(gt.GradientMismatchError, match=r"fun changes args\.x in p"):
        relu(x)
    assert torch.equal(x, before)


def test_a_backward_that_edits_the_cotangent_is_refused(names):
    relu = restated(names["relu"], bwd=lambda out, g: g.mul_(out > 0))
    with pytest.raises(
        gt.GradientMismatchError, match="bwd changes the cotangent of output 0 in place"
    ):
        relu(inputs()[0])


def test_a_backward_that_edits_a_residual_is_refused(names):
    def bwd(out, g):
        return out.gt_(0).mul_(g)

    with pytest.raises(
        gt.GradientMismatchError, match=r"bwd changes residual 0 \(an output\) in place"
    ):
        restated(names["relu"], bwd=bwd)(inputs()[0])


def test_an_edit_of_the_output_before_the_backward_is_refused(names):
    x, _ = inputs()
    out = names["relu"](x)
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_input_may_be_edited_afterwards_because_nobody_keeps_it(names):
    leaf = torch.randn(8, requires_grad=True)
    x = leaf * 1.0
    out = names["relu"](x)
    with torch.no_grad():
        x.zero_()
    out.sum().backward()
    assert torch.equal(leaf.grad, (leaf.detach() > 0).float())
