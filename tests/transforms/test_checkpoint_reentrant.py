"""torch.utils.checkpoint, reentrant."""

import torch
from torch.utils.checkpoint import checkpoint

from tests.transforms.compositions import weighted


def test_checkpoint_reentrant(agree):
    def composition(f, *args):
        args = [arg.requires_grad_() for arg in args]

        def block(*args):
            return torch.sin(f(*args))

        out = checkpoint(block, *args, use_reentrant=True)
        weighted(out).backward()
        return [arg.grad for arg in args]

    agree(composition, trodden=True)
