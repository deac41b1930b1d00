"""Functions that return their argument and change its gradient."""

import pytest
import torch
from torch.testing import assert_close

import gradtools as gt
from tests.rules.stating import derivative, gradients

X = torch.tensor([0.4, -1.6, 2.0, 0.0], dtype=torch.float64)
G = torch.tensor([3.0, -0.2, 0.5, -7.0], dtype=torch.float64)
SCALES = torch.tensor([2.0, 0.5, -1.0, 0.0], dtype=torch.float64)

# Each with what it makes of a cotangent g, and with the derivative of that.
IDENTITIES = {
    "clip_grad(-1, 1)": (
        lambda x: gt.clip_grad(x, -1, 1),
        lambda g: g.clamp(-1, 1),
        lambda g: (g.abs() <= 1).double(),
    ),
    "clip_grad(max=0)": (
        lambda x: gt.clip_grad(x, max=0.0),
        lambda g: g.clamp(max=0),
        lambda g: (g <= 0).double(),
    ),
    "clip_grad(tensor)": (
        lambda x: gt.clip_grad(x, -SCALES.abs(), SCALES.abs()),
        lambda g: g.clamp(-SCALES.abs(), SCALES.abs()),
        lambda g: (g.abs() <= SCALES.abs()).double(),
    ),
    "clip_grad()": (gt.clip_grad, lambda g: g, torch.ones_like),
    "scale_grad(3)": (
        lambda x: gt.scale_grad(x, 3),
        lambda g: 3 * g,
        lambda g: 0 * g + 3,
    ),
    "scale_grad(tensor)": (
        lambda x: gt.scale_grad(x, SCALES),
        lambda g: SCALES * g,
        lambda g: SCALES,
    ),
    "reverse_grad": (gt.reverse_grad, lambda g: -g, lambda g: 0 * g - 1),
    "stop_gradient": (gt.stop_gradient, lambda g: 0 * g, lambda g: 0 * g),
    "grad_map(cube)": (gt.grad_map(lambda g: g**3), lambda g: g**3, lambda g: 3 * g**2),
}
LINEAR = [name for name in IDENTITIES if "scale" in name or "reverse" in name]
every = pytest.mark.parametrize(
    ("identity", "mapped", "slope"), IDENTITIES.values(), ids=IDENTITIES
)


def loss(identity):
    """Return a loss whose gradient at x is ``identity`` applied to 3 x^2 G."""
    return lambda x: (identity(x) ** 3 * G).sum()


@every
def test_the_value_is_the_argument(identity, mapped, slope):
    for x in (X, X.clone().requires_grad_()):
        assert_close(identity(x), X, rtol=0, atol=0)
    assert_close(torch.func.vmap(identity)(torch.stack([X, G]))[1], G, rtol=0, atol=0)


@every
def test_first_derivative(identity, mapped, slope):
    x, expected = X.clone().requires_grad_(), mapped(3 * X**2 * G)
    out = loss(identity)(x)
    if out.requires_grad:
        assert_close(gradients(out, x), (expected,))
    assert_close(torch.func.grad(loss(identity))(X), expected)
    per_sample = torch.func.vmap(torch.func.grad(loss(identity)))(torch.stack([X, -X]))
    assert_close(per_sample, torch.stack([expected, expected]))


@every
def test_second_derivative(identity, mapped, slope):
    """d/dx m(3 x^2 G) is m(m'(3 x^2 G) 6 x G): the inner x passes the identity too."""
    g = 3 * X**2 * G
    expected = mapped(slope(g) * 6 * X * G) if slope(g).any() else 0 * X
    assert_close(derivative(torch.func.grad(loss(identity)))(X), expected)


@pytest.mark.parametrize("name", LINEAR)
def test_forward_mode_of_the_linear_ones(name):
    identity, mapped, _ = IDENTITIES[name]
    assert_close(torch.func.jvp(identity, (X,), (G,)), (X, mapped(G)))
    assert_close(torch.func.jacfwd(identity)(X), torch.func.jacrev(identity)(X))


@pytest.mark.parametrize(
    "name", ["clip_grad(-1, 1)", "clip_grad(max=0)", "grad_map(cube)"]
)
def test_no_forward_mode_of_the_others(name):
    with pytest.raises(gt.TransformError, match="not linear in its cotangent"):
        torch.func.jvp(IDENTITIES[name][0], (X,), (G,))


@pytest.mark.parametrize("bounds", [(0.1,), (1, -1), (None, -0.1), (0.1, 0.2)])
def test_a_clip_after_which_no_gradient_could_vanish_is_refused(bounds):
    with pytest.raises(gt.DefinitionError, match="no 0 between the bounds") as caught:
        gt.clip_grad(X.clone().requires_grad_(), *bounds)
    assert "Give both bounds" in caught.value.fix


def test_stop_gradient_is_constant_in_forward_mode_too():
    out, tangent = torch.func.jvp(lambda x: x * gt.stop_gradient(x), (X,), (G,))
    assert_close((out, tangent), (X * X, X * G))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, G)
        stopped = torch.autograd.forward_ad.unpack_dual(gt.stop_gradient(dual))
    assert stopped.tangent is None


@pytest.mark.parametrize("name", [n for n in IDENTITIES if "map" not in n])
def test_pytrees(name):
    identity, mapped, _ = IDENTITIES[name]
    tree = {
        "a": X.clone().requires_grad_(),
        "b": (G.clone().requires_grad_(), 3, "text"),
    }
    out = identity(tree)
    assert out["b"][1:] == (3, "text")
    total = (out["a"] * G).sum() + (out["b"][0] * X).sum()
    if total.requires_grad:
        actual = gradients(total, tree["a"], tree["b"][0])
        assert_close(actual, (mapped(G), mapped(X)))


@pytest.mark.parametrize("name", [n for n in IDENTITIES if "stop" not in n])
def test_integers_pass(name):
    assert IDENTITIES[name][0](torch.arange(4)).tolist() == [0, 1, 2, 3]


def test_a_scale_that_needs_a_gradient_gets_that_of_the_second_order():
    """The value does not depend on it, the gradient of x does."""
    x, scale = X.clone().requires_grad_(), SCALES.clone().requires_grad_()
    out = (gt.scale_grad(x, scale) * G).sum()
    first, none = gradients(out, x, scale, create_graph=True)
    assert none is None or not none.any()
    assert_close(gradients((first * X).sum(), scale), (G * X,))


def test_a_scale_that_does_not_broadcast_is_an_error():
    x = X.clone().requires_grad_()
    with pytest.raises(gt.BackwardContractError, match=r"scale_grad: .*\n(.*\n)*.*Sum"):
        gt.scale_grad(x, torch.ones(3, 4)).sum().backward()


def test_grad_map_may_look_at_the_whole_tree():
    def normalized(g):
        norm = (g["a"] ** 2).sum().add((g["b"] ** 2).sum()).sqrt()
        return {key: value / norm for key, value in g.items()}

    tree = {"a": X.clone().requires_grad_(), "b": G.clone().requires_grad_()}
    out = gt.grad_map(normalized)(tree)
    actual = gradients((out["a"] * 3).sum() + (out["b"] * 4).sum(), *tree.values())
    assert_close(actual, (torch.full((4,), 0.3), torch.full((4,), 0.4)))


def test_grad_map_of_the_wrong_shape_is_an_error():
    x = X.clone().requires_grad_()
    with pytest.raises(gt.BackwardContractError, match="grad_map_sum: bwd returned"):
        gt.grad_map(torch.sum)(x).sum().backward()


# straight_through

ROUNDINGS = {
    "round": torch.round,
    "sign": torch.sign,
    "numpy": lambda x: torch.from_numpy(x.detach().numpy().round()),
    "tree": lambda tree: {k: v.round() for k, v in tree.items()},
}


@pytest.mark.parametrize("name", ["round", "sign"])
def test_straight_through_has_the_gradient_of_the_identity(name):
    function = ROUNDINGS[name]
    through = gt.straight_through(function)
    y = function(X)
    x = X.clone().requires_grad_()
    assert_close(gradients(through(x) ** 2 * G, x), (2 * y * G,))
    assert_close(derivative(lambda x: through(x) ** 2)(X), 2 * y)
    assert_close(derivative(derivative(lambda x: through(x) ** 2))(X), 2 * y**0)
    assert_close(torch.func.jvp(through, (X,), (G,)), (y, G))
    assert_close(torch.func.vmap(derivative(lambda x: through(x) ** 2))(X), 2 * y)


@pytest.mark.on_cpu
def test_straight_through_of_opaque_code_and_of_a_tree():
    x = X.clone().requires_grad_()
    through = gt.straight_through(ROUNDINGS["numpy"])
    assert_close(gradients(through(x) * G, x), (G,))
    tree = gt.straight_through(ROUNDINGS["tree"])({"a": x, "b": 2 * x})
    assert_close(tree["b"], (2 * X).round())
    assert_close(gradients(tree["a"] + tree["b"] * G, x), (1 + 2 * G,))


@pytest.mark.parametrize(
    ("function", "expected", "got"),
    [
        (lambda x: x > 0, "float64", "bool"),
        (lambda x: x.round().int(), "float64", "int32"),
        (torch.sum, "(4,)", "()"),
        (lambda x: (x, x), "(4,)", "tuple"),
    ],
)
def test_straight_through_wants_an_output_like_the_argument(function, expected, got):
    through = gt.straight_through(function)
    with pytest.raises(gt.ForwardContractError, match="straight_through_") as caught:
        through(X.clone().requires_grad_())
    (violation,) = caught.value.violations
    assert expected in violation.expected
    assert got in violation.got
