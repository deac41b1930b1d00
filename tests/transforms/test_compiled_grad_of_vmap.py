"""The gradient of a vectorized function, compiled."""

import torch

from tests.transforms.compositions import batched, every, scalar


def test_compiled_grad_of_vmap(agree, compiled):
    def composition(f, *args):
        vectorized = torch.func.vmap(f)
        return torch.func.grad(scalar(vectorized), every(args))(*batched(args))

    agree(compiled(composition), reference=composition)
