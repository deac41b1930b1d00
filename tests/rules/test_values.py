"""Tensors of every kind pass through a rule as through torch's own functions."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

import gradtools as gt
from tests.rules.stating import derivative, gradients, leaf, stated

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture
def cube():
    return stated(lambda x: x**3, lambda x: (x**3, x), lambda x, g: 10 * g * x**2)


# Complex numbers: torch's convention is the conjugate of JAX's.

Z = torch.tensor([1 + 2j, -0.5 + 0.3j], dtype=torch.complex128)
COMPLEX = {
    "holomorphic": (torch.sin, lambda z, g: g * z.cos().conj()),
    "conjugate": (
        lambda z: z.conj() * z * z,
        lambda z, g: g.conj() * z**2 + 2 * g * z.abs() ** 2,
    ),
    "to real": (lambda z: z.abs() ** 2, lambda z, g: 2 * g * z),
    "real part": (
        lambda z: z.real * z.imag,
        lambda z, g: g * torch.complex(z.imag, z.real),
    ),
}


@pytest.mark.parametrize(("fun", "bwd"), COMPLEX.values(), ids=COMPLEX)
def test_complex_gradients_follow_torchs_convention(fun, bwd):
    rule = stated(fun, lambda z: (fun(z), z), bwd)
    rule.gradcheck(Z)
    z = Z.clone().requires_grad_()

    def loss(f, z):
        return ((f(z) - (0.3 + 0.1j)).abs() ** 3).sum()

    expected = torch.autograd.grad(loss(fun, z), z)[0]
    assert_close(torch.autograd.grad(loss(rule, z), z)[0], expected)
    assert_close(torch.func.grad(lambda z: loss(rule, z))(Z), expected)
    direction = Z * (2 - 1j)
    assert_close(
        torch.func.jvp(rule, (Z,), (direction,)),
        torch.func.jvp(fun, (Z,), (direction,)),
    )
    # A step against the gradient descends.
    assert loss(fun, Z - 1e-4 * expected) < loss(fun, Z)


def test_real_to_complex():
    rule = stated(
        lambda x: torch.complex(x, x**2),
        lambda x: (torch.complex(x, x**2), x),
        lambda x, g: 10 * (g.real + 2 * x * g.imag),
    )
    x = leaf(0.5, -2.0)
    out = (rule(x) * Z).abs().sum()
    expected = gradients((torch.complex(x, x**2) * Z).abs().sum(), x)
    assert_close(gradients(out, x), tuple(10 * e for e in expected))


def test_lazy_conjugates_and_negatives(cube):
    z = Z.clone().requires_grad_()
    for lazy in (z.conj(), z.conj().imag):
        assert lazy.is_conj() or lazy.is_neg()
        out = cube(lazy)
        assert_close(out, lazy.resolve_conj() ** 3)
        (actual,) = torch.autograd.grad(out, lazy, torch.ones_like(out))
        assert_close(actual, 10 * lazy.detach() ** 2)


# Shapes and strides.

SHAPES = {
    "scalar": lambda: torch.tensor(2.0),
    "empty": lambda: torch.zeros(0),
    "empty rows": lambda: torch.zeros(0, 3),
    "transposed": lambda: torch.arange(6.0).reshape(2, 3).T,
    "strided": lambda: torch.arange(10.0)[::2],
    "expanded": lambda: torch.tensor([2.0]).expand(3),
    "channels last": lambda: torch.rand(2, 3, 4, 5).to(
        memory_format=torch.channels_last
    ),
    "float32": lambda: torch.rand(3, dtype=torch.float32),
    "bfloat16": lambda: torch.rand(3, dtype=torch.bfloat16),
    "parameter": lambda: torch.nn.Parameter(torch.rand(3)),
}


@pytest.mark.parametrize("make", SHAPES.values(), ids=SHAPES)
def test_any_shape_stride_and_floating_dtype(cube, make):
    x = make()
    x = x if isinstance(x, torch.nn.Parameter) else x.detach().requires_grad_()
    out = cube(x)
    assert out.shape == x.shape
    (actual,) = gradients(out, x)
    assert_close(actual, 10 * x.detach() ** 2)
    assert_close(derivative(cube)(x.detach()), 10 * x.detach() ** 2)


def test_integer_and_boolean_tensors_take_part_without_a_gradient():
    def fun(x, index, mask):
        return torch.where(mask, x[index], 0)

    rule = stated(
        fun,
        lambda x, index, mask: (fun(x, index, mask), (x.shape, index, mask)),
        lambda r, g: 10 * torch.zeros(r[0]).index_add(0, r[1], g * r[2]),
    )
    x = leaf(1.0, 2.0, 3.0)
    index, mask = torch.tensor([2, 0, 2]), torch.tensor([True, False, True])
    expected = torch.tensor([0.0, 0.0, 20.0])
    assert_close(gradients(rule(x, index, mask), x), (expected,))
    per_sample = torch.func.vmap(derivative(rule), (None, 0, 0))
    assert_close(
        per_sample(x.detach(), torch.stack([index, index]), torch.stack([mask, ~mask])),
        torch.stack([expected, torch.tensor([10.0, 0.0, 0.0])]),
    )


# Tensors without values.


def test_meta_tensors_give_meta_gradients(cube):
    x = torch.empty(2, 3, device="meta", requires_grad=True)
    (g,) = gradients(cube(x), x, create_graph=True)
    (second,) = gradients(g, x)
    assert g.is_meta
    assert second.is_meta
    assert second.shape == (2, 3)


def test_fake_tensors_give_fake_gradients(cube):
    with FakeTensorMode() as mode:
        x = torch.empty(2, 3, requires_grad=True)
        (g,) = gradients(cube(x), x, create_graph=True)
        (second,) = gradients(g, x)
        functional = derivative(cube)(x.detach())
    assert {type(t) for t in (g, second, functional)} == {
        type(mode.from_tensor(torch.ones(1)))
    }
    assert second.shape == functional.shape == (2, 3)


# Outputs that share memory.


def test_an_output_that_is_an_input_is_another_tensor():
    rule = stated(lambda x: x, lambda x: (x, x), lambda x, g: 10 * g * x)
    x = leaf(2.0)
    out = rule(x)
    assert out is not x
    assert out.data_ptr() == x.data_ptr()
    assert gradients(out, x) == (20,)
    assert x.grad_fn is None


def test_one_tensor_returned_twice_gets_both_cotangents():
    def fwd(x):
        y = 3 * x
        return (y, [y, x]), ()

    rule = stated(
        lambda x: (3 * x, [3 * x, x]),
        fwd,
        lambda _, g: 10 * g[0] + 100 * g[1][0] + 1000 * g[1][1],
    )
    x = leaf(1.0)
    y, (again, same) = rule(x)
    assert gradients(2 * y + 3 * again + 4 * same, x) == (4320,)


VIEWS = {
    "the input": lambda x: (x, ()),
    "a view of the input": lambda x: (x[1:], ()),
    "a reshaped input": lambda x: (x.view(-1, 1), ()),
}


@pytest.mark.parametrize("fwd", VIEWS.values(), ids=VIEWS)
def test_an_output_that_is_a_view_may_not_be_changed_in_place(fwd):
    """torch could not rewrite its history; it refuses, for a rule as for a Function."""
    rule = stated(lambda x: fwd(x)[0], fwd, lambda _, g: (None,))
    out = rule(leaf(1.0, 2.0) * 1)
    with pytest.raises(RuntimeError, match="view"):
        out.mul_(2)


def test_an_output_may_be_changed_in_place_unless_bwd_reads_it(cube):
    x = leaf(2.0)
    assert gradients(cube(x).mul_(3), x) == (120,)
    rule = stated(torch.exp, lambda x: ((y := x.exp()), y), lambda y, g: g * y)
    out = rule(x).mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(out, x)


def test_an_input_that_bwd_reads_may_not_be_changed_in_place(cube):
    x = leaf(2.0)
    y = x * 1
    out = cube(y)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(out, x)


def test_a_constant_that_fwd_hands_through_stays_a_constant(cube):
    constant = torch.tensor([5.0])
    rule = stated(
        lambda x: (x, constant), lambda x: ((2 * x, constant), ()), lambda _, g: g[0]
    )
    _, same = rule(leaf(1.0))
    assert_close(same.detach(), constant)
    assert not constant.requires_grad
    assert constant.grad_fn is None


def test_an_argument_passed_twice_gets_both_cotangents():
    rule = stated(
        torch.mul, lambda x, y: (x * y, (x, y)), lambda r, g: (10 * g, 100 * g)
    )
    x = leaf(2.0)
    assert gradients(rule(x, x), x) == (110,)
    assert derivative(lambda x: rule(x, x))(x.detach()) == 110
    assert torch.func.jvp(lambda x: rule(x, x), (x.detach(),), (x.detach(),))[1] == 220


def test_a_size_stays_a_size_as_argument_residual_and_output():
    @gt.custom_vjp
    def mean_of(x, shape):
        return x.reshape(shape).mean(), shape

    @mean_of.def_fwd
    def _(x, shape):
        assert shape.numel() == 6
        return (x.reshape(shape).mean(), shape), {"whole": (x.shape, [shape])}

    @mean_of.def_bwd
    def _(residuals, cotangents):
        shape, (other,) = residuals["whole"]
        return (cotangents[0] / other.numel()).expand(shape), None

    x = torch.arange(6.0, requires_grad=True)
    out, shape = mean_of(x, torch.Size([2, 3]))
    assert type(shape) is torch.Size
    assert_close(torch.autograd.grad(out, x), (torch.full((6,), 1 / 6),))
    compiled = torch.compile(
        lambda x: mean_of(x * 1, torch.Size([2, 3]))[0], backend="aot_eager"
    )
    assert_close(torch.autograd.grad(compiled(x), x), (torch.full((6,), 1 / 6),))
    batch = torch.func.vmap(torch.func.grad(lambda x: mean_of(x, torch.Size([6]))[0]))
    assert_close(batch(torch.ones(2, 6)), torch.full((2, 6), 1 / 6))
