"""Ten thousand calls leave nothing behind."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

import gradtools as gt
from tests.runtime.rules import native, swish

STATM = Path("/proc/self/statm")


def resident_pages():
    """Return the pages of memory that the process holds now."""
    return int(STATM.read_text().split()[1])


def objects():
    gc.collect()
    return len(gc.get_objects())


def growth(work, calls):
    """Return how many objects ``calls`` of ``work`` add, after some to warm up."""
    for _ in range(20):
        work()
    before = objects()
    for _ in range(calls):
        work()
    return objects() - before


def backward():
    x = torch.ones(3, requires_grad=True)
    beta = torch.tensor(1.0, requires_grad=True)
    swish(x, beta).sum().backward()


def double_backward():
    x = torch.ones(3, requires_grad=True)
    out = swish(x, torch.tensor(1.0)).sum()
    (first,) = torch.autograd.grad(out, x, create_graph=True)
    torch.autograd.grad(first.sum(), x)


def per_sample():
    torch.func.vmap(torch.func.grad(swish), (0, None))(torch.ones(3), torch.tensor(1.0))


def tangents():
    x = torch.ones(3)
    torch.func.jvp(lambda x: swish(x, torch.tensor(1.0)), (x,), (x,))


def refused():
    with pytest.raises(TypeError, match="swish"):
        swish(torch.ones(3, requires_grad=True))


@pytest.mark.parametrize(
    ("work", "calls"),
    [
        (backward, 10_000),
        (double_backward, 1_000),
        (per_sample, 1_000),
        (tangents, 1_000),
        (refused, 1_000),
    ],
)
def test_calls_leave_no_objects(work, calls):
    assert growth(work, calls) < 50


@pytest.mark.skipif(not STATM.exists(), reason="no /proc: the memory is not known")
def test_ten_thousand_calls_do_not_grow_the_process():
    growth(backward, 1_000)
    before = resident_pages()
    growth(backward, 10_000)
    grown = resident_pages() - before
    assert grown < 512  # a leaked tensor per call would be more than 1,000 pages


@pytest.mark.usefixtures("unchecked")
def test_new_shapes_floats_and_lambdas_do_not_pile_up():
    @gt.custom_vjp
    def applied(x, factor, function):
        return factor * function(x)

    applied.def_bwd(lambda residuals, g: (g * residuals[0][1], None, None))
    before = objects()
    for step in range(3_000):
        x = torch.ones(1 + step % 100, requires_grad=True)
        applied(x, 1 / (1 + step), lambda x: x + 1).sum().backward()
    lowered = applied._lowered
    assert len(lowered.plans) <= 512
    assert len(lowered.states) <= 17
    per_plan = (objects() - before) / len(lowered.plans)
    assert per_plan < 100


def test_a_rule_that_is_dropped_is_collected():
    rule = gt.custom_vjp(native)
    rule.defvjp(swish.rule.fwd, swish.rule.bwd)
    rule(torch.ones(3, requires_grad=True), torch.tensor(1.0)).sum().backward()
    torch.func.vmap(torch.func.grad(rule), (0, None))(torch.ones(3), torch.tensor(1.0))
    watched = weakref.ref(rule)
    del rule
    gc.collect()
    assert watched() is None


def test_a_remembered_failure_holds_no_tensors():
    rule = gt.custom_vjp(native)
    rule.def_bwd(lambda residuals, g: (g, None))
    x = torch.ones(3, requires_grad=True)
    watched = weakref.ref(x)
    for _ in range(2):
        with pytest.raises(gt.GradientMismatchError, match="not the derivative"):
            rule(x, torch.tensor(1.0))
    del x
    gc.collect()
    assert watched() is None
