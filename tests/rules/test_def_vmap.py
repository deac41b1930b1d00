"""def_vmap: what torch.func.vmap calls where no gradient is wanted."""

import pytest
import torch
from torch.func import vmap
from torch.testing import assert_close

import gradtools as gt
from tests.rules.stating import gradients, leaf, stated

pytestmark = pytest.mark.usefixtures("unchecked")

B = torch.arange(1.0, 7.0, dtype=torch.float64).reshape(2, 3).sin()
W = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def times(x, w):
    return x * w


@pytest.fixture
def stated_vmap():
    """A rule of a product with a vmap rule that shows that it ran."""
    rule = stated(
        times, lambda x, w: (x * w, (x, w)), lambda r, g: (10 * g * r[1], None)
    )
    seen = []

    @rule.def_vmap
    def vmap_rule(info, in_dims, x, w):
        seen.append((info.batch_size, info.randomness, in_dims))
        x, w = (
            t if d is None else t.movedim(d, 0)
            for t, d in zip((x, w), in_dims, strict=True)
        )
        return 100 * times(x, w), 0

    assert callable(vmap_rule)
    return rule, seen


@pytest.mark.parametrize("in_dims", [(0, None), (1, None), (None, 0), (1, 0)])
def test_def_vmap_replaces_the_function_where_no_gradient_is_wanted(
    stated_vmap, in_dims
):
    rule, seen = stated_vmap
    args = tuple({None: W, 0: B, 1: B.T}[dim] for dim in in_dims)
    expected = 100 * vmap(times, in_dims)(*args)
    assert_close(vmap(rule, in_dims)(*args), expected)
    assert seen == [(2, "error", in_dims)]


def test_nested_vmap_reaches_it_once_for_each_level(stated_vmap):
    rule, seen = stated_vmap
    batch = torch.stack([B, 2 * B])
    actual = vmap(vmap(rule, (0, None)), (0, None))(batch, W)
    assert_close(actual, 100 * times(batch, W))
    assert len(seen) == 1


def test_with_a_gradient_fwd_and_bwd_are_vectorized(stated_vmap):
    rule, seen = stated_vmap
    x = B.clone().requires_grad_()
    out = vmap(rule, (0, None))(x, W)
    assert_close(out, times(B, W))
    assert_close(gradients(out, x), ((10 * W).expand(2, 3),))
    assert seen == []


def tree_rule(returned):
    rule = stated(lambda p, k: {"a": k * p["x"], "b": [p["y"]]}, bwd=lambda r, g: {})
    seen = []
    rule.def_vmap(lambda info, in_dims, p, k: seen.append(in_dims) or returned(p, k))
    return rule, seen


@pytest.mark.parametrize(
    ("out_dims", "transpose"),
    [({"a": 0, "b": [1]}, True), ({"a": 0, "b": 0}, False), (0, False), (-2, False)],
)
def test_dims_mirror_pytrees_and_may_be_given_for_subtrees(out_dims, transpose):
    rule, seen = tree_rule(
        lambda p, k: ({"a": k * p["x"], "b": [B.T if transpose else B]}, out_dims)
    )
    out = vmap(rule, ({"x": 0, "y": None}, None))({"x": B, "y": W}, 7)
    assert seen == [({"x": 0, "y": None}, None)]
    assert_close(out, {"a": 7 * B, "b": [B]})


def test_an_output_that_is_not_batched_has_the_dim_none():
    rule, _ = tree_rule(lambda p, k: ({"a": k * p["x"], "b": [W]}, {"a": 0, "b": None}))
    out = vmap(rule, ({"x": 0, "y": None}, None))({"x": B, "y": W}, 7)
    assert_close(out, {"a": 7 * B, "b": [torch.stack([W, W])]})


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda p, k: B, "must return a pair"),
        (lambda p, k: ({"a": B, "b": [B]}, (0, 0, 0)), "do not fit its output"),
        (lambda p, k: ({"a": B, "b": [B]}, {"a": 0}), "do not fit its output"),
        (lambda p, k: ({"a": B, "b": [B]}, {"a": 0, "c": 0}), "do not fit its output"),
        (lambda p, k: ({"a": B, "b": [B]}, "text"), "do not fit its output"),
        (lambda p, k: ({"a": B.T, "b": [B]}, 0), "do not fit its output"),
        (lambda p, k: ({"a": B, "b": [B]}, 2), "do not fit its output"),
    ],
)
def test_a_malformed_vmap_rule_is_an_error(returned, message):
    rule, _ = tree_rule(returned)
    with pytest.raises(gt.ForwardContractError, match=message) as caught:
        vmap(rule, ({"x": 0, "y": None}, None))({"x": B, "y": W}, 7)
    assert caught.value.function.startswith("vmap_rule (")


def test_a_rule_with_a_vmap_rule_serves_inside_another():
    """fwd and bwd of a rule may themselves be rules that state how they are batched."""
    kernel = stated(torch.sin)
    kernel.def_vmap(lambda info, in_dims, x: (100 * x.sin(), in_dims[0]))
    rule = stated(kernel, lambda x: (kernel(x), x), lambda x, g: g * kernel(x))
    x = leaf(1.0, 2.0)
    out = vmap(rule)(x)
    assert_close(out, 100 * x.detach().sin())
    assert_close(gradients(out, x), (100 * x.detach().sin(),))
