"""What holds for every test: float64, fixed seeds, and a fresh torch.compile."""

import sys

import pytest
import torch

import gradtools as gt
from gradtools.gradcheck import policy


@pytest.fixture(autouse=True)
def _reproducible():
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture
def unchecked(monkeypatch):
    """Run with the gradient check off: the rules of a test are wrong on purpose.

    In the environment too: on a GPU a checkpoint runs the function again in a thread of
    autograd's, which sees no context of the test's.
    """
    monkeypatch.setenv("GRADTOOLS_GRADCHECK", "off")
    policy.from_environment.cache_clear()
    with gt.gradcheck_policy("off"):
        yield
    monkeypatch.undo()
    policy.from_environment.cache_clear()
