"""The gradient of a kernel: checked on the kernel, of any order, by any transform."""

import warnings

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import gradtools as gt
from tests.rules.stating import gradients, twice_backward

X = torch.tensor([0.5, -1.25, 2.0], dtype=torch.float64)
W = torch.tensor([1.5, 0.25, -0.5], dtype=torch.float64)


def like(x, *rest, **named):
    return torch.empty_like(x)


@gt.external(out=like, numpy=True)
def product(x, w):
    return x * w


@product.def_bwd
def _(residuals, g):
    (x, w), _ = residuals
    return product(g, w), product(g, x)


@gt.external(out=like, numpy=True)
def cube(x):
    return x**3


@cube.def_bwd
def _(residuals, g):
    ((x,), _) = residuals
    return product(product(g, x), 3 * x)


def by_torch(x):
    return x**3


# The check on first use.


def test_the_check_runs_on_the_kernel_itself():
    calls = []

    @gt.external(out=like, numpy=True)
    def sine(x):
        calls.append((x.dtype, gt.is_checking()))
        return np.sin(x)

    sine.def_bwd(lambda residuals, g: g * residuals[0][0].cos())
    x = X.float().requires_grad_()
    sine(x).sum().backward()
    assert_close(x.grad, X.float().cos())
    (report,) = sine.reports
    assert report.outcome == "passed"
    asked = {e.question: e for e in report.evidence}
    assert asked["derivative in x by differences"].error < 1e-6  # in double precision
    checking = [dtype for dtype, is_check in calls if is_check]
    assert checking.count(np.dtype("float64")) > 5
    assert [dtype for dtype, is_check in calls if not is_check] == [np.dtype("float32")]


def test_a_wrong_gradient_is_found_on_the_kernel():
    wrong = gt.external(np.sin, out=like, numpy=True)
    wrong.def_bwd(lambda residuals, g: -g * residuals[0][0].cos())
    with pytest.raises(gt.GradientMismatchError, match=r"x") as error:
        wrong(X.clone().requires_grad_())
    assert error.value.kind == "sign"


def only_float32(how, slope, **options):
    """Return exp as a kernel that was written for float32 alone."""

    @gt.external(out=like, **options)
    def exp(x):
        if x.dtype == torch.float32:
            return x.exp()
        if how == "raise":
            raise TypeError("float32 only")
        # as C does that is handed doubles for floats
        out = torch.empty_like(x)
        half = x.view(torch.float32)[: len(x)]
        out.view(torch.float32).zero_()[: len(x)] = half.exp()
        return out

    exp.def_bwd(lambda residuals, g: g * slope(residuals[1]))
    return exp


@pytest.mark.parametrize("how", ["raise", "garbage"])
def test_a_kernel_of_float32_is_checked_in_float32(how):
    x = X.float().requires_grad_()
    right = only_float32(how, lambda y: y)
    right(x).sum().backward()
    assert_close(x.grad, X.float().exp())
    (report,) = right.reports
    assert report.outcome == "passed"
    asked = {e.question: e for e in report.evidence}
    assert 1e-9 < asked["derivative in x by differences"].error < 1e-3
    with pytest.raises(gt.GradientMismatchError, match=r"1\.1"):
        only_float32(how, lambda y: 1.1 * y)(x)


def test_dtypes_keep_the_check_to_what_the_kernel_takes():
    seen = set()

    @gt.external(out=like, dtypes=torch.float32)
    def exp(x):
        seen.add(x.dtype)
        return x.exp()

    exp.def_bwd(lambda residuals, g: g * residuals[1])
    exp(X.float().requires_grad_())
    assert seen == {torch.float32}
    assert exp.reports[0].outcome == "passed"


def test_nan_far_out_is_no_alarm():
    """The check goes to 100 times the size, where this kernel has no answer."""

    @gt.external(out=like, numpy=True)
    def arcsine(x):
        with np.errstate(invalid="ignore"):
            return np.arcsin(x)

    arcsine.def_bwd(lambda r, g: g / (1 - r[0][0] ** 2).sqrt())
    x = (X / 5).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not finite there is said
        assert_close(gradients(arcsine(x), x)[0], 1 / (1 - X**2 / 25).sqrt())


# Orders and transforms, against torch's own function.


def slope_summed(function):
    return lambda x: torch.func.grad(function)(x).sum()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_derivatives_of_every_order(order):
    ours, right = (lambda x: cube(x).sum()), (lambda x: by_torch(x).sum())
    for _ in range(order):
        ours, right = slope_summed(ours), slope_summed(right)
    assert_close(ours(X), right(X))


def test_second_order_by_plain_autograd():
    assert_close(twice_backward(cube, X), 6 * X)


def test_forward_mode_and_its_compositions():
    t = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert_close(torch.func.jvp(cube, (X,), (t,))[1], 3 * X**2 * t)
    loss = lambda x: cube(x).sum()
    assert_close(torch.func.jvp(torch.func.grad(loss), (X,), (t,))[1], 6 * X * t)
    assert_close(torch.func.hessian(loss)(X), (6 * X).diag())
    assert_close(torch.func.jacfwd(cube)(X), (3 * X**2).diag())
    assert_close(torch.func.jacrev(cube)(X), (3 * X**2).diag())
    assert_close(gt.hvp(loss, (X,), (t,))[0], 6 * X * t)


def test_a_jvp_rule():
    sine = gt.external(np.sin, out=like, numpy=True)
    sine.def_bwd(lambda residuals, g: g * residuals[0][0].cos())

    @sine.def_jvp
    def _(primals, tangents):
        (x,), (t,) = primals, tangents
        return sine(x), t * x.cos()

    out, tangent = torch.func.jvp(sine, (X,), (X,))
    assert_close((out, tangent), (X.sin(), X * X.cos()))


def test_a_fwd_that_calls_another_kernel():
    @gt.external(out=lambda x: (torch.empty_like(x),) * 2, numpy=True)
    def sine_and_cosine(x):
        return np.sin(x), np.cos(x)

    sine = gt.external(np.sin, out=like, numpy=True)
    sine.defvjp(sine_and_cosine, lambda c, g: g * c)
    x = X.clone().requires_grad_()
    assert_close(gradients(sine(x), x)[0], X.cos())


def test_a_gradient_that_is_opaque_serves_once():
    opaque = gt.external(
        lambda x: x**3,
        out=like,
        numpy=True,
        gradient=gt.external(lambda g, x: 3 * g * x**2, out=like, numpy=True),
    )
    assert_close(torch.func.grad(lambda x: opaque(x).sum())(X), 3 * X**2)
    loss = lambda x: opaque(x).sum()
    with pytest.raises(gt.TransformError, match="bwd cannot be differentiated") as e:
        twice_backward(opaque, X)
    assert "make it a rule of its own" in e.value.fix
    with pytest.raises(gt.TransformError, match="bwd cannot be differentiated"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(X)


def test_a_gradient_with_a_rule_serves_at_every_order():
    slope = gt.external(lambda g, x: 3 * g * x**2, out=like, numpy=True)
    slope.def_bwd(lambda r, c: (c * 3 * r[0][1] ** 2, c * 6 * r[0][0] * r[0][1]))
    opaque = gt.external(lambda x: x**3, out=like, numpy=True, gradient=slope)
    assert_close(twice_backward(opaque, X), 6 * X)
    assert_close(torch.func.hessian(lambda x: opaque(x).sum())(X), (6 * X).diag())


def test_once_differentiable():
    once = gt.external(lambda x: x**2, out=like, numpy=True, once_differentiable=True)
    once.def_bwd(lambda residuals, g: 2 * g * residuals[0][0])
    with pytest.raises(gt.TransformError, match="once_differentiable"):
        twice_backward(once, X)


def test_gradient_takes_the_cotangent_first_and_keywords():
    @gt.external(
        out=lambda x, w, *, n: (x, w),
        gradient=lambda g, x, w, *, n: {"x": n * g[0] * w, "w": n * g[0] * x + g[1]},
    )
    def both(x, w, *, n):
        return n * x * w, w.clone()

    loss = lambda x, w: sum(out.sum() for out in both(x, w, n=3))
    found = torch.func.grad(loss, (0, 1))(X, W)
    assert_close(found, (3 * W, 3 * X + 1))


# vmap.

MODES = ["sequential", "expand_dims", "broadcast_all"]


def shapes_and_kernel(mode):
    seen = []

    @gt.external(out=lambda x, w: x * w, vmap=mode, numpy=True)
    def scaled(x, w):
        seen.append((x.shape, w.shape))
        return x * w

    @scaled.def_bwd
    def _(residuals, g):
        (x, w), _ = residuals
        return g * w, g * x

    return scaled, seen


@pytest.mark.parametrize(
    ("mode", "shapes"),
    [
        ("sequential", [((3,), (3,))] * 2),
        ("expand_dims", [((2, 3), (1, 3))]),
        ("broadcast_all", [((2, 3), (2, 3))]),
    ],
)
def test_what_the_kernel_sees_of_a_batch(mode, shapes):
    scaled, seen = shapes_and_kernel(mode)
    with gt.gradcheck_policy("off"):
        out = torch.func.vmap(scaled, (0, None))(torch.stack([X, 2 * X]), W)
    assert_close(out, torch.stack([X * W, 2 * X * W]))
    assert seen == shapes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dims", [(0, None), (1, None), (None, 0), (0, 0), (-1, 1)])
def test_nested_batches_and_their_gradients(mode, dims):
    scaled, _ = shapes_and_kernel(mode)
    place = lambda t, dim: t if dim is None else t.movedim(0, dim)
    batch = torch.stack([X, W, X - W, X + W]).reshape(2, 2, 3)
    inner = [0 if dim is not None else None for dim in dims]
    args = [
        W if dim is None else place(k * batch, dim)
        for k, dim in zip((1, 2), dims, strict=True)
    ]

    def nested(function):
        return torch.func.vmap(torch.func.vmap(function, tuple(inner)), dims)(*args)

    native = lambda x, w: x * w
    assert_close(nested(scaled), nested(native))
    loss = lambda f: torch.func.grad(lambda x, w: (f(x, w) ** 2).sum(), (0, 1))
    assert_close(nested(loss(scaled)), nested(loss(native)))
    total = lambda f: torch.func.grad(
        lambda *args: (
            (torch.func.vmap(torch.func.vmap(f, tuple(inner)), dims)(*args))
            .square()
            .sum()
        ),
        (0, 1),
    )(*args)
    assert_close(total(scaled), total(native))


def test_vmap_of_second_derivatives():
    batch = torch.stack([X, W])
    hessians = torch.func.vmap(torch.func.hessian(lambda x: cube(x).sum()))(batch)
    assert_close(hessians, torch.stack([(6 * X).diag(), (6 * W).diag()]))


def test_a_kernel_that_mixes_the_batch_is_found():
    mixed = gt.external(lambda x: x - x.mean(), out=like, vmap="broadcast_all")
    with pytest.raises(gt.GradientMismatchError, match="mixes the batch"):
        torch.func.vmap(mixed)(torch.stack([X, 2 * W]))


def test_a_def_vmap():
    doubled = gt.external(lambda x: 2 * x, out=like)
    doubled.def_vmap(lambda info, in_dims, x: (20 * x, in_dims[0]))
    with gt.gradcheck_policy("off"):
        assert_close(
            torch.func.vmap(doubled)(torch.stack([X, W])), 20 * torch.stack([X, W])
        )
