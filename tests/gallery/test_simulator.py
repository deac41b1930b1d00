"""A simulator with a gradient that is about right: the figure, and the budget."""

import numpy as np
import pytest
import torch

import gradtools as gt


@pytest.fixture(scope="module")
def ran(gallery):
    """Return the names of the script, and what its main found; it takes seconds."""
    names = gallery("simulator")
    return names, *names["main"]()


def throw(**options):
    return (torch.tensor(value, **options).double() for value in (8.0, 0.5))


def true_error(names, drag):
    """Return how far off the gradient without air is, by differences of our own."""
    speed, angle, step = 8.0, 0.5, 1e-4
    plain = [
        2 * speed * np.sin(2 * angle) / names["GRAVITY"],
        2 * speed**2 * np.cos(2 * angle) / names["GRAVITY"],
    ]
    land = lambda a, b: names["landed"](speed + a, angle + b, drag)
    true = [(land(a, b) - land(-a, -b)) / (2 * step) for a, b in ((step, 0), (0, step))]
    return [abs(p / t - 1) for p, t in zip(plain, true, strict=True)]


def test_the_error_of_each_argument_is_measured(ran):
    names, errors, _ = ran
    by_speed, by_angle = true_error(names, drag=0.005)
    assert errors == {
        "error in speed": pytest.approx(by_speed, rel=0.02),
        "error in angle": pytest.approx(by_angle, rel=0.02),
    }
    assert min(by_speed, by_angle) > 0.02
    assert max(by_speed, by_angle) < 0.06


def test_the_figures_are_in_the_report_beside_the_budget(ran):
    names, errors, _ = ran
    report = names["made"](drag=0.005, rel=0.1).gradcheck(*throw())
    for question, error in errors.items():
        (found,) = [e for e in report.evidence if e.question == question]
        assert found.detail.startswith(f"{error:.1e} of its size")
        assert found.detail.endswith("(budget 1.0e-01)")
        assert found.detail in str(report)


def test_out_of_the_budget_the_error_says_by_how_much(ran):
    names, _, refused = ran
    by_speed, _ = true_error(names, drag=0.1)
    assert isinstance(refused, gt.GradientMismatchError)
    assert "args.speed is outside the budget of its contract" in refused.what
    excess = refused.violations[-1]
    assert excess.expected == "an error of at most 1.0e-01 of its size, the budget"
    assert excess.got.startswith(f"an error of {by_speed:.1e} of its size")


@pytest.mark.parametrize("argument", ["speed", "angle"])
def test_a_budget_is_kept_by_every_argument(ran, argument):
    """A bwd that is right to the budget but in one argument, on the first call."""
    names, *_ = ran
    good = names["made"](drag=0.005, rel=0.1)
    factor = {"speed": 1.0, "angle": 1.0} | {argument: 1.2}

    def bwd(residuals, g):
        by_speed, by_angle = good.rule.bwd(residuals, g)
        return by_speed * factor["speed"], by_angle * factor["angle"]

    wrong = gt.external(
        good.kernel.function,
        out=good.kernel.out,
        numpy=True,
        dtypes=torch.float64,
        contract=gt.Approximate(rel=0.1),
    )
    wrong.def_bwd(bwd)
    args = [arg.requires_grad_() for arg in throw()]
    with pytest.raises(gt.GradientMismatchError, match=rf"args\.{argument} is outside"):
        wrong(*args)


def test_noise_of_single_precision_does_not_reach_the_figure(ran):
    names, *_ = ran
    with pytest.raises(gt.DefinitionError, match="does not take this dtype"):
        names["made"](drag=0.005, rel=0.1)(*(arg.float() for arg in throw()))
