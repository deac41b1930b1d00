"""torch.autograd.functional, vectorized and not."""

import torch

from tests.transforms.compositions import directions, scalar


def test_autograd_functional(agree):
    def composition(f, *args):
        functional = torch.autograd.functional
        return [
            functional.jacobian(f, args, vectorize=True),
            functional.hessian(scalar(f), args, vectorize=False),
            functional.hvp(scalar(f), args, directions(args))[1],
        ]

    agree(composition, trodden=True)
