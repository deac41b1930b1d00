"""What is checked when: every use of a rule brings its own questions, once."""

import threading

import pytest
import torch
from torch.func import grad, hessian, jacrev, jvp, vmap

import gradtools as gt

WRONG = gt.GradientMismatchError


def x(count=3):
    return torch.linspace(0.1, 1.0, count)


def sine(factor=1.0, **options):
    rule = gt.custom_vjp(torch.sin, **options)
    rule.def_bwd(lambda residuals, g: factor * g * residuals[0][0].cos())
    return rule


def asked(rule):
    """The uses that a rule was checked for."""
    return {e.capability for report in rule.reports for e in report.evidence}


def evaluations(rule):
    return sum(report.evaluations for report in rule.reports)


def backward(f):
    f(x().requires_grad_()).sum().backward()


def forward(f):
    return jvp(f, (x(),), (torch.ones(3),))


def twice(f):
    arg = x().requires_grad_()
    (first,) = torch.autograd.grad(f(arg).sum(), arg, create_graph=True)
    return torch.autograd.grad(first.sum(), arg)


def scalar(f):
    return lambda x: f(x).sum()


USES = {
    "backward": (backward, {"reverse"}),
    "grad": (lambda f: grad(scalar(f))(x()), {"reverse"}),
    "jacrev": (lambda f: jacrev(f)(x()), {"reverse"}),
    "vmap of grad": (lambda f: vmap(grad(f))(x()), {"reverse", "vmap"}),
    "jvp": (forward, {"reverse", "forward mode"}),
    "double backward": (twice, {"reverse", "second order"}),
    "grad of grad": (
        lambda f: vmap(grad(grad(f)))(x()),
        {"reverse", "second order", "vmap"},
    ),
}


@pytest.mark.parametrize("use", USES)
def test_a_use_brings_its_own_questions_once(use):
    run, expected = USES[use]
    rule = sine()
    run(rule)
    assert asked(rule) == expected
    assert all(report.outcome == "passed" for report in rule.reports)
    count = evaluations(rule)
    run(rule)
    assert evaluations(rule) == count


def test_a_hessian_asks_for_second_order():
    rule = sine()
    hessian(scalar(rule))(x())
    assert asked(rule) >= {"reverse", "second order"}


def test_later_uses_add_to_the_report():
    rule = sine()
    for run, use in [(backward, "reverse"), (forward, "forward mode"), (twice, None)]:
        run(rule)
        assert len(rule.reports) == 1
        assert asked(rule) >= ({use} if use else {"second order"})
    assert asked(rule) == {"reverse", "forward mode", "second order"}


@pytest.mark.parametrize("use", ["jvp", "double backward", "grad of grad"])
def test_policy_off_checks_no_use(use):
    rule = sine(2.0)
    with gt.gradcheck_policy("off"):
        USES[use][0](rule)
    assert [report.outcome for report in rule.reports] == ["not checked"]
    assert evaluations(rule) == 0


# Forward mode.


def with_jvp(factor, log=None):
    rule = sine()
    if log is not None:
        rule.def_bwd(lambda r, g: log.append(0) or g * r[0][0].cos())

    @rule.def_jvp
    def _(primals, tangents):
        return primals[0].sin(), factor * tangents[0] * primals[0].cos()

    return rule


def test_a_wrong_jvp_rule_is_found_at_the_first_jvp_and_again():
    rule = with_jvp(1.5)
    backward(rule)
    assert asked(rule) == {"reverse"}
    errors = []
    for _ in range(2):
        with pytest.raises(WRONG, match="the tangent that the jvp rule") as caught:
            forward(rule)
        errors.append(caught.value)
    assert errors[0] is not errors[1]
    assert [error.kind for error in errors] == ["tangent"] * 2
    assert [report.outcome for report in rule.reports] == ["failed"]
    backward(rule)


def test_a_right_jvp_rule_passes():
    rule = with_jvp(1.0)
    _, tangent = forward(rule)
    torch.testing.assert_close(tangent, x().cos())
    assert asked(rule) == {"forward mode"}
    backward(rule)
    assert asked(rule) == {"forward mode", "reverse"}
    assert [report.outcome for report in rule.reports] == ["passed"]


def test_bwd_does_not_run_where_only_the_jvp_rule_is_used():
    log = []
    rule = with_jvp(1.0, log)
    forward(rule)
    assert log == []
    backward(rule)
    assert log


@pytest.mark.parametrize("run", [backward, forward])
def test_a_custom_jvp_is_checked_in_either_mode(run):
    def made(factor):
        rule = gt.custom_jvp(torch.sin)
        rule.defjvp(lambda p, t: (p[0].sin(), factor * t[0] * p[0].cos()))
        return rule

    right = made(1.0)
    run(right)
    assert asked(right) == {"reverse" if run is backward else "forward mode"}
    with pytest.raises(WRONG, match="not the derivative"):
        run(made(2.0))


# Second order.


@pytest.mark.parametrize(
    "use",
    [twice, lambda f: hessian(scalar(f))(x()), lambda f: vmap(grad(grad(f)))(x())],
)
def test_a_wrong_second_derivative_is_found_when_it_is_asked_for(use):
    rule = gt.custom_vjp(lambda x: x**3 / 3)
    rule.defvjp(lambda x: (x**3 / 3, x), lambda x, g: g * x * x.detach())
    backward(rule)
    grad(scalar(rule))(x())
    vmap(grad(rule))(x())
    assert "second order" not in asked(rule)
    with pytest.raises(WRONG, match="the second derivative in") as caught:
        use(rule)
    assert caught.value.kind == "second derivative"


def test_second_order_works_where_only_the_output_is_kept():
    rule = gt.custom_vjp(torch.exp)
    rule.defvjp(lambda x: (x.exp(),) * 2, lambda out, g: g * out)
    (second,) = twice(rule)
    torch.testing.assert_close(second, x().exp())
    assert asked(rule) == {"reverse", "second order"}
    assert [report.outcome for report in rule.reports] == ["passed"]


# Batches.


def mixing():
    """Right for one element; over a leading batch dimension it mixes them."""

    def bwd(residuals, cotangents):
        ((x, w), _) = residuals
        g = cotangents
        return (g * w).sum(0).expand(g.shape) if g.ndim > 1 else g * w, g * x

    rule = gt.custom_vjp(lambda x, w: x * w, vmap="broadcast_all")
    rule.def_bwd(bwd)
    return rule


@pytest.mark.parametrize("in_dims", [(0, None), (0, 0), (None, 0)])
def test_a_bwd_that_mixes_the_batch_is_found_at_the_first_batch(in_dims):
    rule, args = mixing(), [x(), x() + 1]
    rule(*(arg.requires_grad_() for arg in args)).sum().backward()
    assert asked(rule) == {"reverse"}
    batch = [
        torch.stack([a.detach()] * 4) if d == 0 else a.detach()
        for a, d in zip(args, in_dims, strict=True)
    ]
    total = grad(lambda x, w: rule(x, w).sum(), argnums=(0, 1))
    for _ in range(2):
        with pytest.raises(WRONG, match="it mixes the batch") as caught:
            vmap(total, in_dims)(*batch)
        assert caught.value.kind == "batch"


def test_each_pattern_of_batched_arguments_is_checked():
    rule = gt.custom_vjp(lambda x, w: x * w)
    rule.def_bwd(lambda residuals, g: (g * residuals[0][1], g * residuals[0][0]))
    total, batch = grad(lambda x, w: rule(x, w).sum(), (0, 1)), torch.rand(4, 3)

    def batches():
        return [
            e.question
            for report in rule.reports
            for e in report.evidence
            if e.capability == "vmap"
        ]

    vmap(total, (0, None))(batch, x())
    assert batches() == ["vmap over x (dim 0)"]
    vmap(total)(batch, batch)
    vmap(total)(batch, batch)
    assert batches() == ["vmap over x (dim 0)", "vmap over x (dim 0), w (dim 0)"]
    vmap(vmap(total, (0, None)))(torch.rand(2, 4, 3), torch.rand(2, 3))
    assert len(batches()) == 3
    assert " and over " in batches()[2]
    assert all(report.outcome == "passed" for report in rule.reports)


@pytest.mark.parametrize("mode", ["auto", "sequential", "expand_dims"])
@pytest.mark.parametrize("policy", ["first", "off"])
def test_an_output_without_a_batch_has_the_gradient_of_torch(mode, policy):
    def both(x, w):
        return x * w, w**2

    def bwd(residuals, cotangents):
        ((x, w), _), (g, h) = residuals, cotangents
        return g * w, g * x + 2 * h * w

    rule = gt.custom_vjp(both, vmap=mode)
    rule.def_bwd(bwd)

    def total(f):
        return lambda x, w: sum(out.sum() for out in vmap(f, (0, None))(x, w))

    batch = torch.rand(4, 3)
    with gt.gradcheck_policy(policy):
        got = grad(total(rule), (0, 1))(batch, x())
    torch.testing.assert_close(got, grad(total(both), (0, 1))(batch, x()))


# How often.


@pytest.mark.parametrize("use", ["backward", "jvp", "double backward"])
def test_policy_always_finds_what_is_wrong_every_time(use):
    right, wrong = sine(), sine(2.0)
    with gt.gradcheck_policy("always"):
        USES[use][0](right)
        count = evaluations(right)
        USES[use][0](right)
        for _ in range(2):
            with pytest.raises(WRONG, match="not the derivative"):
                USES[use][0](wrong)
    assert evaluations(right) > count > 0


def test_more_signatures_than_are_checked_are_named_once():
    checked = []

    def fun(x, k):
        if gt.is_checking():
            checked.append(k)
        return x * k

    def run():
        for k in range(20):
            rule(x().requires_grad_(), k)

    rule = gt.custom_vjp(fun)
    rule.def_bwd(lambda residuals, g: (g * residuals[0][1], None))
    with pytest.warns(UserWarning, match="rule fun .*more than 16 signatures") as said:
        run()
    assert len(said) == 1
    assert set(checked) == set(range(16))
    count = len(checked)
    run()  # a warning would be an error
    assert len(checked) == count
    assert rule.gradcheck(x(), 19).outcome == "passed"


def test_threads_share_one_check():
    def run(threads):
        calls, errors = [], []

        def fun(x):
            calls.append(gt.is_checking())
            return torch.sin(x)

        rule = gt.custom_vjp(fun)
        rule.def_bwd(lambda residuals, g: g * residuals[0][0].cos())
        ready = threading.Barrier(threads)

        def work():
            try:
                ready.wait()
                backward(rule)
            except BaseException as error:
                errors.append(error)

        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert errors == []
        assert [report.outcome for report in rule.reports] == ["passed"]
        return calls.count(True)

    assert run(8) == run(1) > 0


def test_the_full_check_of_an_opaque_bwd_finds_no_forward_mode_and_no_mistake():
    rule = gt.custom_vjp(torch.sin, once_differentiable=True)
    rule.def_fwd(lambda x: (x.sin(), x))
    rule.def_bwd(lambda x, g: g.detach() * x.cos())
    found = {item.question: item for item in rule.gradcheck(torch.ones(4)).evidence}
    assert found["tangent of the output"].outcome == "not given"
    assert "opaque" in found["tangent of the output"].detail
