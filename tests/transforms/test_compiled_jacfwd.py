"""torch.func.jacfwd, compiled."""

import torch

from tests.transforms.compositions import every


def test_compiled_jacfwd(agree, compiled):
    def composition(f, *args):
        return torch.func.jacfwd(f, every(args))(*args)

    agree(compiled(composition), reference=composition)
