"""Timing, put to the test with contenders whose cost is known and a clock of paper."""

import gc

import numpy as np
import pytest

from tests.benchmarks import timing


class Paper:
    """A clock that a contender moves; the machine is slower in some blocks."""

    def __init__(self, noise=0.0):
        self.now = 0.0
        self.draw = np.random.default_rng(1)
        self.noise = noise
        self.blocks = []

    def contender(self, seconds):
        def run():
            self.now += seconds

        return run

    def __call__(self, run, calls):
        begin = self.now
        for _ in range(calls):
            run()
        taken = self.now - begin
        self.blocks.append((run, calls))
        return taken * (1 + self.noise * self.draw.exponential())


def race(noise=0.0, **costs):
    clock = Paper(noise)
    contenders = {name: clock.contender(cost) for name, cost in costs.items()}
    return timing.Race(60, clock=clock).run(contenders), clock


def test_ratio_of_known_costs():
    rounds, _ = race(fast=1e-5, slow=3e-5)
    assert rounds.ratio("slow", "fast") == pytest.approx((3, 3, 3))
    assert rounds.over("slow", "fast") == pytest.approx((20, 20, 20))
    assert rounds.time("fast") == pytest.approx((10, 10, 10))


def test_interval_holds_the_ratio_in_spite_of_noise():
    rounds, _ = race(noise=0.3, fast=1e-5, slow=3e-5)
    value, low, high = rounds.ratio("slow", "fast")
    assert low < value < high
    assert low < 3 < high
    assert high - low < 1


def test_blocks_last_as_long_as_asked_whatever_a_call_costs():
    _, clock = race(fast=1e-5, slow=1.0)
    *_, last, before = clock.blocks
    assert {last[1], before[1]} == {200, 1}


def test_a_slow_start_does_not_shorten_the_blocks():
    clock = Paper()
    delays = iter([1.0] * (timing.WARM_UP + 1))

    def run():
        clock.now += next(delays, 1e-5)

    timing.Race(3, clock=clock).run({"a": run})
    assert clock.blocks[-1][1] == 200


def test_turns_are_drawn_anew_and_all_have_as_many():
    _, clock = race(a=1e-3, b=1e-3, c=1e-3)
    turns = [run for run, _ in clock.blocks[-180:]]
    rounds = [tuple(turns[i : i + 3]) for i in range(0, 180, 3)]
    assert all(len(set(each)) == 3 for each in rounds)
    assert len(set(rounds)) == 6


def test_nothing_is_collected_during_a_block():
    seen = []
    timing.Race(2, clock=lambda run, calls: run() or 1.0).run(
        {"a": lambda: seen.append(gc.isenabled())}
    )
    assert gc.isenabled()
    assert not any(seen[-2:])


def test_geometric_mean_over_rules():
    mean = timing.geometric_mean([np.full(9, 2.0), np.full(9, 0.5), np.full(9, 8.0)])
    assert mean == pytest.approx((2, 2, 2))


def test_geometric_mean_draws_within_each_rule():
    draw = np.random.default_rng(0)
    ratios = [2 + 0.1 * draw.standard_normal(50), 8 + 0.1 * draw.standard_normal(50)]
    value, low, high = timing.geometric_mean(ratios)
    assert low < value < high
    assert value == pytest.approx(4, rel=0.02)
    assert high - low < 0.2


def test_rules_take_turns_too():
    clock = Paper()
    found = timing.Race(5, clock=clock).run_rules(
        {
            "exp": {"fast": clock.contender(1e-4), "slow": clock.contender(2e-4)},
            "sum": {"fast": clock.contender(1e-4), "slow": clock.contender(8e-4)},
        }
    )
    assert found["exp"].ratio("slow", "fast") == pytest.approx((2, 2, 2))
    assert found["sum"].ratio("slow", "fast") == pytest.approx((8, 8, 8))
    assert len({run for run, _ in clock.blocks[-4:]}) == 4
