"""What stands in for a function of torch's takes its arguments and gives its values."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import gradtools as gt

X = torch.linspace(-2, 3, 40, dtype=torch.float64).sin().view(2, 4, 5)
W, B = (
    torch.tensor([0.5, 2.0, -1.0, 1.5]).double(),
    torch.tensor([1.0, 0, -2, 3]).double(),
)
MEAN, VARIANCE = B / 4, W.abs()
TABLE = torch.arange(12.0, dtype=torch.float64).view(6, 2).sin() - 3
INDEX, BAGS = torch.tensor([0, 1, 5, 5, 5, 3]), torch.tensor([0, 2, 2, 4])


def edited(x):
    y = 3 * x
    F.hardsigmoid(y, inplace=True)
    return y


def bag(**options):
    return lambda table: F.embedding_bag(INDEX, table, **options)


FUNCTIONS = {
    "batch_norm": (lambda x: F.batch_norm(x, MEAN, VARIANCE, W, B), X),
    "torch.batch_norm": (
        lambda x: torch.batch_norm(x, W, B, MEAN, VARIANCE, False, 0.1, 1e-5, True),
        X,
    ),
    "torch.batch_norm, of the batch": (
        lambda x: torch.batch_norm(x, W, B, None, None, True, 0.1, 1e-5, True),
        X,
    ),
    "torch.instance_norm": (
        lambda x: torch.instance_norm(x, W, B, None, None, True, 0.1, 1e-5, True),
        X,
    ),
    "torch.instance_norm, running": (
        lambda x: torch.instance_norm(x, W, B, MEAN, VARIANCE, False, 0.1, 1e-5, True),
        X,
    ),
    "hardsigmoid in place": (edited, X),
    **{
        f"embedding_bag, {mode}, {name}": (bag(mode=mode, **options), TABLE)
        for mode in ("sum", "mean", "max")
        for name, options in {
            "padding": {"offsets": BAGS, "padding_idx": 5},
            "padding from the end": {"offsets": BAGS, "padding_idx": -1},
            "last offset": {"offsets": BAGS, "include_last_offset": True},
        }.items()
    },
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_jacobians_are_those_of_torch(name):
    f, x = FUNCTIONS[name]
    jacobian, value = gt.jacrev(lambda x: (f(x), f(x)), has_aux=True)(x)
    assert_close(value, f(x))
    assert_close(jacobian, torch.autograd.functional.jacobian(f, x))


NORMS = {
    "layer": lambda x, w: F.layer_norm(x, (4,), w, w),
    "batch": lambda x, w: F.batch_norm(x, None, None, w, w, True),
    "batch, running": lambda x, w: F.batch_norm(x, w, w, w, w),
    "instance": lambda x, w: F.instance_norm(x[..., None].repeat(1, 1, 3), None, None),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["short", "float32"])
def test_norms_of_short_numbers_are_computed_in_long_ones(norm, dtype, weights):
    x = (300 * torch.randn(6, 4)).to(dtype)  # the square of which float16 has not
    w = torch.rand(4).to(dtype if weights == "short" else torch.float32)
    f = lambda x: NORMS[norm](x, w)
    _, value = gt.jacrev(lambda x: (f(x), f(x)), has_aux=True)(x)
    assert value.dtype is f(x).dtype is dtype
    exact = NORMS[norm](x.double(), w.double())
    assert_close(value.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-2)
