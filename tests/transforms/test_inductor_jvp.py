"""torch.func.jvp, compiled by inductor."""

import torch

from tests.transforms.compositions import directions


def test_inductor_jvp(agree, compiled):
    def composition(f, *args):
        return torch.func.jvp(f, args, directions(args))

    agree(compiled(composition, "inductor"), reference=composition)
