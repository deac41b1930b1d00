"""What fwd, fun and jvp rules return wrongly, and how the error says it."""

from types import SimpleNamespace

import pytest
import torch

import gradtools as gt
from tests.rules.stating import backward, functional, gradients, leaf, stated

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize("use", [backward, functional])
@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda x: x, "a tensor"),
        (lambda x: (x,), "a tuple of 1"),
        (lambda x: (x, x, x), "a tuple of 3"),
        (lambda x: [x, ()], "a list of 2"),
        (lambda x: None, "None"),
    ],
)
def test_fwd_must_return_a_pair(use, returned, got):
    rule = stated(lambda x: 2 * x, returned, lambda _, g: g)
    with pytest.raises(gt.ForwardContractError, match="a pair") as caught:
        use(rule, leaf(1.0, 2.0, 3.0))
    assert got in caught.value.violations[0].got
    assert caught.value.function.startswith("fwd (")


@pytest.mark.parametrize("use", [backward, functional])
@pytest.mark.parametrize("with_fwd", [True, False])
def test_an_output_may_not_hide_tensors_in_an_object(use, with_fwd):
    """What it hides would have no gradient: the Function cannot see it."""

    def fun(x):
        return x, SimpleNamespace(half=x / 2)

    rule = stated(fun, (lambda x: (fun(x), ())) if with_fwd else None, lambda _, g: g)
    with pytest.raises(gt.ForwardContractError, match="hides tensors") as caught:
        use(lambda x: sum((rule(x)[0], rule(x)[1].half)), leaf(1.0))
    assert caught.value.violations[0].where == "output, a SimpleNamespace"
    assert "half" in caught.value.violations[0].got


def test_an_object_that_is_an_argument_may_be_an_output():
    box = SimpleNamespace(scale=torch.tensor(3.0))
    rule = stated(
        lambda x, o: (x * o.scale, o),
        lambda x, o: ((x * o.scale, o), o),
        lambda o, g: (10 * g[0] * o.scale, None),
    )
    x = leaf(1.0)
    y, same = rule(x, box)
    assert same is box
    assert gradients(y, x) == (30,)


def pair(x):
    return 2 * x, {"k": 3 * x}


def forward(rule, x):
    torch.func.jvp(rule, (x.detach(),), (x.detach(),))


def reverse(rule, x):
    gradients(rule(x)[0], x)


@pytest.mark.parametrize("use", [forward, reverse])
@pytest.mark.parametrize(
    ("jvp", "where", "expected", "got"),
    [
        (lambda x, t: 2 * x, ["return"], "a tuple of 2", "a tensor"),
        (lambda x, t: ((x,), (t,)), ["return[0]"], "[0], [1]['k']", "with [0]"),
        (lambda x, t: ((x, {"j": x}),) * 2, ["return[0]"], "[1]['k']", "[1]['j']"),
        (lambda x, t: (pair(x), (t, t)), ["return[1]"], "[1]['k']", "[0], [1]"),
        (
            lambda x, t: (pair(x), (t.sum(), {"k": t.float()})),
            ["return[1][0]", "return[1][1]['k']"],
            "(2,), float64",
            "float",
        ),
        (
            lambda x, t: ((x.sum(), {"k": x}), (t.sum(), {"k": t})),
            ["return[0][0]"],
            "(2,)",
            "()",
        ),
    ],
)
def test_a_malformed_jvp_rule_is_named(jvp, where, expected, got, use):
    rule = gt.custom_jvp(pair)
    rule.defjvp(lambda primals, tangents: jvp(*primals, *tangents))
    x = leaf(1.0, 2.0)
    with pytest.raises(gt.ForwardContractError, match="jvp rule") as caught:
        use(rule, x)
    assert [v.where for v in caught.value.violations] == where
    assert expected in caught.value.violations[0].expected
    assert got in caught.value.violations[0].got
    assert caught.value.function.startswith("jvp (")
