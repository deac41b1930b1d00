"""jaxtyping: a rule whose shapes are checked at run time.

The annotations belong to the function, under the rule's decorator. They hold for what
the check of the rule and the transforms make of the arguments too, and the rule's
signature shows them.
"""

import inspect

import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

import gradtools as gt


@gt.custom_vjp
@jaxtyped(typechecker=beartype)
def scale(x: Float[Tensor, "n d"], by: Float[Tensor, " d"]) -> Float[Tensor, "n d"]:
    """Scale the columns of a matrix."""
    return x * by


@scale.def_bwd
@jaxtyped(typechecker=beartype)
def _(residuals, g: Float[Tensor, "n d"]):
    ((x, by), _) = residuals
    return g * by, (g * x).sum(0)


def main():
    """Return the gradients of a batch, those of compiled code, and what is refused."""
    x, by = torch.randn(5, 3, 4), torch.randn(4)
    gradient = torch.func.grad(lambda x, by: scale(x, by).sin().sum(), 1)
    batch = torch.func.vmap(gradient, (0, None))(x, by)
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    try:
        scale(x[0], torch.randn(5))
    except TypeCheckError as error:
        refused = str(error)
    return {
        "signature": str(inspect.signature(scale)),
        "batch": batch.sum(0),
        "compiled": sum(compiled(each, by) for each in x),
        "expected": (x * (x * by).cos()).sum((0, 1)),
        "refused": refused,
    }


if __name__ == "__main__":
    for name, found in main().items():
        print(f"{name}: {found}")
