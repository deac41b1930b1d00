"""The spellings of a contest are the same function with the same derivative."""

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.benchmarks.rivals import CONTESTS, contest

contests = pytest.mark.parametrize("rivals", CONTESTS.values(), ids=CONTESTS)


def arguments(rivals, batch=None):
    return rivals.arguments(6, dtype=torch.float64, batch=batch)


@contests
def test_every_contest_has_every_spelling(rivals):
    assert set(rivals.spellings) == {
        contest.GRADTOOLS,
        contest.COMBINED,
        contest.COMPOSABLE,
        contest.GENERATED,
        contest.OWN_VMAP,
        contest.CUSTOM_OP,
        contest.COMPOSITE,
    }


@contests
def test_spellings_agree(rivals):
    args = arguments(rivals)
    values = rivals.fun(*args)
    gradients = rivals.step(rivals.fun, args)()
    assert len(gradients) == len(
        pytree.tree_leaves([args[position] for position in rivals.argnums])
    )
    for spelling in rivals.spellings.values():
        torch.testing.assert_close(spelling(*args), values)
        torch.testing.assert_close(rivals.step(spelling, args)(), gradients)


@contests
@pytest.mark.parametrize("work", contest.TRANSFORMS)
def test_spellings_agree_under_transforms(rivals, work):
    args = arguments(rivals, batch=3)
    expected = rivals.transformed(work, rivals.fun, args)(*args)
    able = contest.UNDER_VMAP if work == "vmap" else contest.UNDER_FUNC
    for name in able:
        found = rivals.transformed(work, rivals.spellings[name], args)(*args)
        torch.testing.assert_close(found, expected)


@contests
def test_spellings_keep_to_float32(rivals):
    args = rivals.arguments(6)
    for spelling in rivals.spellings.values():
        gradients = rivals.step(spelling, args)()
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
