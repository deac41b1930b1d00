"""torch.func.jvp, compiled."""

import torch

from tests.transforms.compositions import directions


def test_compiled_jvp(agree, compiled):
    def composition(f, *args):
        return torch.func.jvp(f, args, directions(args))

    agree(compiled(composition), reference=composition)
