"""The decorator's forms, what def_* return, and what they refuse."""

import copy
import functools
import inspect
import pickle

import pytest
import torch
from torch.testing import assert_close

import gradtools as gt
from tests.rules.stating import gradients, leaf, stated

X = torch.tensor([0.5, -1.2], dtype=torch.float64)


@gt.custom_vjp
def sine(x: torch.Tensor) -> torch.Tensor:
    """Return the sine."""
    return x.sin()


sine.defvjp(lambda x: (x.sin(), x), lambda x, g: g * x.cos())


@gt.custom_vjp(vmap="sequential", contract=gt.Approximate(rel=0.1))
def configured(x):
    return x.sin()


def plain(x):
    return x.sin()


def test_bare_called_and_direct_form():
    assert isinstance(sine, gt.rules.custom_vjp.CustomVJP)
    assert configured.rule.vmap == "sequential"
    assert configured.rule.contract == gt.Approximate(rel=0.1)
    assert gt.custom_vjp(plain, vmap="expand_dims").rule.vmap == "expand_dims"
    assert gt.custom_vjp()(plain).rule.fun is plain
    assert gt.custom_jvp()(plain).rule.fun is plain


def test_it_looks_like_the_function():
    assert sine.__name__ == "sine"
    assert sine.__doc__ == "Return the sine."
    assert sine.__module__ == __name__
    assert sine.__wrapped__ is sine.rule.fun
    assert inspect.signature(sine) == inspect.signature(sine.rule.fun)
    assert sine.__annotations__ == {"x": torch.Tensor, "return": torch.Tensor}
    assert_close(sine(X), X.sin())


@pytest.mark.parametrize("name", ["def_fwd", "def_bwd", "def_jvp", "def_vmap"])
@pytest.mark.parametrize("kind", [gt.custom_vjp, gt.custom_jvp])
def test_def_returns_the_function_that_it_was_given(name, kind):
    rule = kind(plain)
    if hasattr(rule, name):
        assert getattr(rule, name)(len) is len
    else:
        assert kind is gt.custom_jvp
        assert name in {"def_fwd", "def_bwd"}


def test_repr_says_what_is_stated():
    rule = gt.custom_vjp(plain)
    assert repr(rule).startswith(f"<CustomVJP plain ({__file__}:")
    assert repr(rule).partition("\n")[0].endswith(": nothing stated>")
    rule.defvjp(len, len)
    rule.def_jvp(len)
    assert repr(rule).partition("\n")[0].endswith(": fwd, bwd, jvp>")


def test_partials_and_builtins_have_a_name():
    assert gt.custom_vjp(functools.partial(plain)).__name__ == "plain"
    assert gt.custom_vjp(torch.sin).__name__ == "sin"
    assert gt.custom_vjp(torch.nn.Tanh()).__name__ == "Tanh"


# What means nothing.


@pytest.mark.parametrize("thing", [3, None, "sin", torch.ones(1)])
def test_only_a_function_can_be_decorated(thing):
    with pytest.raises(gt.DefinitionError, match="stated of a function, and"):
        gt.custom_vjp(thing)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vmap": "loop"}, "vmap='loop' is none of 'auto', 'sequential'"),
        ({"vmap": None}, "vmap=None is none of"),
        ({"contract": "exact"}, "contract='exact' is no contract"),
        ({"contract": gt.Exact}, "is no contract"),
        ({"once_differentiable": "no"}, "once_differentiable='no' is no bool"),
        ({"materialize_grads": 1}, "materialize_grads=1 is no bool"),
        ({"autocast": "bfloat16"}, "autocast='bfloat16' is no floating dtype"),
        ({"autocast": True}, "autocast=True is no floating dtype"),
        ({"autocast": torch.int32}, "autocast=torch.int32 is no floating dtype"),
        ({"probe": (1, 2)}, "probe=.* is no function"),
    ],
)
def test_an_option_that_means_nothing_is_an_error(options, message):
    with pytest.raises(gt.DefinitionError, match=message) as caught:
        gt.custom_vjp(plain, **options)
    assert caught.value.fix


def test_an_unknown_option_is_pythons_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'jit'"):
        gt.custom_vjp(plain, jit=True)


@pytest.mark.parametrize("name", ["def_fwd", "def_bwd", "def_jvp", "def_vmap"])
def test_what_is_stated_must_be_a_function(name):
    rule = gt.custom_vjp(plain)
    with pytest.raises(
        gt.DefinitionError, match=r"must be a function, not 3"
    ) as caught:
        getattr(rule, name)(3)
    assert f"@plain.{name}." in caught.value.fix


@pytest.mark.parametrize("kind", [gt.custom_vjp, gt.custom_jvp])
@pytest.mark.parametrize(
    "use",
    [
        lambda rule: rule(leaf(1.0)),
        lambda rule: torch.func.grad(lambda x: rule(x).sum())(X),
        lambda rule: torch.func.jvp(rule, (X,), (X,)),
    ],
)
def test_a_derivative_of_a_rule_that_states_none_names_the_function(kind, use):
    rule = kind(plain)
    assert_close(rule(X), X.sin())
    assert_close(torch.func.vmap(rule)(X), X.sin())
    with torch.no_grad():
        assert_close(rule(leaf(1.0)), torch.ones(1).sin())
    with pytest.raises(gt.DefinitionError, match="plain: a derivative is wanted") as e:
        use(rule)
    assert "plain.def" in e.value.fix


# Stating anew.


def test_a_new_statement_replaces_the_old_one_and_its_reports():
    rule = stated(plain, lambda x: (x.sin(), x), lambda x, g: g * x.cos())
    x = X.clone().requires_grad_()
    assert_close(gradients(rule(x), x), (X.cos(),))
    assert len(rule.reports) == 1
    rule.def_bwd(lambda x, g: 10 * g * x.cos())
    assert rule.reports == ()
    with pytest.raises(gt.GradientMismatchError, match="plain: what bwd returns"):
        rule(x)
    rule.defvjp(lambda x: (x.sin(), x.cos()), lambda c, g: g * c)
    assert_close(gradients(rule(x), x), (X.cos(),))


def test_refusals_are_forgotten_too(unchecked):
    rule = stated(plain, lambda x: (x.sin(), x), lambda x, g: g.clamp(-1, 1))
    with pytest.raises(gt.TransformError, match="not linear"):
        torch.func.jvp(rule, (X,), (X,))
    rule.def_bwd(lambda x, g: 10 * g)
    assert_close(torch.func.jvp(rule, (X,), (X,)), (X.sin(), 10 * X))


def test_what_is_under_way_keeps_the_rule_that_it_began_with(unchecked):
    rule = stated(plain, lambda x: (x.sin(), x), lambda x, g: 10 * g)
    x = leaf(1.0)
    out = rule(x)
    rule.def_bwd(lambda x, g: 100 * g)
    assert gradients(out, x) == (10,)
    assert gradients(rule(x), x) == (100,)


# As an object.


def test_a_rule_is_copied_and_pickled_by_its_name():
    assert copy.copy(sine) is sine
    assert copy.deepcopy({"rule": [sine]})["rule"][0] is sine
    assert pickle.loads(pickle.dumps(sine)) is sine


def test_a_rule_without_a_name_to_be_found_by_cannot_be_pickled():
    with pytest.raises((AttributeError, pickle.PicklingError), match="ickle"):
        pickle.dumps(stated(lambda x: x))


def test_an_exception_of_the_users_comes_out_with_a_note(unchecked):
    def fails(*args):
        raise KeyError("mine")

    x = leaf(1.0)
    for rule, role in (
        (stated(fails, bwd=lambda r, g: g), "fun"),
        (stated(plain, fails, lambda r, g: g), "fwd"),
        (stated(plain, lambda x: (x.sin(), ()), fails), "bwd"),
    ):
        with pytest.raises(KeyError, match="mine") as caught:
            gradients(rule(x), x)
        assert caught.value.__notes__[0].startswith(f"raised in {role} ({__file__}:")
