"""Forward over forward, compiled."""

import pytest
import torch

from tests.transforms.compositions import every


@pytest.mark.usefixtures("_traceable_jacfwd")
def test_compiled_jacfwd_of_jacfwd(case, agree, compiled):
    if str(case) == "complex":
        pytest.skip("pytorch#160508: Dynamo fails on a scalar in nested forward mode")

    def composition(f, *args):
        inner = torch.func.jacfwd(f, every(args))
        return torch.func.jacfwd(inner, every(args))(*args)

    agree(compiled(composition), reference=composition)
