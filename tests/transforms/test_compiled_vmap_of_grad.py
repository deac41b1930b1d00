"""Per-sample gradients, compiled."""

import torch

from tests.transforms.compositions import batched, every, scalar


def test_compiled_vmap_of_grad(agree, compiled):
    def composition(f, *args):
        return torch.func.vmap(torch.func.grad(scalar(f), every(args)))(*batched(args))

    agree(compiled(composition), reference=composition)
