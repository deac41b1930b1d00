"""torch.func.hessian, compiled."""

import pytest
import torch

from tests.transforms.compositions import every, scalar


@pytest.mark.usefixtures("_traceable_jacfwd")
def test_compiled_hessian(agree, compiled):
    def composition(f, *args):
        return torch.func.hessian(scalar(f), every(args))(*args)

    agree(compiled(composition), reference=composition)
