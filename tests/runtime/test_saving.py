"""What a rule holds between forward and backward: no more than a Function by hand."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import gradtools as gt

pytestmark = pytest.mark.usefixtures("unchecked")


# One operation per kind of residual, by hand and as a rule.


class HandSwish(torch.autograd.Function):
    """Residuals: an input and a tensor of its own."""

    @staticmethod
    def forward(ctx, x):
        s = torch.sigmoid(x)
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx, g):
        x, s = ctx.saved_tensors
        return g * (s + x * s * (1 - s))


@gt.custom_vjp
def swish(x):
    return x * torch.sigmoid(x)


@swish.def_fwd
def _(x):
    s = torch.sigmoid(x)
    return x * s, (x, s)


@swish.def_bwd
def _(residuals, g):
    x, s = residuals
    return g * (s + x * s * (1 - s))


class HandTanh(torch.autograd.Function):
    """Residual: the output, said twice."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


@gt.custom_vjp
def tanh(x):
    return torch.tanh(x)


@tanh.def_fwd
def _(x):
    y = torch.tanh(x)
    return y, (y, y)


@tanh.def_bwd
def _(residuals, g):
    y, again = residuals
    return g * (1 - y * again)


class HandSigmoid(torch.autograd.Function):
    """Residual: a tensor of its own; the input is not read."""

    @staticmethod
    def forward(ctx, x):
        s = torch.sigmoid(x)
        ctx.save_for_backward(s * (1 - s))
        return s

    @staticmethod
    def backward(ctx, g):
        (slope,) = ctx.saved_tensors
        return g * slope


def sigmoid_rule(**options):
    @gt.custom_vjp(**options)
    def sigmoid(x):
        return torch.sigmoid(x)

    @sigmoid.def_fwd
    def _(x):
        s = torch.sigmoid(x)
        return s, s * (1 - s)

    @sigmoid.def_bwd
    def _(slope, g):
        return g * slope

    return sigmoid


sigmoid = sigmoid_rule()
sigmoid_once = sigmoid_rule(once_differentiable=True)

SAME = {
    "input and own": (swish, HandSwish.apply),
    "output": (tanh, HandTanh.apply),
    "own, once differentiable": (sigmoid_once, HandSigmoid.apply),
}
PAIRS = pytest.mark.parametrize(("rule", "by_hand"), SAME.values(), ids=SAME.keys())


def bytes_packed(f, x):
    """Count the bytes that saved-tensor hooks see."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.nbytes
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        f(x)
    return total


class Alive(TorchDispatchMode):
    """Keep weak references to every storage that is made."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        return out

    def bytes(self):
        gc.collect()
        return sum(size for ref, size in self.storages.values() if ref() is not None)


def held_by_a_stack(f, *, layers=20, context=nullcontext):
    """Count the bytes alive after a stack whose intermediates were dropped."""
    x = torch.randn(64, requires_grad=True)
    with Alive() as alive, context():
        y = x
        for _ in range(layers):
            y = f(y)
    held = alive.bytes()
    y.sum().backward()
    del y
    return held, alive.bytes()


@PAIRS
def test_the_hooks_see_the_same_bytes_as_by_hand(rule, by_hand):
    x = torch.randn(64, requires_grad=True)
    assert bytes_packed(rule, x) == bytes_packed(by_hand, x)


@PAIRS
def test_a_stack_of_layers_holds_the_same_storages_as_by_hand(rule, by_hand):
    held, afterwards = held_by_a_stack(rule)
    expected, _ = held_by_a_stack(by_hand)
    assert held == expected > 0
    assert afterwards == 0


@PAIRS
def test_save_on_cpu_holds_the_same_storages_as_by_hand(rule, by_hand):
    held, afterwards = held_by_a_stack(rule, context=save_on_cpu)
    expected, _ = held_by_a_stack(by_hand, context=save_on_cpu)
    assert held == expected > 0
    assert afterwards == 0


@PAIRS
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_holds_the_same_storages_as_by_hand(rule, by_hand, use_reentrant):
    def checkpointed(f):
        return lambda y: checkpoint(f, y, use_reentrant=use_reentrant)

    held, _ = held_by_a_stack(checkpointed(rule))
    expected, _ = held_by_a_stack(checkpointed(by_hand))
    assert held == expected > 0


def test_an_input_that_bwd_does_not_read_is_held_for_the_second_order():
    x = torch.randn(64, requires_grad=True)
    extra = bytes_packed(sigmoid, x) - bytes_packed(HandSigmoid.apply, x)
    assert extra == x.nbytes
    held, afterwards = held_by_a_stack(sigmoid)
    by_hand, _ = held_by_a_stack(HandSigmoid.apply)
    # Each layer's input but the first, which the caller holds, is a layer's output.
    assert held - by_hand == 19 * x.nbytes
    assert afterwards == 0


def test_an_input_that_bwd_does_not_read_may_be_changed_in_place():
    x = torch.randn(5, requires_grad=True)
    y = x * 1
    out = sigmoid(y)
    y.mul_(2)
    (grad,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    torch.testing.assert_close(grad, torch.sigmoid(x) * (1 - torch.sigmoid(x)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize("rule", [swish, tanh])
def test_a_residual_that_was_changed_in_place_is_torchs_error(rule):
    x = torch.randn(5, requires_grad=True)
    y = x * 1
    out = rule(y)
    (out if rule is tanh else y).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@PAIRS
def test_nothing_is_held_where_no_gradient_is_wanted(rule, by_hand):
    with Alive() as alive, torch.no_grad():
        rule(torch.randn(64, requires_grad=True))
    assert alive.bytes() == 0


def test_residuals_are_freed_by_backward_while_the_output_lives():
    x = torch.randn(64, requires_grad=True)
    with Alive() as alive:
        out = swish(x)
        loss = out.sum()
    before = alive.bytes()
    loss.backward()
    assert before - alive.bytes() == x.nbytes  # s; x is the caller's, out is ours
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("calls", [0, 5], ids=["first call", "generated code"])
def test_inputs_are_freed_by_backward_while_the_output_lives(calls):
    rule = sigmoid_rule()
    for _ in range(calls):
        rule(torch.randn(64, requires_grad=True)).sum().backward()
    source = torch.randn(64, requires_grad=True)
    with Alive() as alive:
        out = rule(source * 1)  # bwd does not read it, and nobody else holds it
        loss = out.sum()
    before = alive.bytes()
    loss.backward()
    assert before - alive.bytes() == 2 * source.nbytes  # the input and the slope
