"""nondiff_argnums and nondiff_argnames mean what they mean in JAX."""

import pytest
import torch
from torch.testing import assert_close

import gradtools as gt
from tests.rules.stating import derivative, gradients, leaf, stated

pytestmark = pytest.mark.usefixtures("unchecked")

X = torch.tensor([0.5, -1.2], dtype=torch.float64)


def apply(f, x, n=2, *rest):
    return f(x) * n + sum(rest)


def recorded(seen, **options):
    """Return a rule of ``apply`` that notes what its functions are given."""

    def fwd(f, x, n=2, *rest):
        seen["fwd"] = (f, n)
        return apply(f, x, n, *rest), x

    def bwd(*given):
        *first, _x, g = given
        seen["bwd"] = tuple(first)
        return seen["returned"](g)

    return stated(apply, fwd, bwd, **options)


@pytest.mark.parametrize(
    ("options", "first", "count"),
    [
        ({"nondiff_argnums": 0}, (torch.sin,), 2),
        ({"nondiff_argnums": (0, 2)}, (torch.sin, 3), 1),
        ({"nondiff_argnums": (2, 0)}, (torch.sin, 3), 1),
        ({"nondiff_argnums": (-1,)}, (3,), 2),
        ({"nondiff_argnames": "f"}, (torch.sin,), 2),
        ({"nondiff_argnames": ("n", "f")}, (torch.sin, 3), 1),
        ({"nondiff_argnums": 0, "nondiff_argnames": ("f", "n")}, (torch.sin, 3), 1),
    ],
)
def test_they_move_to_the_front_of_bwd_and_leave_its_result(options, first, count):
    """fwd gets them where they were; bwd in the order of the signature."""

    def returned(g):
        rest = [None] * (count - 1)
        return (
            (*rest, 10 * g)
            if options == {"nondiff_argnums": (-1,)}
            else (10 * g, *rest)
        )

    seen = {"returned": returned}
    x = X.clone().requires_grad_()
    rule = recorded(seen, **options)
    for call in (rule(torch.sin, x, 3), rule(f=torch.sin, n=3, x=x)):
        assert_close(gradients(call, x), (torch.full((2,), 10.0),))
        assert seen["fwd"] == (torch.sin, 3)
        assert seen["bwd"] == first


def test_a_dict_by_name_and_a_bare_tensor_do_without_them():
    x = X.clone().requires_grad_()
    for returned in (lambda g: {"x": 10 * g}, lambda g: 10 * g):
        rule = recorded({"returned": returned}, nondiff_argnums=(0, 2))
        assert_close(gradients(rule(torch.sin, x, 3), x), (torch.full((2,), 10.0),))


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda g: (None, g, None), "a tuple of 3"),
        (lambda g: {"f": None, "x": g}, "unknown names 'f'"),
    ],
)
def test_a_cotangent_for_one_of_them_is_refused(returned, got):
    rule = recorded({"returned": returned}, nondiff_argnames=("f", "n"))
    with pytest.raises(gt.BackwardContractError, match=got):
        gradients(rule(torch.sin, x := leaf(1.0), 3), x)


def test_a_default_and_a_tensor_without_a_gradient_may_be_nondiff():
    rule = stated(
        lambda x, w, n=3: x * w * n,
        lambda x, w, n=3: (x * w * n, ()),
        lambda w, n, _, g: (10 * g * w * n,),
        nondiff_argnames=("w", "n"),
    )
    x, w = X.clone().requires_grad_(), torch.tensor([2.0, 4.0])
    assert_close(gradients(rule(x, w), x), (30 * w,))
    assert_close(derivative(lambda x: rule(x, w))(X), 30 * w)
    batch = torch.stack([w, 2 * w])
    assert_close(
        torch.func.vmap(lambda w: derivative(lambda x: rule(x, w))(X))(batch),
        30 * batch,
    )


def test_a_tensor_in_such_a_place_that_needs_a_gradient_is_an_error():
    rule = stated(
        lambda x, w: x * w["k"],
        lambda x, w: (x * w["k"], ()),
        lambda w, _, g: (g * w["k"],),
        nondiff_argnames="w",
    )
    x, k = leaf(1.0), leaf(2.0)
    for use in (
        lambda: rule(x, {"k": k}),
        lambda: rule(x.detach(), {"k": k}),
        lambda: torch.func.grad(lambda k: rule(k, {"k": k}).sum())(k.detach()),
    ):
        with pytest.raises(gt.DefinitionError, match="a nondiff argument") as caught:
            use()
        assert caught.value.violations[0].where == "args.w"
        assert "detach" in caught.value.fix


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nondiff_argnums": 3}, "names argument 3"),
        ({"nondiff_argnums": (0, -4)}, "names argument -4"),
        ({"nondiff_argnums": "f"}, "names argument 'f'"),
        ({"nondiff_argnames": "g"}, r"names 'g'.*\('f', 'x', 'n'\)"),
        ({"nondiff_argnames": ("f", "rest")}, "names 'rest'"),
    ],
)
def test_a_place_that_does_not_exist_is_an_error_of_definition(options, message):
    with pytest.raises(gt.DefinitionError, match=message):
        gt.custom_vjp(apply, **options)


def test_forward_mode_gets_them_first_too():
    rule = stated(apply, bwd=lambda f, n, r, g: (10 * g,), nondiff_argnames=("f", "n"))

    @rule.def_jvp
    def _(f, n, primals, tangents):
        (x,), (t,) = primals, tangents
        return f(x) * n, 100 * t

    _, tangent = torch.func.jvp(lambda x: rule(torch.sin, x, 3), (X,), (X,))
    assert_close(tangent, 100 * X)
