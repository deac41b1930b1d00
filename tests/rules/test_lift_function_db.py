"""torch's own collection of Functions, lifted as they stand.

The references are closed forms in torch; two are the identity with another gradient.
"""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import gradtools as gt

db = pytest.importorskip(
    "torch.testing._internal.autograd_function_db",
    reason="torch.testing._internal.autograd_function_db is not part of this torch",
)

X = torch.linspace(0.8, 2.1, 15, dtype=torch.float64).reshape(3, 5)[:, [2, 0, 4, 1, 3]]
Y = torch.linspace(1.7, 0.9, 5, dtype=torch.float64)
INDEX = X.argsort(1)
INVERSE = INDEX.argsort(1)


def scaled(x):
    return 3.14 * x + (1 - 3.14) * x.detach()


def without_gradient(x, y):
    return x.detach() + 0 * x, y.detach() + 0 * y


# name: (options, arguments, the same in torch)
RIGHT = {
    "NumpyCube": ({}, (X,), lambda x: (x**3, 3 * x**2)),
    "NumpyMul": ({}, (X, Y), torch.mul),
    "MulGenVmap": ({}, (X, X.flip(0)), torch.mul),
    "SortGenVmap": ({}, (X, 1), lambda x, dim: x.sort(dim)[0]),
    "NumpyTake": (
        {"probe": lambda: (X, INDEX, INVERSE, 1)},  # zeros invert no permutation
        (X, INDEX, INVERSE, 1),
        lambda x, index, _, dim: x.take_along_dim(index, dim),
    ),
    "TakeGenVmap": (
        {"probe": lambda: (X, INDEX, INVERSE, 1)},
        (X, INDEX, INVERSE, 1),
        lambda x, index, _, dim: x.take_along_dim(index, dim),
    ),
    "Select": ({}, (X, 2), lambda x, index: x[index]),
    "SelectGenVmap": ({}, (X, 2), lambda x, index: x[index]),
    "ForwardHasDefaultArgs": ({}, (X,), lambda x: x[(2,)]),
    "ScaleGradGenVmap": ({"contract": gt.Surrogate()}, (X,), scaled),
    "ZeroGradientsGenVmap": (
        {"contract": gt.Surrogate()},
        (X, Y),
        without_gradient,
    ),
}
WRONG = {  # what they return is not the derivative: (arguments, the function)
    "CubeGenVmap": ((X,), "not linear in the cotangent"),  # adds 6 * dinput
    "NumpyCubeNotComposable": ((X,), "not linear in the cotangent"),  # loses its own
    "NumpySort": ((X, 1), "a term is missing"),  # forward does not sort
}
IN_PLACE = {"NumpyExp_"}


def test_every_class_of_the_collection_has_its_row():
    found = {
        name
        for name, value in vars(db).items()
        if isinstance(value, type) and issubclass(value, torch.autograd.Function)
    }
    assert found <= RIGHT.keys() | WRONG.keys() | IN_PLACE


def tensors(out):
    outs = out if isinstance(out, tuple) else (out,)
    return [t for t in outs if isinstance(t, torch.Tensor) and t.is_floating_point()]


def as_loss(function, args):
    """Return a loss of the floating arguments alone, and these."""
    places = [
        i
        for i, arg in enumerate(args)
        if isinstance(arg, torch.Tensor) and arg.is_floating_point()
    ]

    def loss(*values):
        given = list(args)
        for place, value in zip(places, values, strict=True):
            given[place] = value
        return sum((out**2).sum() for out in tensors(function(*given)))

    return loss, [args[place] for place in places]


def squares(values):
    return sum((value**2).sum() for value in values)


def backward(loss, values):
    leaves = [value.clone().requires_grad_() for value in values]
    return torch.autograd.grad(loss(*leaves), leaves)


def double_backward(loss, values):
    leaves = [value.clone().requires_grad_() for value in values]
    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(squares(first) + 0 * squares(leaves), leaves)


def grad(loss, values):
    return torch.func.grad(loss, tuple(range(len(values))))(*values)


def grad_of_grad(loss, values):
    return grad(lambda *values: squares(grad(loss, values)), values)


def jvp(loss, values):
    moves = tuple(value.cos() for value in values)
    return torch.func.jvp(loss, tuple(values), moves)


def jvp_of_grad(loss, values):
    return jvp(lambda *values: squares(grad(loss, values)), values)


def jvp_of_jvp(loss, values):
    return jvp(lambda *values: jvp(loss, values)[1], values)


def batch(values):
    return [torch.stack([value, value + 0.1 * value.cos()]) for value in values]


def vmap(loss, values):
    return torch.func.vmap(loss)(*batch(values))


def vmap_of_grad(loss, values):
    return torch.func.vmap(lambda *values: grad(loss, values))(*batch(values))


def vmap_of_jvp(loss, values):
    return torch.func.vmap(lambda *values: jvp(loss, values))(*batch(values))


def compiled(loss, values):
    return backward(torch.compile(loss, backend="aot_eager"), values)


def compiled_grad(loss, values):
    return torch.compile(lambda *values: grad(loss, values), backend="aot_eager")(
        *values
    )


USES = [
    backward, double_backward, grad, grad_of_grad, jvp, jvp_of_grad, jvp_of_jvp, vmap,
    vmap_of_grad, vmap_of_jvp, compiled, compiled_grad,
]  # fmt: skip


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.filterwarnings("ignore")  # torch's own, of numpy code that Dynamo meets
def test_a_class_does_what_its_function_does(name, use):
    options, args, reference = RIGHT[name]
    lifted = gt.lift(getattr(db, name), **options)
    if use in (compiled, compiled_grad):
        torch._dynamo.reset()
    got, wanted = (use(*as_loss(function, args)) for function in (lifted, reference))
    assert_close(got, wanted)


@pytest.mark.parametrize("name", RIGHT)
def test_values_are_those_of_the_class(name):
    options, args, _ = RIGHT[name]
    function = getattr(db, name)
    got, wanted = gt.lift(function, **options)(*args), function.apply(*args)
    assert type(got) is type(wanted)
    assert_close(got, wanted)


@pytest.mark.parametrize("name", WRONG)
def test_a_class_whose_backward_is_wrong_is_found_out(name):
    args, problem = WRONG[name]
    x = args[0].clone().requires_grad_()
    with pytest.raises(gt.GradientMismatchError, match=problem) as caught:
        gt.lift(getattr(db, name))(x, *args[1:])
    assert "contract=Surrogate" in str(caught.value)


@pytest.mark.parametrize("name", ["NumpyCubeNotComposable", "NumpySort"])
def test_declared_a_surrogate_it_does_what_the_class_does(name, unchecked):
    args, _ = WRONG[name]
    function = getattr(db, name)
    lifted = gt.lift(function, contract=gt.Surrogate())
    got = backward(*as_loss(lifted, args))
    assert_close(got, backward(*as_loss(function.apply, args)))
    assert_close(grad(*as_loss(lifted, args)), got)


def test_what_is_no_tensor_is_handed_through():
    out, array = gt.lift(db.NumpyCubeNotComposable)(X)
    assert_close(out, X**3)
    assert isinstance(array, np.ndarray)


def test_a_change_in_place_is_refused():
    with pytest.raises(gt.DefinitionError, match="changes an argument in place"):
        gt.lift(db.NumpyExp_)(X.clone().requires_grad_())
