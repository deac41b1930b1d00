"""A weight gradient that is clipped on purpose."""

import pytest
import torch

import gradtools as gt
from tests.gallery.stating import restated


@pytest.fixture
def names(gallery):
    return gallery("clipped_weight_gradient")


def test_both_ways_clip_the_gradient_of_the_weight_alone(names):
    w, b = names["plain"]
    assert w.abs().max() > 1
    assert (w.abs() < 1).any() or w.abs().min() > 1
    for found in (names["around"], names["inside"]):
        torch.testing.assert_close(found[0], w.clamp(-1, 1))
        torch.testing.assert_close(found[1], b)


def test_what_was_checked_is_the_unclipped_formula(names):
    exact, changed = (names[name].reports[0] for name in ("linear", "clipped_inside"))
    for report in (exact, changed):
        assert report.outcome == "passed"
        assert "derivative in w, b by autograd" in str(report)
    assert exact.contract == "Exact()"
    assert changed.contract == "Surrogate(reference=linear_bwd)"
    assert "a surrogate, not compared; its reference is" in str(changed)


def leaves(names):
    return names["x"], torch.randn(1, 10).requires_grad_(), torch.zeros(1)


def test_a_clip_that_claims_to_be_exact_is_refused(names):
    rule = restated(names["clipped_inside"], contract=gt.Exact())
    with pytest.raises(
        gt.GradientMismatchError, match=r"args\.w is not linear .* clipped at 1"
    ) as caught:
        rule(*leaves(names))
    assert "Surrogate(reference=...)" in caught.value.fix
    assert "clip_grad" in caught.value.fix


def test_a_mistake_in_the_unclipped_formula_is_refused(names):
    def mean(residuals, g):
        (x, w, _), _ = residuals
        return g @ w, g.T @ x / len(x), g.sum(0)

    def clipped(residuals, g):
        dx, dw, db = mean(residuals, g)
        return dx, dw.clamp(-1, 1), db

    rule = restated(
        names["clipped_inside"], bwd=clipped, contract=gt.Surrogate(reference=mean)
    )
    with pytest.raises(
        gt.GradientMismatchError, match=r"reference of its contract .* a mean over 442"
    ) as caught:
        rule(*leaves(names))
    assert caught.value.function.startswith(f"reference ({__file__}:")
    assert caught.value.fix.startswith("Correct the reference")
    around = restated(names["linear"], bwd=mean)
    with pytest.raises(gt.GradientMismatchError, match="a mean over 442 numbers"):
        around(*leaves(names))


def test_without_a_reference_the_report_says_that_nothing_was_compared(names):
    rule = restated(names["clipped_inside"], contract=gt.Surrogate())
    rule(*leaves(names))
    assert "a surrogate, not compared" in str(rule.reports[0])
    assert "by autograd" not in str(rule.reports[0])


def test_a_clip_has_no_forward_mode(names):
    x, w, b = leaves(names)
    f = lambda w: names["clipped_inside"](x, w, b)
    with pytest.raises(gt.TransformError, match="not linear in its cotangent"):
        gt.jvp(f, (w.detach(),), (w.detach(),))
