"""vmap, compiled."""

import torch

from tests.transforms.compositions import batched


def test_compiled_vmap(agree, compiled):
    def composition(f, *args):
        return torch.func.vmap(f)(*batched(args))

    agree(compiled(composition), reference=composition)
