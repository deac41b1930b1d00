"""torch.func.jvp."""

import torch

from tests.transforms.compositions import directions


def test_jvp(agree):
    def composition(f, *args):
        return torch.func.jvp(f, args, directions(args))

    agree(composition)
