"""torch.func.jacfwd, compiled."""

import pytest
import torch

from tests.transforms.compositions import every


@pytest.mark.usefixtures("_traceable_jacfwd")
def test_compiled_jacfwd(agree, compiled):
    def composition(f, *args):
        return torch.func.jacfwd(f, every(args))(*args)

    agree(compiled(composition), reference=composition)
