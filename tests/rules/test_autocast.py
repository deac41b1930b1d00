"""bwd runs under the autocast state of fwd; autocast= casts what comes in."""

import pytest
import torch
from torch.testing import assert_close

import gradtools as gt
from tests.rules.stating import stated

pytestmark = pytest.mark.usefixtures("unchecked")

DEVICE = torch.empty(()).device.type
LOW, FULL = torch.bfloat16, torch.float32


@pytest.fixture
def x():
    return torch.randn(2, 3, dtype=FULL, requires_grad=True)


@pytest.fixture
def w():
    return torch.randn(3, 4, dtype=FULL, requires_grad=True)


def under_autocast(dtype=LOW, **options):
    return torch.autocast(DEVICE, dtype, **options)


def product(seen, **options):
    """Return a matrix product that notes the state and dtypes of fwd and bwd."""

    def note(role, *tensors):
        on = torch.is_autocast_enabled(DEVICE)
        seen[role] = (on, *(tensor.dtype for tensor in tensors))

    def fwd(x, w):
        y = x @ w
        note("fwd", x, y)
        return y, (x, w)

    def bwd(residuals, g):
        x, w = residuals
        gx, gw = g @ w.T, x.T @ g
        note("bwd", g, gx)
        return 10 * gx, 10 * gw

    return stated(torch.matmul, fwd, bwd, **options)


def reference(x, w):
    with under_autocast():
        return torch.autograd.grad((x @ w).float().square().sum(), (x, w))


@pytest.mark.parametrize("inside", [True, False])
def test_bwd_runs_under_the_state_of_fwd_and_its_result_is_cast_back(x, w, inside):
    seen = {}
    with under_autocast():
        loss = product(seen)(x, w).float().square().sum()
    with under_autocast(enabled=inside):
        actual = torch.autograd.grad(loss, (x, w))
    assert seen == {"fwd": (True, FULL, LOW), "bwd": (True, LOW, LOW)}
    assert_close(actual, tuple(10 * g for g in reference(x, w)), rtol=0.05, atol=0.5)


def test_bwd_runs_without_autocast_where_fwd_did(x, w):
    seen = {}
    out = product(seen)(x, w).sum()
    with under_autocast():
        actual = torch.autograd.grad(out, (x, w))
    assert seen == {"fwd": (False, FULL, FULL), "bwd": (False, FULL, FULL)}
    expected = torch.autograd.grad((x @ w).sum(), (x, w))
    assert_close(actual, tuple(10 * g for g in expected))


def test_it_is_restored_for_a_device_that_was_off_inside_a_region_that_is_on(x, w):
    seen = {}
    with under_autocast():
        with under_autocast(enabled=False):
            out = product(seen)(x, w).sum()
        torch.autograd.grad(out, (x, w))
    assert seen["bwd"] == (False, FULL, FULL)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_under_torch_func(x, w, transform):
    seen = {}
    rule = product(seen)
    with under_autocast():
        actual = transform(lambda x: rule(x, w.detach()).float().square().sum())(
            x.detach()
        )
    assert seen["bwd"] == (True, LOW, LOW)
    assert_close(actual, 10 * reference(x, w)[0], rtol=0.05, atol=0.5)


def test_forward_mode_is_derived_at_the_precision_of_autocast(x, w):
    rule = product({})
    x, w = x.detach(), w.detach()
    with under_autocast():
        out, tangent = torch.func.jvp(lambda x: rule(x, w), (x,), (x,))
    assert out.dtype == tangent.dtype == LOW
    assert_close(tangent.float(), 10 * (x @ w), rtol=0.05, atol=0.5)


def test_a_wrong_dtype_is_an_error_where_there_is_no_autocast(x):
    rule = stated(torch.sin, lambda x: (x.sin(), x), lambda x, g: g.to(LOW))
    with pytest.raises(gt.BackwardContractError, match=r"float32.*\n.*bfloat16"):
        rule(x).sum().backward()
    with under_autocast():
        out = rule(x).sum()
    assert_close(torch.autograd.grad(out, x)[0], torch.ones_like(x))


def test_autocast_casts_no_integer_and_no_complex_cotangent(x):
    rule = stated(torch.sin, lambda x: (x.sin(), x), lambda x, g: g.int())
    with under_autocast():
        out = rule(x).sum()
    with pytest.raises(gt.BackwardContractError, match="int32"):
        out.backward()


# autocast=


@pytest.mark.parametrize("dtype", [FULL, LOW, torch.float16])
def test_the_option_casts_the_inputs_and_switches_autocast_off(x, w, dtype):
    seen = {}
    with under_autocast():
        out = product(seen, autocast=dtype)(x, w)
        actual = torch.autograd.grad(out.float().square().sum(), (x, w))
    assert seen == {"fwd": (False, dtype, dtype), "bwd": (False, dtype, dtype)}
    assert [g.dtype for g in actual] == [FULL, FULL]
    assert_close(actual, tuple(10 * g for g in reference(x, w)), rtol=0.05, atol=0.5)


def test_it_is_what_torchs_custom_fwd_does(x, w):
    class Native(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type=DEVICE, cast_inputs=LOW)
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        @torch.amp.custom_bwd(device_type=DEVICE)
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return 10 * (g @ w.T), 10 * (x.T @ g)

    results = []
    for function in (Native.apply, product({}, autocast=LOW)):
        with under_autocast():
            out = function(x, w)
        results.append((out, *torch.autograd.grad(out.float().sum(), (x, w))))
    assert_close(results[1], results[0], rtol=0, atol=0)


def test_the_option_does_nothing_without_autocast_nor_to_other_dtypes(x, w):
    seen = {}
    rule = product(seen, autocast=LOW)
    assert rule(x, w).dtype == FULL
    with under_autocast():
        assert rule(x.double(), w.double()).dtype == torch.float64
        indices = stated(lambda i, x: x[i], bwd=lambda r, g: {}, autocast=LOW)
        assert indices(torch.tensor([1]), x).dtype == LOW


def test_the_option_holds_for_the_function_where_no_gradient_is_wanted(x, w):
    seen = {}
    rule = product(seen, autocast=torch.float16)
    with under_autocast(), torch.no_grad():
        assert rule(x, w).dtype == torch.float16
    assert seen == {}
