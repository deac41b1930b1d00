"""An urgent fix, checked in milliseconds."""

import os
import subprocess
import sys

import pytest
import torch

import gradtools as gt
from gradtools.__main__ import main
from tests.gallery.conftest import EXAMPLES
from tests.gallery.stating import restated


@pytest.fixture
def names(gallery):
    return gallery("urgent_fix")


def test_the_output_is_doubled_and_the_gradient_clipped(names):
    x = names["x"].detach()
    torch.testing.assert_close(names["fixed"](x), 2 * x)
    torch.testing.assert_close(names["gradient"], (8 * x).clamp(-0.1, 0.1))


def test_it_was_checked_within_milliseconds(names):
    assert names["report"].outcome == "passed"
    assert names["report"].evaluations <= 40
    assert 0 < names["milliseconds"] == 1e3 * names["report"].seconds


def test_the_core_is_not_to_be_wrong(names):
    double = restated(names["double"], bwd=lambda residuals, g: g)
    with pytest.raises(gt.GradientMismatchError, match=r"it is 0\.5 times"):
        double(torch.ones(3, requires_grad=True))


def test_a_check_that_is_skipped_is_on_record(names):
    wrong = restated(names["double"], bwd=lambda residuals, g: g)
    with gt.gradcheck_policy("off"):
        wrong(torch.ones(3, requires_grad=True))
    (report,) = wrong.reports
    assert report.outcome == "not checked"
    assert "the policy is off" in str(report)
    with pytest.raises(gt.GradientMismatchError):  # the next call makes up for it
        wrong(torch.ones(3, requires_grad=True))


def test_with_the_environment_variable_off_the_script_itself_says_so():
    environment = os.environ | {"GRADTOOLS_GRADCHECK": "off"}
    ran = subprocess.run(
        [sys.executable, EXAMPLES / "urgent_fix.py"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "not checked" in ran.stdout
    assert "the policy is off" in ran.stdout


def test_the_command_line_does_not_call_an_unchecked_rule_right(tmp_path, capsys):
    script = tmp_path / "unchecked_fix.py"
    script.write_text(
        "import gradtools as gt\n"
        "@gt.custom_vjp\n"
        "def double(x):\n"
        "    return 2 * x\n"
        "double.def_bwd(lambda residuals, g: 2 * g)\n"
    )
    assert main(["check", str(script)]) == 3
    assert "not checked" in capsys.readouterr().out
