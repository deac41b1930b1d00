"""What a check finds around a rule, and leaves as it was."""

import warnings

import pytest
import torch
from torch import distributed

import gradtools as gt


def x(count=6):
    return torch.cos(1.3 * torch.arange(3.0 * count)).reshape(count, 3)


def slope(x, g, norm, factor=1.0):
    """The derivative of a batch norm in training, in its input."""
    centred = x - x.mean(0)
    spread = (centred.square().mean(0) + norm.eps).sqrt()
    y = centred / spread
    g = g * norm.weight.detach() * factor
    return (g - g.mean(0) - y * (g * y).mean(0)) / spread


def norm_with_frozen_weights():
    norm = torch.nn.BatchNorm1d(3)
    norm(x() + 1)  # statistics that are not the initial ones
    return norm.requires_grad_(False)


def captured(norm, factor=1.0):
    @gt.custom_vjp
    def normalized(x):
        return norm(x)

    @normalized.def_bwd
    def _(residuals, g):
        ((x,), _) = residuals
        return slope(x, g, norm, factor)

    return normalized


def passed(norm, factor=1.0):
    @gt.custom_vjp
    def normalized(norm, x):
        return norm(x)

    @normalized.def_bwd
    def _(residuals, g):
        ((norm, x), _) = residuals
        return None, slope(x, g, norm, factor)

    class Call:
        reports = property(lambda self: normalized.reports)

        def __call__(self, x):
            return normalized(norm, x)

        def gradcheck(self, x):
            return normalized.gradcheck(norm, x)

    return Call()


def on_self(norm, factor=1.0):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        @gt.custom_vjp
        def forward(self, x):
            return self.norm(x)

        @forward.def_bwd
        def _bwd(self, residuals, g):
            ((_, x), _) = residuals
            return None, slope(x, g, self.norm, factor)

    return Layer().forward


WAYS = [captured, passed, on_self]


def state_of(norm):
    return {name: (id(b), b.tolist()) for name, b in norm.named_buffers()}


@pytest.mark.parametrize("way", WAYS)
def test_a_check_leaves_the_statistics_of_a_batch_norm_alone(way):
    norm = norm_with_frozen_weights()
    before = state_of(norm)
    assert before["num_batches_tracked"][1] == 1
    assert way(norm).gradcheck(x()).outcome == "passed"
    assert state_of(norm) == before


@pytest.mark.parametrize("way", WAYS)
def test_a_check_leaves_the_versions_of_the_statistics_alone(way):
    norm = norm_with_frozen_weights()
    before = {name: b._version for name, b in norm.named_buffers()}
    assert way(norm).gradcheck(x()).outcome == "passed"
    assert {name: b._version for name, b in norm.named_buffers()} == before


@pytest.mark.parametrize("way", WAYS)
def test_the_first_call_counts_as_one_batch(way):
    norm, twin = norm_with_frozen_weights(), norm_with_frozen_weights()
    rule = way(norm)
    rule(x().requires_grad_())
    twin(x())
    assert [report.outcome for report in rule.reports] == ["passed"]
    assert norm.num_batches_tracked == twin.num_batches_tracked
    assert torch.equal(norm.running_mean, twin.running_mean)
    assert torch.equal(norm.running_var, twin.running_var)


@pytest.mark.parametrize("way", WAYS)
def test_a_check_that_fails_leaves_the_statistics_alone(way):
    norm = norm_with_frozen_weights()
    before = state_of(norm)
    rule = way(norm, 2.0)
    with pytest.raises(gt.GradientMismatchError, match="not the derivative"):
        rule.gradcheck(x())
    with pytest.raises(gt.GradientMismatchError, match="not the derivative"):
        rule(x().requires_grad_())
    assert state_of(norm) == before


@pytest.mark.parametrize("calls", [1, 3, 6])
def test_an_exception_half_way_leaves_the_statistics_alone(calls):
    norm, log = norm_with_frozen_weights(), []
    before = state_of(norm)

    @gt.custom_vjp
    def normalized(x):
        out = norm(x)
        log.append(out)
        if len(log) >= calls:
            raise ZeroDivisionError("no more")
        return out

    normalized.def_bwd(lambda residuals, g: slope(residuals[0][0], g, norm))
    with pytest.raises(ZeroDivisionError, match="no more"):
        normalized.gradcheck(x())
    assert len(log) >= calls
    assert state_of(norm) == before
    assert not gt.is_checking()


def test_a_buffer_that_is_replaced_is_put_back():
    class Counter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("last", None)

        def forward(self, x):
            self.seen = self.seen + 1
            self.last = x.detach().sum()
            return 2 * x

    counter = Counter()
    buffer = counter.seen

    @gt.custom_vjp
    def double(x):
        return counter(x)

    double.def_bwd(lambda residuals, g: 2 * g)
    assert double.gradcheck(x()).outcome == "passed"
    assert counter.seen is buffer
    assert (buffer.item(), buffer._version, counter.last) == (0.0, 0, None)
    double(x().requires_grad_())
    assert counter.seen.item() == 1


def modes():
    return (
        gt.is_checking(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_anomaly_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_modes_of_torch_are_as_they_were(factor, grad, autocast, dtype):
    rule = gt.custom_vjp(torch.sin)
    rule.def_bwd(lambda residuals, g: factor * g * residuals[0][0].cos())
    failure = None
    torch.set_default_dtype(dtype)  # put back by the fixture of all tests
    with torch.set_grad_enabled(grad), torch.autocast("cpu", enabled=autocast):
        before = modes()
        try:
            rule.gradcheck(x())
        except gt.GradientMismatchError as error:
            failure = error
        assert modes() == before
    assert (failure is None) == (factor == 1.0)
    assert not gt.is_checking()


def test_inner_rules_are_not_checked_by_themselves():
    inner = gt.custom_vjp(torch.sin)
    inner.def_bwd(lambda residuals, g: 2 * g * residuals[0][0].cos())  # wrong

    @gt.custom_vjp
    def outer(x):
        return inner(x)

    outer.def_bwd(lambda residuals, g: g * residuals[0][0].cos())
    outer(x().requires_grad_())
    assert [report.outcome for report in outer.reports] == ["passed"]
    assert inner.reports == ()
    with pytest.raises(gt.GradientMismatchError, match="not the derivative"):
        inner(x().requires_grad_())


@pytest.fixture
def one_rank():
    store = distributed.HashStore()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
@pytest.mark.usefixtures("one_rank")
class TestRanks:
    @pytest.mark.parametrize("role", ["fun", "fwd", "bwd"])
    def test_a_rule_that_waits_for_other_ranks_goes_unchecked(self, role):
        calls = []

        def reduced(x, here):
            if role != here:
                return x
            calls.append(gt.is_checking())
            x = x.clone()
            distributed.all_reduce(x)
            return x

        @gt.custom_vjp
        def sine(x):
            return reduced(x.sin(), "fun")

        sine.defvjp(
            lambda x: (reduced(x.sin(), "fwd"), x),
            lambda x, g: reduced(2 * g * x.cos(), "bwd"),
        )
        arg = x().requires_grad_()
        with pytest.warns(UserWarning, match="check the rule sine.*the other ranks"):
            out = sine(arg)
        out.sum().backward()
        torch.testing.assert_close(arg.grad, 2 * x().cos())
        assert [report.outcome for report in sine.reports] == ["not checked"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sine(arg)  # said once

    def test_a_rule_without_ranks_is_checked(self):
        right, wrong = gt.custom_vjp(torch.sin), gt.custom_vjp(torch.sin)
        right.def_bwd(lambda residuals, g: g * residuals[0][0].cos())
        wrong.def_bwd(lambda residuals, g: g * residuals[0][0].sin())
        right(x().requires_grad_())
        assert [report.outcome for report in right.reports] == ["passed"]
        with pytest.raises(gt.GradientMismatchError, match="not the derivative"):
            wrong(x().requires_grad_())
