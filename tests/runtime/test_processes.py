"""Rules are like functions: one object, pickled by name, usable when spawned."""

import copy
import multiprocessing
import pickle

import pytest
import torch

import gradtools as gt
from gradtools.errors import Violation
from tests.runtime.rules import Scaled, gradients, malformed, native, swish


@pytest.fixture(scope="module")
def elsewhere():
    """Yield a pool of one spawned process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool


def test_a_rule_in_a_spawned_process(elsewhere):
    there = elsewhere.apply(gradients, (swish,))
    for found, expected in zip(there, gradients(native), strict=True):
        assert found == pytest.approx(expected)


def test_an_error_of_a_spawned_process_has_its_parts(elsewhere):
    with pytest.raises(gt.BackwardContractError, match="tuple of 3") as here:
        malformed()
    with pytest.raises(gt.BackwardContractError, match="tuple of 3") as there:
        elsewhere.apply(malformed)
    assert here.value.violations
    for name in ("what", "rule", "function", "violations", "fix"):
        assert getattr(there.value, name) == getattr(here.value, name), name


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_rule_is_the_rule(copied):
    assert copied(swish) is swish


def test_a_pickle_of_a_rule_is_its_name():
    assert pickle.loads(pickle.dumps(swish)) is swish
    assert pickle.loads(pickle.dumps(Scaled.scaled)) is Scaled.scaled
    assert len(pickle.dumps(swish)) < 100


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_a_copied_module_computes_with_its_own_parameters(copied):
    module = Scaled()
    twin = copied(module)
    x = torch.linspace(-1, 1, 5)
    twin(x).sum().backward()
    assert module.beta.grad is None
    expected = torch.autograd.grad(native(3 * x, twin.beta).sum(), twin.beta)
    torch.testing.assert_close((twin.beta.grad,), expected)
    twin.factor = 5.0
    torch.testing.assert_close(twin(x), native(5 * x, twin.beta))
    torch.testing.assert_close(module(x), native(3 * x, module.beta))


def test_a_bound_rule_is_copied_with_its_instance():
    bound = Scaled().scaled
    twin = copy.deepcopy(bound)
    assert twin.rule is bound.rule
    assert twin.instance is not bound.instance
    assert torch.equal(twin(torch.ones(2)), torch.full((2,), 3.0))


def test_an_error_keeps_its_parts_across_processes():
    error = gt.BackwardContractError(
        "what",
        rule="rule",
        function="function",
        violations=[Violation("args.x", "one", "two")],
        fix="mend",
    )
    error.add_note("a note")
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is gt.BackwardContractError
    assert str(twin) == str(error)
    assert twin.violations == error.violations
    assert (twin.what, twin.rule, twin.function, twin.fix) == (
        "what",
        "rule",
        "function",
        "mend",
    )
