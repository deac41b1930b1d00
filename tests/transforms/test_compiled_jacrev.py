"""torch.func.jacrev, compiled."""

import torch

from tests.transforms.compositions import every


def test_compiled_jacrev(agree, compiled):
    def composition(f, *args):
        return torch.func.jacrev(f, every(args))(*args)

    agree(compiled(composition), reference=composition)
