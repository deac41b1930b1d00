"""The material of the mutation benchmark: right rules are right, mutants are made."""

import pytest
import torch
from torch.autograd import gradcheck

from tests.benchmarks.judge import autograd, copied, judge, normal_like
from tests.benchmarks.mutators import (
    MUTATORS,
    batched_identity,
    get,
    identity,
    map_tensors,
    tensors,
)
from tests.benchmarks.right_rules import RULES

SEEDS = (0, 1)
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def active(rule, seed, dtype=torch.float64):
    """Return arguments and a cotangent, all of which require a gradient."""
    args = rule.args(dtype, seed)
    g = normal_like(rule.fun(*args), torch.Generator().manual_seed(seed + 7))
    return map_tensors(lambda leaf: leaf.clone().requires_grad_(), (args, g))


def by_hand(rule, args, g):
    returned = rule.bwd(rule.fwd(*args)[1], g)
    return [get(returned, place.keys) for place in rule.places()]


def second(rule, args, g, first):
    """Return every derivative of <first derivative, w> in the arguments and in g."""
    firsts = first(rule, args, g)
    generator = torch.Generator().manual_seed(3)
    total = sum(
        (c * w.conj()).real.sum()
        for c, w in zip(firsts, normal_like(firsts, generator), strict=True)
    )
    leaves = tensors((args, g))
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [
        torch.zeros_like(leaf) if c is None else c
        for leaf, c in zip(leaves, found, strict=True)
    ]


def by_autograd(rule, args, g):
    return autograd(rule.fun, args, g, create_graph=True)


def assert_close(found, expected, rel=1e-10):
    for c, e in zip(found, expected, strict=True):
        assert c.shape == e.shape
        assert c.dtype == e.dtype
        assert (c - e).abs().max() <= rel * (e.abs().max() + 1)


@rules
@pytest.mark.parametrize("seed", SEEDS)
def test_right_to_second_order(rule, seed):
    args, g = active(rule, seed)
    assert_close(tensors(rule.fwd(*args)[0]), tensors(rule.fun(*args)))
    assert_close(by_hand(rule, args, g), by_autograd(rule, args, g))
    assert_close(second(rule, args, g, by_hand), second(rule, args, g, by_autograd))


@rules
def test_right_in_float32(rule):
    args, g = active(rule, 0, torch.float32)
    assert all(
        leaf.dtype in (torch.float32, torch.complex64)
        for leaf in tensors((args, g, rule.fwd(*args)))
    )
    assert_close(by_hand(rule, args, g), by_autograd(rule, args, g), 1e-4)


@rules
def test_autograd_itself(rule):
    """Autograd, the reference everywhere here, agrees with differences."""
    args, _ = active(rule, 0)
    leaves = tensors(args)

    def flat(*values):
        given = iter(values)
        return tuple(tensors(rule.fun(*map_tensors(lambda _: next(given), args))))

    assert gradcheck(flat, leaves, fast_mode=True)


@rules
def test_judge_finds_no_fault(rule):
    unchanged = [identity(rule), batched_identity(rule)]
    made = [mutant for mutant in unchanged if mutant is not None]  # not all are batched
    assert not any(judge(mutant, 0).counts for mutant in made)


@rules
def test_mutants_state_what_they_blame(rule):
    paths = {place.path for place in rule.places()}
    made = [mutant for mutate in MUTATORS.values() for mutant in mutate(rule)]
    assert made
    keys = [(mutant.mutator, mutant.target) for mutant in made]
    assert len(keys) == len(set(keys))
    assert paths >= {*rule.summed, *rule.contracted, *rule.sizes}
    assert all(variant.path in paths for variant in rule.dropped.values())


@pytest.mark.parametrize("name", MUTATORS)
def test_each_mistake_counts_somewhere(name):
    for rule in RULES.values():
        for mutant in MUTATORS[name](rule):
            if judge(mutant, 0).counts:
                return
    pytest.fail("no mutant counts")


def test_judge_leaves_arguments_alone():
    rule = RULES["linear"]
    before = copied(rule.args(torch.float64, 0))
    judge(identity(rule), 0)
    assert all(map(torch.equal, before, rule.args(torch.float64, 0)))
