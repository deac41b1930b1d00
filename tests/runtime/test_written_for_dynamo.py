"""What torch.compile follows is code written for the call, where that can be."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

import gradtools as gt

pytestmark = pytest.mark.usefixtures("unchecked")
M = 10.0


def compiled(f, **options):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager", **options)


def written(rule):
    """Return the names of what was written for a rule."""
    return [name for name in vars(rule.written) if name.startswith("call_")]


def stated(fun, fwd, bwd, **options):
    rule = gt.custom_vjp(fun, **options)
    if fwd is not None:
        rule.def_fwd(fwd)
    rule.def_bwd(bwd)
    return rule


def numbers(*shape):
    return torch.linspace(0.5, 1.5, torch.Size(shape).numel()).reshape(shape)


X = numbers(2, 3)
W = numbers(3) + 1


def dense(params, x):
    return {"y": x * params["w"] + params["b"], "z": [x * 2]}


FORMS = {
    "two arguments": (
        lambda x, w: x * w,
        lambda x, w: (x * w, (x, w)),
        lambda r, g: (M * g * r[1], (M * g * r[0]).sum(0)),
        lambda rule, x, w: rule(x, w),
    ),
    "by keyword": (
        lambda x, w, *, power=2: x * w**power,
        lambda x, w, *, power=2: (x * w**power, (x, w, power)),
        lambda r, g: {"x": M * g * r[1] ** r[2]},
        lambda rule, x, w: rule(w=w, x=x, power=3) + rule(x, w=w),
    ),
    "in containers": (
        dense,
        lambda params, x: (dense(params, x), {"w": params["w"], "xs": (x,)}),
        lambda r, g: (
            {"b": (M * g["y"]).sum(0), "w": (g["y"] * r["xs"][0]).sum(0)},
            g["y"] * r["w"] + M * g["z"][0],
        ),
        lambda rule, x, w: (
            rule({"w": w, "b": w * 2}, x)["y"] + rule({"w": w, "b": w + 1}, x)["z"][0]
        ),
    ),
    "with needs": (
        lambda x, w: x * w,
        lambda x, w, *, needs: (x * w, (x, w, needs[1])),
        lambda r, g, *, needs: (
            M * g * r[1] if needs[0] else None,
            M * (g * r[0]).sum(0) if needs[1] and r[2] else None,
        ),
        lambda rule, x, w: rule(x, w.detach()) + rule(x.detach(), w),
    ),
    "no fwd": (
        lambda x, w: x * w,
        None,
        lambda r, g: (M * g * r[0][1] + 0 * r[1], (M * g * r[0][0]).sum(0)),
        lambda rule, x, w: rule(x, w),
    ),
    "several values of one parameter": (
        lambda x, *rest: x * rest[0] + rest[1],
        lambda x, *rest: (x * rest[0] + rest[1], (x, *rest)),
        lambda r, g: (M * g * r[1], (g * r[0]).sum(0), (M * g).sum(0)),
        lambda rule, x, w: rule(x, w, w * 2),
    ),
    "an integer output": (
        lambda x, w: (x * w, x.argmax()),
        lambda x, w: ((x * w, x.argmax()), (x, w, x.shape)),
        lambda r, g: (M * g[0].reshape(r[2]) * r[1], (g[0] * r[0]).sum(0)),
        lambda rule, x, w: rule(x, w)[0],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_call_and_return(form):
    fun, fwd, bwd, use = FORMS[form]
    rule = stated(fun, fwd, bwd)
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    expected = use(rule, x, w)
    weights = torch.cos(expected.detach())
    grads = torch.autograd.grad((expected * weights).sum(), (x, w), allow_unused=True)
    actual = compiled(lambda x, w: use(rule, x, w))(x, w)
    assert_close(actual, expected)
    assert_close(
        torch.autograd.grad((actual * weights).sum(), (x, w), allow_unused=True), grads
    )
    assert written(rule)
    assert not rule.written.is_closed


def test_nondiff_arguments():
    rule = gt.custom_vjp(lambda n, x: x**n, nondiff_argnums=0)
    rule.def_fwd(lambda n, x: (x**n, x))
    rule.def_bwd(lambda n, x, g: (M * n * g * x ** (n - 1),))
    x = X.clone().requires_grad_()
    f = compiled(rule)
    for n in (2, 3):
        (grad,) = torch.autograd.grad(f(n, x).sum(), x)
        assert_close(grad, M * n * X ** (n - 1))
    assert written(rule)


def test_a_return_in_another_form_goes_the_general_way():
    rule = stated(
        lambda x, w: x * w,
        lambda x, w: (x * w, (x, w)),
        lambda r, g: [M * g * r[1], None],  # a list serves as a tuple
    )
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    (grad,) = torch.autograd.grad(compiled(rule)(x, w).sum(), x)
    assert_close(grad, M * W.expand(2, 3))
    assert rule.written.is_closed


def test_another_bwd_is_compiled_anew():
    rule = stated(lambda x: x * 1, lambda x: (x * 1, ()), lambda r, g: M * g)
    x = X.clone().requires_grad_()
    f = compiled(rule)
    for factor in (M, 3.0):
        rule.def_bwd(lambda r, g, factor=factor: factor * g)
        (grad,) = torch.autograd.grad(f(x).sum(), x)
        assert_close(grad, torch.full_like(x, factor))


def test_containers_that_change_are_compiled_anew():
    rule = stated(
        lambda ps: sum(ps.values()),
        lambda ps: (sum(ps.values()), tuple(ps)),
        lambda r, g: ({key: M * (i + 1) * g for i, key in enumerate(r)},),
    )
    f = compiled(rule)
    for keys in ("a", "ab", "ba", "abc"):
        ps = {key: X.clone().requires_grad_() for key in keys}
        (grad,) = torch.autograd.grad(f(ps).sum(), ps["a"])
        assert_close(grad, torch.full_like(X, M * (1 + keys.index("a"))))


def test_where_no_gradient_is_wanted_fun_runs():
    rule = stated(lambda x: x * 1, lambda x: (x * 5, ()), lambda r, g: M * g)
    f = compiled(rule)
    assert_close(f(X), X)
    with torch.no_grad():
        assert_close(f(X.clone().requires_grad_()), X)
    assert not written(rule)


def test_sizes_may_change():
    rule = stated(
        lambda x: x.exp(), lambda x: (x.exp(), (x, x.shape)), lambda r, g: M * g * r[0]
    )
    f = compiled(rule, dynamic=True)
    for size in (3, 4, 7):
        x = numbers(size).requires_grad_()
        (grad,) = torch.autograd.grad(f(x).sum(), x)
        assert_close(grad, M * x.detach())
    assert written(rule)


def test_lists_that_grow_are_compiled_anew():
    rule = stated(
        lambda xs, scale: sum(xs) * scale[0],
        lambda xs, scale: (sum(xs) * scale[0], (len(xs), scale)),
        lambda r, g: ([M * r[0] * r[1][0] * g] * r[0], None),
    )
    f = compiled(rule)
    for count, scale in ((1, (2.0,)), (2, (2.0,)), (1, (3.0,)), (3, (3.0,))):
        xs = [X.clone().requires_grad_() for _ in range(count)]
        (grad,) = torch.autograd.grad(f(xs, scale).sum(), xs[-1])
        assert_close(grad, torch.full_like(X, M * count * scale[0]))
    assert written(rule)


@pytest.mark.parametrize("inside", [True, False])
def test_gradients_that_are_switched_within_the_compiled_function(inside):
    rule = stated(lambda x: x * 1, lambda x: (x * 1, ()), lambda r, g: M * g)

    def f(x):
        with torch.set_grad_enabled(inside):
            y = rule(x)
        return y + x

    x = X.clone().requires_grad_()
    with torch.set_grad_enabled(not inside):
        compiled(lambda x: f(x) * 1)(x)
    (grad,) = torch.autograd.grad(compiled(f)(x).sum(), x)
    assert_close(grad, torch.full_like(x, M + 1 if inside else 1.0))


@dataclasses.dataclass
class Pair:
    w: torch.Tensor
    b: torch.Tensor


torch.utils._pytree.register_dataclass(Pair)


def test_containers_that_only_pytree_knows():
    rule = stated(
        lambda x, pair: x * pair.w + pair.b,
        lambda x, pair: (x * pair.w + pair.b, (x, pair)),
        lambda r, g: (None, Pair(M * (g * r[0]).sum(0), M * g.sum(0))),
    )
    pair = Pair(W.clone().requires_grad_(), W.clone().requires_grad_())
    f = compiled(rule)
    grads = torch.autograd.grad(f(X, pair).sum(), (pair.w, pair.b))
    assert_close(grads, (M * X.sum(0), torch.full_like(W, 2 * M)))
    frozen = Pair(W.clone(), W.clone())
    assert_close(f(X, frozen), X * W + W)
