"""Layers that run again in the backward."""

import pytest
import torch

import gradtools as gt
from tests.gallery.stating import restated


@pytest.fixture
def names(gallery):
    return gallery("checkpointed_block")


def test_all_parameters_get_the_gradients_of_the_layers_themselves(names):
    plain, by_torch, by_rule = (names["gradients"][n] for n in names["gradients"])
    assert len(by_rule) == len([*names["layers"].parameters()]) == 120
    assert all(g.abs().max() > 0 for g in by_rule)
    torch.testing.assert_close(by_rule, plain)  # with the same dropout
    torch.testing.assert_close(by_rule, by_torch)


def test_the_dropout_matters(names):
    """What is compared above would differ if the mask did."""
    layer, x = names["layers"][0], names["x"]
    assert torch.dist(layer(x), layer(x)) > 1


def test_it_takes_the_memory_of_torchs_checkpoint(names):
    plain, by_torch, by_rule = names["memory"].values()
    assert by_rule < plain / 5
    assert by_rule < 1.1 * by_torch


def test_the_global_random_state_goes_on_as_if_nothing_ran_again(names):
    layer, x = names["layers"][0], names["x"]
    torch.manual_seed(3)
    out = names["rerun"](dict(layer.named_parameters()), x)
    after = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(torch.get_rng_state(), after)


def test_the_usual_version_by_hand_gives_the_parameters_nothing(names):
    class Rerun(torch.autograd.Function):
        @staticmethod
        def forward(ctx, layer, x):
            ctx.layer = layer
            ctx.save_for_backward(x)
            return layer(x)

        @staticmethod
        def backward(ctx, g):
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.layer(x)
            return None, *torch.autograd.grad(out, x, g)

    layer = torch.nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    x = torch.randn(2, 3, 8, requires_grad=True)
    Rerun.apply(layer, x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in layer.parameters())  # torch says nothing


def rerun_of_x_alone(layer):
    @gt.custom_vjp(once_differentiable=True)
    def rerun(x):
        return layer(x)

    @rerun.def_bwd
    def _(residuals, g):
        ((x,), _) = residuals
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            out = layer(x)
        return torch.autograd.grad(out, x, g)

    return rerun


def test_a_layer_whose_parameters_would_get_nothing_is_refused(names):
    rerun = rerun_of_x_alone(names["layers"][0])
    with pytest.raises(
        gt.CapturedTensorError, match=r"self_attn\.in_proj_weight"
    ) as caught:
        rerun(names["x"].clone().requires_grad_())
    assert "closure_convert" in caught.value.fix


def test_a_layer_as_an_argument_is_refused(names):
    @gt.custom_vjp
    def rerun(layer, x):
        return layer(x)

    rerun.def_bwd(lambda residuals, g: (None, g))
    with pytest.raises(gt.CapturedTensorError, match="an argument holds parameters"):
        rerun(names["layers"][0], names["x"].clone().requires_grad_())


def again(residuals, g, call):
    params, x, _ = residuals
    with torch.enable_grad():
        inputs = [p.detach().requires_grad_() for p in (*params.values(), x)]
        out = call(dict(zip(params, inputs, strict=False)), {}, inputs[-1])
    *found, of_x = torch.autograd.grad(out, inputs, g)
    return dict(zip(params, found, strict=True)), of_x


def call_of(names, rule):
    rule(dict(names["layers"][0].named_parameters()), names["x"])


def test_a_second_run_with_another_dropout_mask_is_refused(names):
    rule = restated(
        names["rerun"],
        bwd=lambda residuals, g: again(residuals, g, names["call"]),
        once_differentiable=True,
    )
    with pytest.raises(
        gt.GradientMismatchError, match="does not give the same answer twice"
    ) as caught:
        call_of(names, rule)
    assert "keep what was drawn among the residuals" in caught.value.fix


def test_a_second_run_with_one_other_mask_is_refused(names):
    def bwd(residuals, g):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(99)  # the same every time, and not that of the first run
            return again(residuals, g, names["call"])

    rule = restated(names["rerun"], bwd=bwd, once_differentiable=True)
    with pytest.raises(gt.GradientMismatchError, match="is not the derivative"):
        call_of(names, rule)


def test_parameters_without_gradients_are_refused(names):
    def bwd(residuals, g):
        return None, names["rerun"].rule.bwd(residuals, g)[1]

    rule = restated(names["rerun"], bwd=bwd, once_differentiable=True)
    with pytest.raises(gt.GradientMismatchError, match="it is zero, and should not be"):
        call_of(names, rule)
