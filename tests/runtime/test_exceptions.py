"""An exception in the user's code comes out as itself and leaves nothing behind."""

import pytest
import torch
from torch.autograd import forward_ad

import gradtools as gt


class Failure(Exception):
    """What the user's code raises."""


class Switch:
    """A rule one of whose functions raises while ``role`` names it."""

    def __init__(self, error=Failure):
        self.role = None
        self.error = error

        def step(role):
            if self.role == role:
                raise self.error(role)

        @gt.custom_vjp
        def sine(x):
            step("fun")
            return torch.sin(x)

        @sine.def_fwd
        def _(x):
            step("fwd")
            return torch.sin(x), x

        @sine.def_bwd
        def _(x, g):
            step("bwd")
            return g * torch.cos(x)

        self.rule = sine


def x():
    return torch.linspace(0.1, 1.0, 4)


def backward(f):
    arg = x().requires_grad_()
    f(arg).sum().backward()
    return arg.grad


def double_backward(f):
    arg = x().requires_grad_()
    (first,) = torch.autograd.grad(f(arg).sum(), arg, create_graph=True)
    return torch.autograd.grad(first.sum(), arg)


def dual_numbers(f):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x(), x()))).tangent


def in_hooks(f):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        return backward(f)


def in_autocast(f):
    with torch.autocast("cpu"):
        return backward(f)


USES = {
    "backward": backward,
    "double backward": double_backward,
    "saved-tensor hooks": in_hooks,
    "autocast": in_autocast,
    "dual numbers": dual_numbers,
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum())(x()),
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(f))(x()),
    "grad of vmap": lambda f: torch.func.grad(lambda x: torch.func.vmap(f)(x).sum())(
        x()
    ),
    "jvp": lambda f: torch.func.jvp(f, (x(),), (x(),)),
    "hessian": lambda f: torch.func.hessian(lambda x: f(x).sum())(x()),
    "jacfwd of jacfwd": lambda f: torch.func.jacfwd(torch.func.jacfwd(f))(x()),
}


def state():
    """Return everything that a call could leave switched over."""
    return {
        "functorch levels": torch._C._functorch.maybe_current_level(),
        "dual level": forward_ad._current_level,
        "forward mode": torch._C._is_fwd_grad_enabled(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "function modes": torch._C._len_torch_function_stack(),
        "hooks": torch._C._autograd._top_saved_tensors_default_hooks(True),
        "checking": gt.is_checking(),
        "random": torch.get_rng_state().sum().item(),
    }


@pytest.mark.parametrize("checked", [True, False], ids=["later", "at first use"])
@pytest.mark.parametrize("role", ["fwd", "bwd"])
@pytest.mark.parametrize("use", USES)
def test_an_exception_comes_out_as_itself(use, role, checked):
    switch, before = Switch(), state()
    if checked:
        expected = USES[use](switch.rule)
    switch.role = role
    with pytest.raises(Failure, match=role) as caught:
        USES[use](switch.rule)
    (note,) = caught.value.__notes__
    assert note.startswith(f"raised in {role} (")
    assert "of the rule sine (" in note
    assert state() == before
    switch.role = None
    again = USES[use](switch.rule)
    if checked:
        torch.testing.assert_close(again, expected)


@pytest.mark.parametrize("wanted", [False, True])
def test_an_exception_in_the_function_itself(wanted):
    switch, before = Switch(), state()
    switch.role = "fun"
    with pytest.raises(Failure, match="fun"):
        switch.rule(x().requires_grad_(wanted))
    assert state() == before


def test_an_exception_in_a_jvp_rule():
    switch, before = Switch(), state()

    @switch.rule.def_jvp
    def _(primals, tangents):
        raise Failure("jvp")

    with pytest.raises(Failure, match="jvp") as caught:
        torch.func.jvp(switch.rule, (x(),), (x(),))
    assert "raised in jvp (" in caught.value.__notes__[0]
    assert state() == before


@pytest.mark.parametrize("role", ["fun", "fwd", "bwd"])
def test_an_interrupt_during_the_check(role):
    switch, before = Switch(KeyboardInterrupt), state()
    switch.role = role
    with pytest.raises(KeyboardInterrupt, match=role):
        switch.rule(x().requires_grad_())
    assert state() == before
    switch.role = None
    torch.testing.assert_close(backward(switch.rule), torch.cos(x()))
    assert [report.outcome for report in switch.rule.reports] == ["passed"]
