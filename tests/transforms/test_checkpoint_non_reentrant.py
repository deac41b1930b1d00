"""torch.utils.checkpoint, non-reentrant."""

import torch
from torch.utils.checkpoint import checkpoint

from tests.transforms.compositions import weighted


def test_checkpoint_non_reentrant(agree):
    def composition(f, *args):
        args = [arg.requires_grad_() for arg in args]

        def block(*args):
            return torch.sin(f(*args))

        out = checkpoint(block, *args, use_reentrant=False)
        return torch.autograd.grad(weighted(out), args)

    agree(composition, trodden=True)
