"""backend="eager" runs Dynamo's graph as it is: a second derivative goes through it.

For a hand-written Function this is silently wrong; through AOT autograd it is an error
of torch's: it does not support double backward, or has no graph of the gradient.
"""

import pytest
import torch

from tests.transforms.compositions import weighted


def second_derivative(f, args, backend):
    args = [arg.requires_grad_() for arg in args]

    def loss(*args):
        return weighted(f(*args))

    if backend is not None:
        loss = torch.compile(loss, fullgraph=True, backend=backend)
    zeros = {"materialize_grads": backend != "aot_eager"}
    grads = torch.autograd.grad(loss(*args), args, create_graph=True, **zeros)
    total = sum(weighted(g * g) for g in grads)
    return torch.autograd.grad(total, args, **zeros)


def test_double_backward_with_the_eager_backend(agree):
    agree(
        lambda f, *args: second_derivative(f, args, "eager"),
        reference=lambda f, *args: second_derivative(f, args, None),
    )


def test_double_backward_through_aot_autograd_is_an_error(case):
    with pytest.raises(RuntimeError, match=r"double backward|not .* used|require grad"):
        second_derivative(case.rule, case.inputs(), "aot_eager")
