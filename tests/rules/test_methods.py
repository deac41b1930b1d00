"""Rules on methods, in classes and their subclasses, and as objects."""

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

import gradtools as gt
from tests.rules.stating import gradients, leaf, stated

pytestmark = pytest.mark.usefixtures("unchecked")


class Gain:
    """Methods with a rule: its bwd takes self, or leaves it out, in different ways."""

    def __init__(self, factor):
        self.factor = factor

    def __repr__(self):
        return f"Gain({self.factor})"

    @gt.custom_vjp
    def with_self(self, x, n=1):
        return self.factor * x * n

    @with_self.def_fwd
    def _(self, x, n=1):
        return self.factor * x * n, n

    @with_self.def_bwd
    def _(self, n, g):
        return None, 10 * self.factor * g * n, None

    @gt.custom_vjp
    def without_self(self, x, n=1):
        return self.factor * x * n

    @without_self.def_fwd
    def _(self, x, n=1):
        return self.factor * x * n, (self.factor, n)

    without_self.def_bwd(
        lambda residuals, g: (10 * residuals[0] * g * residuals[1], None)
    )

    @gt.custom_vjp
    def by_name(self, x, n=1):
        return self.factor * x * n

    @by_name.def_bwd
    def _(self, residuals, g, *, needs):
        ((me, _, n), _) = residuals
        assert me is self
        assert needs == (False, True, False)
        return {"x": 10 * self.factor * g * n}

    @gt.custom_vjp(nondiff_argnames="n")
    def nondiff(self, n, x):
        return self.factor * x * n

    @nondiff.def_fwd
    def _(self, n, x):
        return self.factor * x * n, ()

    @nondiff.def_bwd
    def _(self, n, _, g):
        return (10 * self.factor * g * n,)


class Louder(Gain):
    def __init__(self, factor):
        super().__init__(2 * factor)


METHODS = ["with_self", "without_self", "by_name"]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("make", "factor"), [(Gain, 3.0), (Louder, 6.0)])
def test_a_method_is_bound_to_its_instance(name, make, factor):
    x = leaf(1.0)
    method = getattr(make(3.0), name)
    for args, n in (((), 1), ((2,), 2)):
        assert_close(method(x, *args), torch.tensor([factor * n]))
        assert gradients(method(x, *args), x) == (10 * factor * n,)
    assert gradients(getattr(make, name)(make(3.0), x), x) == (10 * factor,)


def test_two_instances_do_not_mix():
    first, second, x = Gain(3.0), Gain(5.0), leaf(1.0)
    outs = first.with_self(x), second.with_self(x)
    first.factor = 7.0
    assert gradients(outs[1], x) == (50,)
    assert gradients(outs[0], x) == (70,)


def test_nondiff_arguments_follow_self():
    x = leaf(1.0)
    assert gradients(Gain(3.0).nondiff(2, x), x) == (60,)


@pytest.mark.parametrize("name", METHODS)
def test_under_transforms(name):
    method = getattr(Gain(3.0), name)
    batch = torch.tensor([1.0, 2.0])
    assert_close(torch.func.vmap(torch.func.grad(method))(batch), 0 * batch + 30)
    assert_close(torch.func.jvp(method, (batch,), (batch,))[1], 30 * batch)


class Overridden(Gain):
    def with_self(self, x, n=1):
        return super().with_self(x, n) ** 2


def test_a_subclass_may_call_it_through_super():
    x = leaf(1.0)
    assert gradients(Overridden(3.0).with_self(x), x) == (2 * 3 * 30,)


# Other places in a class.


def triple(x):
    return 3 * x


def rule_of_triple():
    return stated(triple, lambda x: (3 * x, ()), lambda _, g: 10 * g)


class Places:
    @staticmethod
    @gt.custom_vjp
    def static(x):
        return 3 * x

    static.__func__.defvjp(lambda x: (3 * x, ()), lambda _, g: 10 * g)

    assigned = staticmethod(rule_of_triple())

    @classmethod
    @gt.custom_vjp
    def of_class(cls, x):
        return cls.factor() * x

    of_class.__func__.defvjp(
        lambda cls, x: (cls.factor() * x, ()), lambda _, g: (None, 10 * g)
    )

    @classmethod
    def factor(cls):
        return 3

    def __init__(self):
        self.own = rule_of_triple()


@pytest.mark.parametrize("name", ["static", "assigned", "of_class", "own"])
def test_static_class_and_instance_attributes(name):
    x = leaf(1.0)
    holders = [Places()] if name == "own" else [Places(), Places]
    for holder in holders:
        out = getattr(holder, name)(x)
        assert_close(out, torch.tensor([3.0]))
        assert gradients(out, x) == (10,)


@pytest.mark.parametrize("wrapper", [staticmethod, classmethod])
def test_the_other_order_is_refused(wrapper):
    """The rule would bind self to a function that takes none."""
    with pytest.raises(gt.DefinitionError, match=f"{wrapper.__name__}") as caught:
        gt.custom_vjp(wrapper(triple))
    assert f"@{wrapper.__name__}" in caught.value.fix


# As objects.


def test_a_bound_rule_copies_and_pickles_with_its_instance():
    bound, x = Gain(3.0).with_self, leaf(1.0)
    for twin in (copy.deepcopy(bound), pickle.loads(pickle.dumps(bound))):
        assert twin.rule is Gain.with_self
        assert twin.instance is not bound.instance
        assert gradients(twin(x), x) == (30,)
    assert copy.copy(bound) == bound


def test_an_object_that_holds_a_rule_is_copied_with_the_rule_itself():
    first = Places()
    assert copy.deepcopy(first).own is first.own


def test_repr_names_rule_and_instance():
    assert repr(Gain.with_self).startswith(f"<CustomVJP with_self ({__file__}:")
    assert repr(Gain.with_self).partition("\n")[0].endswith(": fwd, bwd>")
    assert repr(Gain(3.0).with_self).startswith("<bound <CustomVJP with_self")
    assert repr(Gain(3.0).with_self).endswith("of Gain(3.0)>")


def test_a_bound_rule_compares_as_a_bound_method_does():
    gain = Gain(3.0)
    assert gain.with_self == gain.with_self
    assert hash(gain.with_self) == hash(gain.with_self)
    assert gain.with_self != gain.by_name
    assert gain.with_self != Gain(3.0).with_self


def test_gradcheck_and_reports_are_the_rules():
    class Exact(Gain):
        @gt.custom_vjp
        def square(self, x):
            return self.factor * x * x

        @square.def_bwd
        def _(self, residuals, g):
            ((_, x), _) = residuals
            return None, 2 * self.factor * g * x

    bound = Exact(3.0).square
    before = len(bound.reports)
    bound.gradcheck(leaf(2.0))
    assert len(bound.reports) == before + 1
    assert Exact.square.reports == bound.reports
