"""A convolution with integers, an optional bias, and a log."""

import pytest
import torch
import torch.nn.functional as F

import gradtools as gt
from tests.gallery.stating import restated


@pytest.fixture
def names(gallery):
    return gallery("conv_logging")


def test_the_digits_are_learned_with_a_line_of_log_per_real_call(names):
    assert names["accuracy"] > 0.85
    # two layers, a forward and a backward each; what was judged wanted no gradient
    assert len(names["log"]) == 4 * names["steps"]
    assert {name for name, *_ in names["log"]} == {"output", "gradient"}
    assert names["conv2d"].reports  # it was checked, and the checks logged nothing


@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("needed", [(0,), (1,), (0, 1)])
def test_its_gradients_are_torchs(names, stride, with_bias, needed):
    x, weight = torch.randn(2, 3, 6, 5).double(), torch.randn(4, 3, 3, 2).double()
    bias = torch.randn(4).double().requires_grad_() if with_bias else None
    inputs = [x, weight]
    leaves = [inputs[i].requires_grad_() for i in needed]
    leaves += [bias] if with_bias else []
    losses = [
        conv(x, weight, bias, stride).sin().sum()
        for conv in (restated(names["conv2d"]), F.conv2d)
    ]
    found, expected = (torch.autograd.grad(loss, leaves) for loss in losses)
    torch.testing.assert_close(found, expected)


def call(rule):
    x = torch.randn(2, 1, 5, 5)
    weight = torch.randn(3, 1, 2, 2, requires_grad=True)
    return rule(x, weight, None, 2)


def formulas(kept, g):
    x, weight, stride = kept["x"], kept["weight"], kept["stride"]
    return (
        torch.nn.grad.conv2d_input(x.shape, weight, g, stride),
        torch.nn.grad.conv2d_weight(x, weight.shape, g, stride),
    )


def test_too_few_cotangents_are_refused(names):
    rule = restated(names["conv2d"], bwd=formulas)
    with pytest.raises(
        gt.BackwardContractError, match=r"a tuple of 4 \(x, weight, bias, stride\)"
    ) as caught:
        call(rule)
    assert "None where it is zero" in caught.value.fix


def test_a_cotangent_for_an_integer_and_for_none_is_refused(names):
    def bwd(kept, g):
        return *formulas(kept, g), g.sum((0, 2, 3)), torch.zeros(())

    rule = restated(names["conv2d"], bwd=bwd)
    with pytest.raises(gt.BackwardContractError, match="do not fit") as caught:
        call(rule)
    assert [v.where for v in caught.value.violations] == ["args.bias", "args.stride"]


def test_a_name_that_is_no_argument_is_refused(names):
    def bwd(kept, g):
        dx, dweight = formulas(kept, g)
        return {"x": dx, "kernel": dweight}

    with pytest.raises(gt.BackwardContractError, match="kernel"):
        call(restated(names["conv2d"], bwd=bwd))


def stashing(shelf, kept):
    def fwd(x, weight, bias=None, stride=1):
        shelf["x"] = kept(x)
        return F.conv2d(x, weight, bias, stride), (weight, stride)

    def bwd(residuals, g):
        weight, stride = residuals
        given = {"x": shelf["x"], "weight": weight, "stride": stride}
        return *formulas(given, g), None, None

    return {"fwd": fwd, "bwd": bwd}


def test_a_tensor_that_is_stashed_outside_of_the_residuals_is_refused(names):
    rule = restated(names["conv2d"], **stashing({}, torch.Tensor.detach))
    with pytest.raises(
        gt.GradientMismatchError, match="depends on which call of fwd came last"
    ) as caught:
        call(rule)
    assert "among the residuals" in caught.value.fix


def test_a_tensor_with_a_gradient_that_is_stashed_is_refused(names):
    rule = restated(names["conv2d"], **stashing({}, lambda x: x))
    x = torch.randn(2, 1, 5, 5, requires_grad=True)
    with pytest.raises(
        gt.GradientMismatchError, match="depends on which call of fwd came last"
    ):
        rule(x, torch.randn(3, 1, 2, 2, requires_grad=True))


class Workspace:
    pass


def test_a_tensor_that_hides_in_an_object_is_watched_for_edits(names):
    def fwd(x, weight, bias=None, stride=1):
        space = Workspace()
        space.x, space.weight, space.stride = x, weight, stride
        return F.conv2d(x, weight, bias, stride), space

    def bwd(space, g):
        return *formulas(vars(space), g), None, None

    rule = restated(names["conv2d"], fwd=fwd, bwd=bwd)
    x = torch.randn(2, 1, 5, 5)
    weight = torch.randn(3, 1, 2, 2, requires_grad=True)
    out = rule(x, weight)
    x.add_(1)
    with pytest.raises(gt.TransformError, match=r"changed in place after fwd"):
        out.sum().backward()


def test_an_edit_of_a_residual_after_the_call_is_refused(names):
    x = torch.randn(2, 1, 5, 5)
    out = names["conv2d"](x, torch.randn(3, 1, 2, 2, requires_grad=True))
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
