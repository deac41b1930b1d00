"""Forward mode: bwd transposed, or the rule that def_jvp states."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing import assert_close

import gradtools as gt
from tests.rules.stating import gradients, leaf, stated

pytestmark = pytest.mark.usefixtures("unchecked")

X = torch.tensor([0.5, -1.2, 2.0], dtype=torch.float64)
V = torch.tensor([1.0, 0.3, -2.0], dtype=torch.float64)


def with_bwd(bwd):
    return stated(torch.sin, lambda x: (x.sin(), x), bwd)


def functional(rule, x, v):
    return torch.func.jvp(rule, (x,), (v,))


def dual(rule, x, v):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(rule(forward_ad.make_dual(x, v))))


modes = pytest.mark.parametrize("jvp", [functional, dual])


@modes
def test_it_is_the_transpose_of_bwd_and_not_the_derivative_of_fun(jvp):
    matrix = torch.randn(3, 3)
    rule = with_bwd(lambda x, g: x * (matrix @ g))
    assert_close(jvp(rule, X, V), (X.sin(), matrix.T @ (X * V)))


@modes
@pytest.mark.parametrize(
    "bwd",
    [
        lambda x, g: (g * x.cos()).clamp(-1, 1),
        lambda x, g: (g * x.cos()).clamp(-20, 20),
        lambda x, g: g.sign(),
        lambda x, g: g / g.norm(),
        lambda x, g: g * x.cos() + 1,
        lambda x, g: g * g,
        lambda x, g: g.abs() * x.cos(),
        lambda x, g: torch.where(g.abs() > 3, 3 * g.sign(), g),
        lambda x, g: g.round(),
    ],
)
def test_a_bwd_that_is_not_linear_has_no_transpose(jvp, bwd):
    rule = with_bwd(bwd)
    with pytest.raises(
        gt.TransformError, match="not linear in its cotangent"
    ) as caught:
        jvp(rule, X, V)
    assert "def_jvp" in caught.value.fix
    assert caught.value.violations[0].where == "cotangent"
    x = X.clone().requires_grad_()
    assert_close(gradients(rule(x), x), (bwd(X, torch.ones(3)),))


def test_reverse_mode_before_does_not_hide_it_and_a_definition_mends_it():
    rule = with_bwd(lambda x, g: g.clamp(-1, 1))
    gradients(rule(x := leaf(1.0)), x)
    with pytest.raises(gt.TransformError, match="not linear"):
        functional(rule, X, V)
    rule.def_jvp(lambda p, t: (p[0].sin(), 7 * t[0]))
    assert_close(functional(rule, X, V), (X.sin(), 7 * V))


@modes
def test_def_jvp_is_what_runs(jvp):
    rule = with_bwd(lambda x, g: g * x.cos())
    rule.def_jvp(lambda p, t: (p[0].sin(), 10 * t[0] * p[0].cos()))
    assert_close(jvp(rule, X, V), (X.sin(), 10 * V * X.cos()))


def test_the_derivative_of_a_jvp_rule_is_that_of_its_code():
    rule = with_bwd(lambda x, g: g * x.cos())
    rule.def_jvp(lambda p, t: (p[0].sin(), t[0] * p[0] ** 3))

    def tangent(x):
        return torch.func.jvp(rule, (x,), (V,))[1]

    assert_close(functional(tangent, X, V)[1], V * V * 3 * X**2)
    assert_close(torch.func.jacrev(tangent)(X), torch.diag(V * 3 * X**2))


def test_a_rule_of_several_arguments_gets_zeros_for_what_does_not_move():
    seen = []
    rule = stated(
        lambda x, n, p: x * n * p["w"], bwd=lambda r, g: {"x": g * 0, "p": None}
    )

    @rule.def_jvp
    def _(primals, tangents):
        seen.append(tangents)
        x, n, p = primals
        return x * n * p["w"], tangents[0] * n * p["w"] + x * n * tangents[2]["w"]

    w = torch.full((3,), 5.0)
    out = torch.func.jvp(lambda x: rule(x, 2, {"w": w, "i": 3}), (X,), (V,))
    assert_close(out, (X * 10, V * 10))
    assert_close(seen[-1], (V, None, {"w": torch.zeros(3), "i": None}))


def test_integer_outputs_have_no_tangent():
    rule = stated(
        lambda x: x.topk(2),
        lambda x: ((found := x.topk(2)), (found.indices, x.shape)),
        lambda r, g: 10 * torch.zeros(r[1]).scatter(0, r[0], g.values),
    )
    out, tangent = torch.func.jvp(lambda x: rule(x).values, (X,), (V,))
    assert_close((out, tangent), (X[[2, 0]], 10 * V[[2, 0]]))
    indices, none = torch.func.jvp(lambda x: rule(x).indices, (X,), (V,))
    assert indices.tolist() == [2, 0]
    assert not none.any()
    with forward_ad.dual_level():
        out = rule(forward_ad.make_dual(X, V))
        assert_close(forward_ad.unpack_dual(out.values).tangent, 10 * V[[2, 0]])
        assert forward_ad.unpack_dual(out.indices).tangent is None


@pytest.mark.parametrize("materialize", [True, False])
def test_outputs_are_independent_of_each_other(materialize):
    def bwd(_, g):
        first, second = (torch.zeros(3) if c is None else c for c in g)
        return 10 * first + 100 * second

    rule = stated(
        lambda x: (2 * x, 3 * x),
        lambda x: ((2 * x, 3 * x), ()),
        bwd,
        materialize_grads=materialize,
    )
    _, tangents = torch.func.jvp(rule, (X,), (V,))
    assert_close(tangents, (10 * V, 100 * V))


def test_the_transpose_at_zero_is_no_nan():
    """bwd of logcumsumexp takes the logarithm of its cotangent."""

    def bwd(r, g):
        x, y = r
        parts = [(g.clamp(min=0).log() - y), ((-g).clamp(min=0).log() - y)]
        positive, negative = (
            (p.flip(0).logcumsumexp(0).flip(0) + x).exp() for p in parts
        )
        return positive - negative

    rule = stated(
        lambda x: x.logcumsumexp(0), lambda x: ((y := x.logcumsumexp(0)), (x, y)), bwd
    )
    expected = torch.func.jvp(lambda x: x.logcumsumexp(0), (X,), (V,))
    assert_close(torch.func.jvp(rule, (X,), (V,)), expected)


def test_a_bwd_that_is_linear_over_the_reals_only_is_linear():
    z = torch.complex(X, V)
    rule = stated(
        lambda z: z.conj() * z, lambda z: (z.conj() * z, z), lambda z, g: 2 * z * g.real
    )
    expected = torch.func.jvp(lambda z: z.conj() * z, (z,), (z * 1j + 1,))
    assert_close(torch.func.jvp(rule, (z,), (z * 1j + 1,)), expected)


def test_a_rule_that_calls_itself_has_a_forward_mode():
    """As the solution of a linear system does, whose derivative is another solution."""
    rule = gt.custom_vjp(lambda k, x: torch.exp(k * x))
    rule.def_fwd(lambda k, x: (torch.exp(k * x), (k, x)))
    rule.def_bwd(lambda residuals, g: {"x": g * residuals[0] * rule(*residuals)})
    x, v = torch.randn(3), torch.randn(3)
    assert_close(
        torch.func.jvp(lambda x: rule(2.0, x), (x,), (v,))[1], 2 * torch.exp(2 * x) * v
    )
    stated = gt.custom_vjp(lambda k, x: torch.exp(k * x))
    stated.def_fwd(lambda k, x: (torch.exp(k * x), (k, x)))
    stated.def_bwd(lambda residuals, g: {"x": g * residuals[0] * stated(*residuals)})
    stated.def_jvp(lambda p, t: (stated(*p), p[0] * t[1] * stated(*p)))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        out = torch.autograd.forward_ad.unpack_dual(stated(2.0, dual)).tangent
    assert_close(out, 2 * torch.exp(2 * x) * v)


MARK = 10.0


@pytest.mark.parametrize("keeps_output", [False, True])
def test_a_fwd_that_calls_its_rule_has_a_forward_mode(keeps_output, unchecked):
    """As the example of jax.custom_vjp does; the rule is ten times the derivative."""
    rule = gt.custom_vjp(lambda x, y: torch.exp(x) * y)

    def fwd(x, y):
        out = rule(x, y)
        again = out / y if keeps_output else torch.exp(x)
        return out, (torch.sin(again), again, y)

    rule.defvjp(fwd, lambda res, g: (MARK * g * res[1] * res[2], MARK * g * res[1]))
    x, y = torch.tensor([0.3, -0.5]), torch.tensor([2.0, 0.7])
    u, v = torch.tensor([1.0, 0.4]), torch.tensor([-1.0, 0.2])
    tangent = MARK * torch.exp(x) * (y * u + v)
    out, moved = torch.func.jvp(rule, (x, y), (u, v))
    assert_close(out, torch.exp(x) * y)
    assert_close(moved, tangent)
    with torch.autograd.forward_ad.dual_level():
        duals = map(torch.autograd.forward_ad.make_dual, (x, y), (u, v))
        dual = rule(*duals)
        assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)
    assert_close(
        torch.func.vmap(lambda *p: torch.func.jvp(rule, p[:2], p[2:])[1])(x, y, u, v),
        tangent,
    )


def test_a_fwd_that_calls_its_rule_has_second_derivatives_in_every_order():
    rule = gt.custom_vjp(torch.exp)
    rule.defvjp(lambda x: (rule(x), torch.sinh(x)), _sinh_and_more)
    x = torch.tensor(0.7)
    grad, jacfwd = torch.func.grad, torch.func.jacfwd
    for outer in (grad, jacfwd):
        for inner in (grad, jacfwd):
            assert_close(outer(inner(rule))(x), x.exp())
            assert_close(torch.func.jacrev(outer(inner(rule)))(x), x.exp())


def _sinh_and_more(sinh, g):
    return (g * (sinh + (1 + sinh * sinh).sqrt()),)


@modes
def test_a_number_with_which_bwd_is_linear_does_not_count_for_the_others(jvp):
    bwd = lambda bound, g: (g.clamp(-bound, bound), None)
    rule = stated(lambda x, bound: x * 1, lambda x, bound: (x * 1, bound), bwd)
    assert_close(jvp(lambda x: rule(x, float("inf")), X, V)[1], V)
    with pytest.raises(gt.TransformError, match="not linear in its cotangent"):
        jvp(lambda x: rule(x, 1.0), X, V)
