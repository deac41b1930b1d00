"""What the benchmark of second order compares computes the same."""

import pytest
import torch

from tests.benchmarks import curvature, meta_step
from tests.benchmarks.rivals.contest import GRADTOOLS


@pytest.mark.parametrize("job", curvature.SPELLINGS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch.func.linearize
def test_all_spellings_of_a_job_agree(job):
    torch.set_default_dtype(torch.float32)
    right, wrong = curvature.able(job, curvature.logistic("cpu"))
    assert GRADTOOLS in right
    assert wrong == {}


@pytest.mark.parametrize("name", curvature.WORKLOADS)
def test_products_of_gradtools_are_right_on_every_workload(name):
    torch.set_default_dtype(torch.float32)
    work = curvature.WORKLOADS[name]("cpu")
    for job in ("hvp", "ggnvp"):
        found = curvature.SPELLINGS[job][GRADTOOLS](work)()
        wanted = curvature.reference(job, work)
        assert curvature.distance(found, wanted) < curvature.TOLERANCE


def test_all_meta_gradients_agree():
    torch.set_default_dtype(torch.float32)
    runs = meta_step.contenders("cpu")
    runs.pop(meta_step.COMPILED, None)  # compiled at length, and checked when measured
    wanted = {key: g.double() for key, g in runs[meta_step.BY_HAND]().items()}
    assert len(runs) >= 3
    for name, run in runs.items():
        assert curvature.distance(run(), wanted) < 1e-5, name
