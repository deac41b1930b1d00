"""torch.func.vjp, compiled."""

import torch

from tests.transforms.compositions import weights


def test_compiled_vjp(agree, compiled):
    def composition(f, *args):
        out, pull_back = torch.func.vjp(f, *args)
        return out, pull_back(weights(out))

    agree(compiled(composition), reference=composition)
