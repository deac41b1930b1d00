"""Every product of every function of the table, against differences of its gradient."""

import pytest
import torch

import gradtools as gt
from tests.second_order.cases import CASES
from tests.second_order.differences import directions, distance, floating, product

TOLERANCE = 1e-6
# torch's own, about its derivative of matrix_exp:
pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


def assert_right(found, case, tangents):
    wanted, error = product(case.f, case.primals, tangents)
    assert error < TOLERANCE, "the reference itself"
    assert distance(floating(found), wanted) < TOLERANCE


def as_tuple(found, case):
    return (found,) if len(case.primals) == 1 else found


def test_hvp(case):
    tangents = directions(case.primals, 0)
    assert_right(gt.hvp(case.f, case.primals, tangents), case, tangents)


def test_an_operator_that_is_called_three_times(case):
    with gt.hvp_fn(case.f, *case.primals) as op:
        for seed in range(3):
            tangents = directions(case.primals, seed)
            assert_right(as_tuple(op(*tangents), case), case, tangents)


def test_linearized_gradient_called_three_times(case):
    places = [i for i, p in enumerate(case.primals) if floating(p)]
    gradient = gt.grad(case.f, tuple(places))
    _, push = gt.linearize(gradient, *case.primals)
    for seed in range(3):
        tangents = directions(case.primals, seed)
        assert_right(push(*tangents), case, tangents)


def test_jvp_of_grad(case):
    places = [i for i, p in enumerate(case.primals) if floating(p)]
    tangents = directions(case.primals, 0)
    _, found = gt.jvp(gt.grad(case.f, tuple(places)), case.primals, tangents)
    assert_right(found, case, tangents)


def test_grad_of_jvp(case):
    places = tuple(i for i, p in enumerate(case.primals) if floating(p))
    tangents = directions(case.primals, 0)

    def slope(*primals):
        return gt.jvp(case.f, primals, tangents)[1]

    assert_right(gt.grad(slope, places)(*case.primals), case, tangents)


def test_a_block(case):
    with gt.hvp_fn(case.f, *case.primals) as op:
        several = [directions(case.primals, seed) for seed in range(3)]
        stacked = torch.utils._pytree.tree_map(
            lambda *v: None if v[0] is None else torch.stack(v), *several
        )
        for chunk in (1, 3):
            found = as_tuple(op.block(*stacked, chunk=chunk), case)
            for number, tangents in enumerate(several):
                one = [tensor[number] for tensor in floating(found)]
                assert_right(one, case, tangents)
