"""Forward over forward, compiled."""

import torch

from tests.transforms.compositions import every


def test_compiled_jacfwd_of_jacfwd(agree, compiled):
    def composition(f, *args):
        inner = torch.func.jacfwd(f, every(args))
        return torch.func.jacfwd(inner, every(args))(*args)

    agree(compiled(composition), reference=composition)
