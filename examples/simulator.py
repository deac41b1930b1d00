"""A simulator with a gradient that is about right, and a figure for how far it is off.

The simulator throws a ball through air and says where it lands. Its author has a
gradient, that of the throw without air. ``Approximate`` says how wrong it may be; the
check measures how wrong it is, against extrapolated differences of the simulator itself
in float64, and raises where it leaves the budget.
"""

import numpy as np
import torch

import gradtools as gt

GRAVITY, STEP = 9.81, 1e-3


def landed(speed, angle, drag):
    """Return how far a ball flies, by Runge-Kutta and a last part of a step."""

    def rate(state):
        _, _, u, v = state
        air = drag * np.hypot(u, v)
        return np.array([u, v, -air * u, -GRAVITY - air * v])

    state = np.array([0, 0, speed * np.cos(angle), speed * np.sin(angle)])
    while True:
        a = rate(state)
        b = rate(state + STEP / 2 * a)
        c = rate(state + STEP / 2 * b)
        after = state + STEP / 6 * (a + 2 * b + 2 * c + rate(state + STEP * c))
        if after[1] < 0:
            share = state[1] / (state[1] - after[1])
            return np.float64(state[0] + share * (after[0] - state[0]))
        state = after


def made(drag, rel):
    """Return the simulator at some drag, with a budget for its gradient's error."""

    @gt.external(
        out=lambda speed, angle: torch.empty_like(speed),
        numpy=True,
        dtypes=torch.float64,
        contract=gt.Approximate(rel=rel),
    )
    def distance(speed, angle):
        return landed(speed, angle, drag)

    @distance.def_bwd
    def _(residuals, g):  # of speed**2 * sin(2 * angle) / gravity
        (speed, angle), _ = residuals
        by_speed = 2 * speed * torch.sin(2 * angle) / GRAVITY
        by_angle = 2 * speed**2 * torch.cos(2 * angle) / GRAVITY
        return g * by_speed, g * by_angle

    return distance


def main():
    throw = torch.tensor(8.0, dtype=torch.float64), torch.tensor(0.5).double()
    thin = made(drag=0.005, rel=0.1)
    report = thin.gradcheck(*throw)
    errors = {e.question: e.error for e in report.evidence if "error" in e.question}
    print(report)
    try:
        made(drag=0.1, rel=0.1).gradcheck(*throw)
    except gt.GradientMismatchError as error:
        print(error)
        return errors, error
    return errors, None


if __name__ == "__main__":
    main()
