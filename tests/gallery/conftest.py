"""The scripts of the gallery, run as their readers run them."""

import contextlib
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def gallery(tmp_path_factory):
    """Return the names that a script leaves behind; each script runs once."""
    left = {}
    folder = tmp_path_factory.mktemp("gallery")  # what a script draws goes there

    def names_of(script):
        if script not in left:
            dtype = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
            try:
                with contextlib.chdir(folder):
                    left[script] = runpy.run_path(str(EXAMPLES / f"{script}.py"))
            finally:
                torch.set_default_dtype(dtype)
        return left[script]

    return names_of


@pytest.fixture(autouse=True)
def _as_in_the_script(_reproducible):
    """Compute in single precision, as whoever runs the scripts does."""
    torch.set_default_dtype(torch.float32)
