"""Per-sample gradients, compiled by inductor."""

import torch

from tests.transforms.compositions import batched, every, scalar


def test_inductor_vmap_of_grad(agree, compiled):
    def composition(f, *args):
        return torch.func.vmap(torch.func.grad(scalar(f), every(args)))(*batched(args))

    agree(compiled(composition, "inductor"), reference=composition)
