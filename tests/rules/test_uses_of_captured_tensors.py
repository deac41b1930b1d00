"""What counts as a use of a captured tensor, and how the error names it."""

import pytest
import torch
from torch.testing import assert_close

import gradtools as gt
from tests.rules.stating import gradients, leaf, stated

pytestmark = pytest.mark.usefixtures("unchecked")


def using(used):
    """Return a rule whose fwd uses something."""
    return stated(lambda x: 2 * x, lambda x: (used(x), ()), lambda _, g: g)


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: x**w,
        lambda x, w: 4 - w,
        lambda x, w: x // w,
        lambda x, w: torch.ops.aten.mul.Tensor(w, x),
        lambda x, w: torch.stack([x, w]).sum(0),
        lambda x, w: x * w.mT if w.dim() > 1 else x * w.real,
        lambda x, w: x * w[0],
        lambda x, w: x * float(w),
        lambda x, w: x * w.item(),
        lambda x, w: x.clone().mul_(w),
        lambda x, w: torch.func.vjp(lambda w: x * w, w)[0],
        lambda x, w: torch.func.vjp(lambda x: x * w, x)[0],
        lambda x, w: w,
    ],
)
def test_every_way_to_use_its_value_counts(use):
    w, x = leaf(2.0), leaf(3.0)
    with pytest.raises(gt.CapturedTensorError, match="closure variable 'w'"):
        using(lambda x: use(x, w))(x)


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: x * w.shape[0],
        lambda x, w: x.to(w.dtype).to(w.device),
        lambda x, w: x * w.dim() + w.numel() + len(w) + len(w.size()),
        lambda x, w: x + torch.zeros_like(w),
        lambda x, w: x * w.detach(),
        lambda x, w: x if w is None else 2 * x,
    ],
)
def test_its_metadata_and_its_detached_value_are_free(use):
    w, x = leaf(2.0), leaf(3.0)
    rule = stated(lambda x: use(x, w), lambda x: (use(x, w), ()), lambda _, g: 10 * g)
    assert_close(gradients(rule(x), x), (torch.tensor([10.0]),))


def test_a_residual_may_not_be_a_captured_tensor():
    w, x = leaf(2.0), leaf(3.0)
    rule = stated(lambda x: 2 * x, lambda x: (2 * x, w), lambda w, g: g * w)
    with pytest.raises(gt.CapturedTensorError, match="residuals: closure variable 'w'"):
        rule(x)


def test_views_of_one_buffer_are_different_tensors():
    """Flattened parameters: the argument and the captured one share their memory."""
    flat = leaf(2.0, 3.0)
    first, second = flat[:1], flat[1:]
    with pytest.raises(gt.CapturedTensorError, match="closure variable 'second'"):
        using(lambda x: x * second)(first)


def test_the_error_names_what_holds_the_tensor_and_the_way_out():
    layer, x = torch.nn.Linear(1, 1), leaf(3.0)
    with pytest.raises(gt.CapturedTensorError, match="fwd uses") as caught:
        using(layer)(x)
    assert (
        caught.value.violations[0].where == "closure variable 'used' of <lambda>.weight"
    )
    assert "closure_convert" in caught.value.fix
    assert isinstance(caught.value, gt.DefinitionError)
