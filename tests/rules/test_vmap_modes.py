"""How fwd and bwd are vectorized: by torch, in a loop, or by themselves."""

import gc

import numpy as np
import pytest
import torch
from torch.func import vmap
from torch.testing import assert_close

import gradtools as gt
from tests.rules.stating import derivative, gradients, stated

pytestmark = pytest.mark.usefixtures("unchecked")

MODES = ["auto", "sequential", "expand_dims", "broadcast_all"]
modes = pytest.mark.parametrize("mode", MODES)
by_itself = pytest.mark.parametrize("mode", MODES[1:])

B = torch.arange(1.0, 7.0, dtype=torch.float64).reshape(2, 3).sin()
W = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def scaled(x, w):
    return (x * w).sum(-1, keepdim=True) * x


def native(x, w):
    """Return what has the value of ``scaled`` and ten times its derivatives."""
    y = scaled(x, w)
    return y.detach() + 10 * (y - y.detach())


def rule_of(mode, seen=None):
    def fwd(x, w):
        if seen is not None:
            seen.append((tuple(x.shape), tuple(w.shape)))
        return scaled(x, w), (x, w)

    def bwd(residuals, g):
        x, w = residuals
        inner = (g * x).sum(-1, keepdim=True)
        return 10 * (g * (x * w).sum(-1, keepdim=True) + inner * w), 10 * inner * x

    return stated(scaled, fwd, bwd, vmap=mode)


# The case tables of tests/transforms run each mode under each composition; here is what
# fwd sees, and code that torch cannot vectorize.


@pytest.mark.parametrize(
    ("mode", "shapes"),
    [
        ("auto", [((3,), (3,))]),
        ("sequential", [((3,), (3,))] * 2),
        ("expand_dims", [((2, 3), (1, 3))]),
        ("broadcast_all", [((2, 3), (2, 3))]),
    ],
)
def test_what_fwd_is_given(mode, shapes):
    seen = []
    w = W.clone().requires_grad_()
    out = vmap(rule_of(mode, seen), (0, None))(B, w)
    assert seen == shapes
    assert_close(out, scaled(B, W))


@by_itself
@pytest.mark.parametrize("in_dims", [(0, None), (1, None), (None, 0), (0, 0), (-1, 0)])
def test_gradients_of_batched_and_unbatched_arguments(mode, in_dims):
    args = tuple(
        {None: W, 0: B, 1: B.T, -1: B.T}[dim].clone().requires_grad_()
        for dim in in_dims
    )
    rule = rule_of(mode)
    actual = gradients(vmap(rule, in_dims)(*args) ** 2, *args)
    expected = gradients(vmap(native, in_dims)(*args) ** 2, *args)
    assert_close(actual, expected)


def numpy_rule(mode):
    def fun(x):
        return torch.from_numpy(np.sin(x.detach().numpy()))

    def bwd(x, g):
        return torch.from_numpy(10 * g.detach().numpy() * np.cos(x.detach().numpy()))

    return stated(fun, lambda x: (fun(x), x), bwd, vmap=mode)


@pytest.mark.on_cpu
@by_itself
def test_numpy_code_is_vectorized_by_other_means(mode):
    rule = numpy_rule(mode)
    assert_close(vmap(rule)(B), B.sin())
    with torch.no_grad():
        assert_close(vmap(rule)(B), B.sin())
    assert_close(vmap(derivative(rule))(B), 10 * B.cos())
    assert_close(derivative(vmap(rule))(B), 10 * B.cos())
    assert_close(torch.func.jacrev(rule)(W), torch.diag(10 * W.cos()))
    assert_close(vmap(torch.func.jacrev(rule))(B), torch.diag_embed(10 * B.cos()))
    x = B.clone().requires_grad_()
    assert_close(gradients(vmap(rule, 1, 1)(x) * B, x), (10 * B * B.cos(),))


@pytest.mark.on_cpu
def test_numpy_code_under_torchs_own_vmap_raises_with_a_note():
    for f in (derivative(numpy_rule("auto")), numpy_rule("auto")):
        with pytest.raises(RuntimeError, match="data pointer") as caught:
            vmap(f)(B)
        (note,) = caught.value.__notes__
        assert "of the rule fun (" in note
        assert note.endswith('takes custom_vjp(vmap="sequential")')


def test_an_unknown_mode_is_an_error_of_definition():
    with pytest.raises(gt.DefinitionError, match=r"vmap='loop' is none of 'auto'"):
        gt.custom_vjp(scaled, vmap="loop")


def test_an_empty_batch_has_no_element_to_loop_over():
    with pytest.raises(gt.TransformError, match="empty batch"):
        vmap(numpy_rule("sequential"))(torch.zeros(0, 3))
    assert vmap(derivative(rule_of("auto")), (0, None))(torch.zeros(0, 3), W).shape == (
        0,
        3,
    )


@pytest.mark.parametrize(
    "sign",
    [
        lambda x: "positive" if x > 0 else "",
        lambda x: float(x > 0),
        lambda x: np.array([x > 0]),
        lambda x: int(x > 0),
    ],
)
def test_elements_of_a_batch_may_not_differ_in_what_is_no_tensor(sign):
    rule = stated(
        lambda x: x,
        lambda x: (x, sign(x.sum().item())),
        lambda positive, g: 10 * g if positive else -10 * g,
        vmap="sequential",
    )
    same = torch.tensor([[1.0], [2.0]])
    assert_close(vmap(derivative(rule))(same), 0 * same + 10)
    with pytest.raises(gt.TransformError, match="differ between the elements"):
        vmap(derivative(rule))(torch.tensor([[1.0], [-2.0]]))


@pytest.mark.parametrize("mode", ["expand_dims", "broadcast_all"])
def test_a_fwd_that_loses_the_batch_dimension_is_an_error(mode):
    rule = stated(torch.sum, lambda x: (x.sum(), x), lambda x, g: g + 0 * x, vmap=mode)
    with pytest.raises(gt.ForwardContractError, match="batch dimension in front"):
        vmap(derivative(rule))(torch.ones(2, 3))


@pytest.mark.parametrize("size", [1, 2])
def test_under_expand_dims_a_cotangent_of_either_size_is_summed(size):
    rule = stated(
        lambda x, w: x * w,
        lambda x, w: (x * w, (x, w)),
        lambda r, g: (g * r[1], (g * r[0]) if size == 2 else (g * r[0]).sum(0, True)),
        vmap="expand_dims",
    )
    w = W.clone().requires_grad_()
    assert_close(gradients(vmap(rule, (0, None))(B, w), w), (B.sum(0),))


def test_under_expand_dims_any_other_size_is_an_error():
    rule = stated(
        lambda x, w: x * w,
        lambda x, w: (x * w, x),
        lambda x, g: (g, torch.cat([g, g])),
        vmap="expand_dims",
    )
    w = W.clone().requires_grad_()
    with pytest.raises(gt.BackwardContractError, match=r"args\.w"):
        gradients(vmap(rule, (0, None))(B, w), w)


# Randomness.


@modes
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_a_random_mask_is_one_or_many_and_bwd_sees_the_same(mode, randomness):
    def fwd(x):
        mask = torch.rand(x.shape).round()
        return x * mask, mask

    rule = stated(lambda x: fwd(x)[0], fwd, lambda mask, g: 10 * g * mask, vmap=mode)
    x = torch.ones(2, 50, requires_grad=True)
    out = vmap(rule, randomness=randomness)(x)
    assert 0 < out.sum() < 100
    assert_close(gradients(out, x), (10 * out.detach(),))
    if mode == "auto":
        assert torch.equal(out[0], out[1]) == (randomness == "same")


def test_randomness_is_an_error_unless_asked_for():
    rule = stated(lambda x: x * torch.rand(()), bwd=lambda r, g: g)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(derivative(rule))(B)


@pytest.mark.parametrize("mode", ["auto", "sequential", "expand_dims", "broadcast_all"])
def test_an_output_without_a_batch_dimension_has_one_cotangent(mode):
    @gt.custom_vjp(vmap=mode)
    def both(x, w):
        return x * w, w**2

    @both.def_bwd
    def _(residuals, g):
        (x, w), _ = residuals
        return g[0] * w, g[0] * x + 2 * w * g[1]

    def loss(f, w, x):
        product, square = vmap(f, (0, None))(x, w)
        return product.sum() + square.sum()

    x, w = torch.linspace(-1, 2, 4), torch.tensor(1.5)
    native = torch.func.grad(loss, 1)(lambda x, w: (x * w, w**2), w, x)
    assert_close(torch.func.grad(loss, 1)(both, w, x), native)


def test_an_unneeded_gradient_per_sample_is_never_built():
    asked = []
    rule = gt.custom_vjp(lambda x, w: x @ w)
    rule.def_fwd(lambda x, w: (x @ w, (x, w)))

    @rule.def_bwd
    def _(residuals, g, *, needs):
        x, w = residuals
        asked.append((needs, tuple(x.shape), tuple(w.shape)))
        return g @ w.T if needs[0] else None, x.T @ g if needs[1] else None

    x, w = torch.randn(5, 3, 4), torch.randn(4, 2)

    def loss(x, w):
        return rule(x, w).sum()

    for argnums, needs in ((0, (True, False)), (1, (False, True))):
        per_sample = torch.func.vmap(torch.func.grad(loss, argnums), (0, None))
        per_sample(x, w)  # with its check
        asked.clear()
        per_sample(x, w)
        # In sight of bwd is one sample; the weight has no batch dimension at all.
        assert asked == [(needs, (3, 4), (4, 2))]


def test_no_class_is_made_per_call():
    def count(cls=torch._C._FunctionBase):
        return 1 + sum(map(count, type(cls).__subclasses__(cls)))

    rule = gt.custom_vjp(lambda x, w: x * w)
    rule.def_fwd(lambda x, w: (x * w, (x, w)))
    rule.def_bwd(lambda r, g: (g * r[1], g * r[0]))
    x, w = torch.randn(5, 3), torch.randn(3)
    grad = torch.func.grad(lambda x, w: rule(x, w).sum(), (0, 1))
    calls = (
        lambda: torch.func.vmap(grad, (0, None))(x, w),
        lambda: torch.func.vmap(torch.func.vmap(grad))(x[None], w.expand(1, 5, 3)),
        lambda: torch.func.jacrev(lambda w: torch.func.vmap(rule, (0, None))(x, w))(w),
        lambda: torch.autograd.grad(rule(x[0], w.requires_grad_()).sum(), w),
    )
    for call in calls:
        for _ in range(4):
            call()
        gc.collect()
        before = count()
        call()
        assert count() == before
