"""jvp, vjp and linearize."""

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

import gradtools as gt

X = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
V = torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)


def two(x, y):
    """Return a tree of outputs, one of them an integer."""
    return {"a": torch.sin(x) * y, "n": x.argmax(), "b": [y.sum() ** 2]}


def test_jvp_in_trees_with_an_integer_output():
    out, moved = gt.jvp(two, (X, V), (V, X))
    assert_close(out["a"], torch.sin(X) * V)
    assert_close(moved["a"], torch.cos(X) * V * V + torch.sin(X) * X)
    assert_close(moved["b"], [2 * V.sum() * X.sum()])
    assert out["n"] == 2
    assert moved["n"] is None


def test_vjp_is_called_again_and_again():
    out, pull = gt.vjp(two, X, V)
    for scale in (1.0, -3.0):
        cotangent = {"a": scale * X, "n": None, "b": [torch.tensor(scale)]}
        dx, dy = pull(cotangent)
        assert_close(dx, scale * X * torch.cos(X) * V)
        assert_close(dy, scale * (X * torch.sin(X) + 2 * V.sum()))
    assert not out["a"].requires_grad


def test_linearize_is_called_again_and_again():
    out, push = gt.linearize(two, X, V)
    assert_close(out["a"], torch.sin(X) * V)
    for scale in (1.0, -3.0, 0.0):
        moved = push(scale * V, scale * X)
        assert_close(moved["a"], scale * (torch.cos(X) * V * V + torch.sin(X) * X))
        assert moved["n"] is None


def test_linearize_where_torch_func_remembers_the_first_call():
    target = torch.rand(3)
    f = lambda x: functional.binary_cross_entropy_with_logits(x, target)
    _, push = gt.linearize(f, X)
    gradient = torch.func.grad(f)(X)
    for v in (V, -V, X):
        assert_close(push(v), gradient @ v)


def test_aux():
    f = lambda x: (torch.sin(x), {"x": 2 * x, "name": "f"})
    for out, other, aux in (
        gt.jvp(f, (X,), (V,), has_aux=True),
        gt.vjp(f, X, has_aux=True),
        gt.linearize(f, X, has_aux=True),
    ):
        assert_close(out, torch.sin(X))
        assert_close(aux["x"], 2 * X)
        assert aux["name"] == "f"
        assert other is not None


class Cube(torch.autograd.Function):
    """Without a jvp: torch has no forward mode of it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


def test_an_operator_without_forward_mode_goes_by_two_reverse_passes():
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(Cube.apply, (X,), (V,))
    assert_close(gt.jvp(Cube.apply, (X,), (V,)), (X**3, 3 * X**2 * V))


def test_forward_mode_that_torch_has_wrong_goes_by_two_reverse_passes():
    index, source = torch.tensor([0, 0, 1]), X + 3
    f = lambda x: x.scatter_reduce(0, index, source * x, "prod")
    assert_close(gt.jvp(f, (X,), (V,))[1], torch.func.jacrev(f)(X) @ V)


def test_it_composes_with_itself_and_with_grad():
    f = lambda x: torch.exp(x).sum()
    d = lambda f: lambda x: gt.jvp(f, (x,), (V,))[1]
    expected = (torch.exp(X) * V**2).sum()
    assert_close(d(d(f))(X), expected)
    assert_close(d(d(d(f)))(X), (torch.exp(X) * V**3).sum())
    assert_close(gt.grad(d(f))(X), torch.exp(X) * V)
    assert_close(d(gt.grad(f))(X), torch.exp(X) * V)
    assert_close(torch.func.grad(d(f))(X), torch.exp(X) * V)
    assert_close(torch.func.jvp(d(f), (X,), (V,))[1], expected)
    each = torch.func.vmap(lambda x, v: gt.jvp(torch.exp, (x,), (v,))[1])(X, V)
    assert_close(each, torch.exp(X) * V)


def test_a_captured_parameter_is_differentiated_rightly():
    w = torch.tensor([1.0, 2.0, 0.5], requires_grad=True)
    f = lambda x, w: (functional.layer_norm(x * w, (3,)) ** 3).sum()
    _, moved = gt.jvp(lambda x: f(x, w), (X,), (V,))
    (found,) = torch.autograd.grad(moved, w)

    def slope(w):
        x = X.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(x, w), x)
        return first @ V

    w = w.detach()
    rows = 1e-5 * torch.eye(3)
    expected = torch.stack([(slope(w + e) - slope(w - e)) / 2e-5 for e in rows])
    assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_the_marker_of_a_rule_is_pushed_and_pulled(unchecked):
    rule = gt.custom_vjp(lambda x: x**2)
    rule.def_bwd(lambda residuals, g: 10 * g * 2 * residuals[0][0])
    assert_close(gt.jvp(rule, (X,), (V,))[1], 20 * X * V)
    assert_close(gt.vjp(rule, X)[1](V)[0], 20 * X * V)
    assert_close(gt.linearize(rule, X)[1](V), 20 * X * V)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gt.jvp(torch.sin, X, V), "jvp: primals must be a tuple"),
        (lambda: gt.jvp(torch.sin, (X,), (V[:1],)), "the tangents do not fit"),
        (lambda: gt.vjp(torch.sin, X)[1](V[:1]), "the cotangents do not fit"),
        (lambda: gt.linearize(torch.sin, X)[1](V, V), "another structure"),
        (lambda: gt.vjp(torch.sin, 3), "vjp: there is no floating"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(gt.DefinitionError, match=words):
        call()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_an_output_without_a_derivative(requires_grad):
    x = torch.tensor([1.0, 3.0, 2.0], requires_grad=requires_grad)
    out, tangent = gt.jvp(torch.argmax, (x,), (x.detach(),))
    assert out == 1
    assert tangent is None
    out, push = gt.linearize(torch.argmax, x)
    assert out == 1
    assert push(x.detach()) is None
