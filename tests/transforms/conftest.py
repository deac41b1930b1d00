"""Every composition runs on every case of the table."""

import pytest
import torch
from torch.testing import assert_close

from tests import capabilities
from tests.transforms.cases import CASES


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What a test finds is what docs/capabilities.md says."""
    report = yield
    if report.skipped or (report.when == "call" and report.passed):
        contradiction = capabilities.disagreement(report)
        if contradiction is not None:
            report.outcome, report.longrepr = "failed", contradiction
    return report


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


@pytest.fixture(autouse=True)
def _marker_rules_are_wrong_on_purpose(unchecked):
    pass


@pytest.fixture
def agree(case):
    """Compare a composition of transforms on the rule with it on the reference.

    With ``trodden``, once more when code has been generated for such calls.
    """

    def agree(composition, *, reference=None, trodden=False):
        expected = (reference or composition)(case.reference, *case.inputs())
        actual = composition(case.rule, *case.inputs())
        assert_close(actual, expected)
        if trodden:
            tread(case.rule, case.inputs())
            assert_close(composition(case.rule, *case.inputs()), expected)
        return actual

    return agree


def tread(rule, inputs, times=4):
    """Call a rule, and its bwd, until it has code for such calls."""
    for _ in range(times):
        args = [arg.detach().requires_grad_() for arg in inputs]
        rule(*args).sum().backward()


@pytest.fixture
def _traceable_jacfwd(case):
    if torch.__version__ < "2.13" and len(case.inputs()) > 1:
        pytest.skip(
            "Dynamo 2.11 does not trace jacfwd in several arguments, of any function "
            "(chunk.diagonal of an unknown offset); 2.13 does"
        )


@pytest.fixture
def compiled():
    """Compile a composition of transforms as a whole, without graph breaks."""

    def compiled(composition, backend="aot_eager", **options):
        def run(f, *args):
            torch._dynamo.reset()
            whole = torch.compile(
                lambda *args: composition(f, *args),
                fullgraph=True,
                backend=backend,
                **options,
            )
            return whole(*args)

        return run

    return compiled
