"""Edits in place and random answers are found at the first call."""

import random

import numpy as np
import pytest
import torch

import gradtools as gt


def sine(x):
    return torch.sin(x)


def slope(residuals, g):
    return g * residuals[0].cos()


def stated(*, fun=sine, fwd=None, bwd=slope):
    rule = gt.custom_vjp(fun)
    rule.defvjp(fwd or (lambda x: (fun(x), (x,))), bwd)
    return rule


def points():
    return torch.linspace(0.1, 1.0, 4)


def fails_at_the_first_call(rule, kind, match, *args):
    """Call a rule, expect its check to fail, and its arguments to be untouched."""
    args = args or (points().requires_grad_(),)
    tensors = torch.utils._pytree.tree_leaves(args)
    before = [(t.detach().clone(), t._version) for t in tensors]
    with pytest.raises(gt.GradientMismatchError, match=match) as caught:
        rule(*args)
    assert caught.value.kind == kind
    for tensor, (values, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, values)
        assert (tensor._version, tensor.grad) == (version, None)
    return caught.value


# Edits in place.


def doubled(x):
    with torch.no_grad():
        x.mul_(2)


def doubled_data(x):
    x.data.mul_(2)


def doubled_numpy(x):
    array = x.detach().numpy()
    array *= 2


def part_set(x):
    with torch.no_grad():
        x[0] = 5.0


def edited_and_restored(x):
    values = x.detach().clone()
    with torch.no_grad():
        x.zero_()
        x.copy_(values)


HERE = torch.empty(()).device  # where tensors are made: --device
EDITS = [
    doubled,
    doubled_data,
    pytest.param(doubled_numpy, marks=pytest.mark.on_cpu),
    part_set,
    edited_and_restored,
]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_an_input_by_fun_is_found(edit):
    def fun(x):
        out = torch.sin(x)
        edit(x)
        return out

    rule = stated(fun=fun, fwd=lambda x: (torch.sin(x), (x,)))
    error = fails_at_the_first_call(rule, "in place", r"fun: fun changes args\.x in pl")
    assert error.violations[0].where == "args.x"


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_an_input_by_fwd_is_found(edit):
    def fwd(x):
        out, angle = torch.sin(x), x.clone()
        edit(x)
        return out, (angle,)

    fails_at_the_first_call(
        stated(fwd=fwd), "in place", r"sine: fwd changes args\.x in place"
    )


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(
    ("kept", "name"),
    [
        (lambda x, out: x, r"args\.x"),
        (lambda x, out: out, r"residual 0 \(an output\)"),
        (lambda x, out: x.cos(), "residual 0"),
    ],
)
def test_an_edit_of_a_residual_by_bwd_is_found(edit, kept, name):
    def fwd(x):
        out = torch.sin(x)
        return out, (kept(x, out), x.clone())

    def bwd(residuals, g):
        edited, x = residuals
        result = g * x.cos()
        edit(edited)
        return result

    rule = stated(fwd=fwd, bwd=bwd)
    fails_at_the_first_call(rule, "in place", f"sine: bwd changes {name} in place")


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_the_cotangent_by_bwd_is_found(edit):
    def bwd(residuals, g):
        result = g * residuals[0].cos()
        edit(g)
        return result

    rule = stated(bwd=bwd)
    error = fails_at_the_first_call(
        rule, "in place", "bwd changes the cotangent of output 0 in place"
    )
    assert "bwd (" in error.function
    assert str(__file__) in error.function


def test_the_cotangent_of_the_second_output_is_named():
    def fun(x):
        return torch.sin(x), torch.cos(x)

    def bwd(residuals, cotangents):
        ((x,), _), (g, h) = residuals, cotangents
        return g * x.cos() - h.mul_(x.sin())

    rule = gt.custom_vjp(fun)
    rule.def_bwd(bwd)
    fails_at_the_first_call(
        rule, "in place", "bwd changes the cotangent of output 1 in place"
    )


def test_an_argument_inside_a_pytree_is_named_by_its_path():
    def scaled(params, x):
        return params["layers"][1] * x

    @gt.custom_vjp
    def rule(params, x):
        return scaled(params, x)

    @rule.def_bwd
    def _(residuals, g):
        (params, x), _ = residuals
        weights = {"layers": [None, g * x]}, g * params["layers"][1]
        params["layers"][1].add_(1)
        return weights

    params = {"layers": [points().requires_grad_(), points().requires_grad_()]}
    error = fails_at_the_first_call(
        rule, "in place", r"bwd changes args\.params", params, points()
    )
    assert [v.where for v in error.violations] == ["args.params['layers'][1]"]


def test_an_edit_of_what_needs_no_gradient_is_part_of_the_function():
    @gt.custom_vjp
    def counted(x, count):
        count.add_(1)
        return torch.sin(x)

    counted.def_bwd(lambda residuals, g: (g * residuals[0][0].cos(), None))
    count = torch.zeros((), dtype=torch.int64)
    counted(points().requires_grad_(), count)
    assert count.item() == 1
    (report,) = counted.reports
    assert "fun edits args.count in place" in str(report)


def test_an_edit_that_is_idempotent_is_found_as_well():
    def fwd(x):
        x.data.clamp_(min=0)  # the second run changes nothing any more
        return x.clone(), (x,)

    rule = stated(
        fun=lambda x: x.clamp(min=0),
        fwd=fwd,
        bwd=lambda residuals, g: g * (residuals[0] > 0),
    )
    x = torch.tensor([-1.0, 2.0, 3.0])
    fails_at_the_first_call(
        rule, "in place", r"fwd changes args\.x in place", x.clone().requires_grad_()
    )


# What reaches bwd past the residuals.


class Shelf:
    pass


def handed_over(way):
    """Return a rule whose bwd finds the argument where fwd has left it."""
    shelf = Shelf()
    put, get = {
        "a dict": (vars(shelf).update, lambda: shelf.x),
        "an attribute": (lambda x: setattr(shelf, "x", x), lambda: shelf.x),
    }[way]

    def fwd(x):
        put(x=x.detach()) if way == "a dict" else put(x.detach())
        return torch.sin(x), ()

    return stated(fwd=fwd, bwd=lambda residuals, g: g * get().cos())


@pytest.mark.parametrize("way", ["a dict", "an attribute"])
def test_what_fwd_leaves_outside_of_the_residuals_is_found(way):
    error = fails_at_the_first_call(
        handed_over(way), "state", r"args\.x depends on which call of fwd came last"
    )
    assert "among the residuals" in error.fix


def test_what_is_left_of_an_argument_without_a_gradient_is_found_as_well():
    shelf = Shelf()

    def fwd(x, w):
        shelf.w = w
        return x * w, ()

    rule = stated(fun=lambda x, w: x * w, fwd=fwd, bwd=lambda _, g: (g * shelf.w, None))
    fails_at_the_first_call(
        rule, "state", "came last", points().requires_grad_(), points()
    )


def test_a_tensor_inside_an_opaque_residual_is_watched_for_edits():
    def fwd(x):
        shelf = Shelf()
        shelf.x = x
        return torch.sin(x), shelf

    rule = stated(fwd=fwd, bwd=lambda shelf, g: g * shelf.x.cos())
    leaf = points().requires_grad_()
    x = leaf * 1.0
    rule(x).sum().backward()
    assert torch.equal(leaf.grad, points().cos())
    out = rule(x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(gt.TransformError, match="changed in place after fwd") as caught:
        out.sum().backward()
    assert caught.value.violations == (
        ("residuals, a Shelf (x)", "a tensor at version 0", "version 1"),
    )


# Random numbers.


def draws_of(source):
    if source == "a private generator":
        generator = torch.Generator(HERE).manual_seed(0)
        return lambda: torch.rand(4, generator=generator)
    if source == "a counter":
        calls = []
        return lambda: calls.append(0) or torch.full((4,), float(len(calls)))
    return {
        "torch": lambda: torch.rand(4),
        "numpy": lambda: torch.from_numpy(np.random.rand(4)).to(HERE),
        "random": lambda: torch.full((4,), random.random()),
    }[source]


GLOBAL = ["torch", "numpy", "random"]
PRIVATE = ["a private generator", "a counter"]


@pytest.mark.parametrize("source", GLOBAL + PRIVATE)
def test_a_bwd_that_draws_is_found(source):
    draw = draws_of(source)
    rule = stated(bwd=lambda r, g: g * r[0].cos() * (0.5 + draw()))
    error = fails_at_the_first_call(
        rule, "random", r"bwd does not give the same answer twice for args\.x"
    )
    assert "among the residuals" in error.fix


@pytest.mark.parametrize("source", PRIVATE)
def test_a_fwd_that_draws_from_a_state_of_its_own_is_found(source):
    draw = draws_of(source)

    def noisy(x):
        return x * draw()

    def fwd(x):
        mask = draw()
        return x * mask, (mask,)

    rule = stated(fun=noisy, fwd=fwd, bwd=lambda r, g: g * r[0])
    fails_at_the_first_call(rule, "random", "fwd does not give the same answer twice")


@pytest.mark.parametrize("source", GLOBAL)
def test_a_mask_that_fwd_draws_and_keeps_is_fine(source):
    draw = draws_of(source)

    def dropout(x):
        return x * (draw() > 0.3)

    def fwd(x):
        mask = draw() > 0.3
        return x * mask, (mask,)

    rule = stated(fun=dropout, fwd=fwd, bwd=lambda r, g: g * r[0])
    rule(points().requires_grad_())
    assert [report.outcome for report in rule.reports] == ["passed"]


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_the_generators_are_where_they_were_after_a_check(factor):
    def drawn():
        by_numpy = torch.from_numpy(np.random.rand(4)).to(HERE)
        return torch.rand(4) + by_numpy + random.random()

    def fwd(x):
        mask = drawn()
        return x * mask, (mask,)

    rule = stated(
        fun=lambda x: x * drawn(), fwd=fwd, bwd=lambda r, g: factor * g * r[0]
    )

    def states():
        kind, key, position, *rest = np.random.get_state()
        numpy_state = kind, key.tolist(), position, rest
        return torch.get_rng_state().tolist(), numpy_state, random.getstate()

    before = states()
    if factor == 1.0:
        assert rule.gradcheck(points()).outcome == "passed"
    else:
        with pytest.raises(gt.GradientMismatchError, match="not the derivative"):
            rule.gradcheck(points())
    assert states() == before


def test_a_large_argument_that_fun_would_edit_is_left_alone():
    rule = gt.custom_vjp(lambda x: x.mul_(2.0))
    rule.defvjp(lambda x: (x * 2.0, ()), lambda residuals, g: 2 * g)
    arg = torch.ones(2**14, requires_grad=True)
    with pytest.raises(gt.GradientMismatchError, match=r"fun changes args\.x in place"):
        rule(arg)
    assert torch.equal(arg, torch.ones(2**14))
    assert arg._version == 0
