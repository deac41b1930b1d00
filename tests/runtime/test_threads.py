"""Eight threads at once, on one rule, from its first call on (reverse mode)."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

import gradtools as gt
from tests.runtime.rules import native, swish

THREADS = 8


def at_once(work):
    """Run ``work(number)`` in all threads, which start together."""
    barrier = threading.Barrier(THREADS)

    def start(number):
        barrier.wait(timeout=30)
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(start, range(THREADS)))


def fresh():
    """Return a swish that no call has checked yet."""
    rule = gt.custom_vjp(native)
    rule.defvjp(swish.rule.fwd, swish.rule.bwd)
    return rule


def gradient_of(f, number):
    found = []
    for size in (3, 5, 1):
        x = torch.linspace(-1, 1 + number, size, dtype=torch.float64)
        x.requires_grad_()
        beta = torch.tensor(1.0 + number, dtype=torch.float64, requires_grad=True)
        first = torch.autograd.grad(f(x, beta).sum(), (x, beta), create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), (x, beta))
        found += [*first, *second]
    return found


def test_reverse_mode_of_two_orders():
    rule = fresh()
    for number, found in enumerate(at_once(lambda n: gradient_of(rule, n))):
        torch.testing.assert_close(found, gradient_of(native, number))
    assert len(rule.reports) == 2  # of the sizes 3 and 5, and of size 1: once each
    assert {report.outcome for report in rule.reports} == {"passed"}


def test_one_thread_checks_for_all():
    def probed(run):
        calls = []

        def counted(x, beta):
            calls.append(gt.is_checking())
            return native(x, beta)

        rule = gt.custom_vjp(counted)
        rule.defvjp(swish.rule.fwd, swish.rule.bwd)
        run(lambda _: gradient_of(rule, 0))
        return sum(calls)

    assert probed(at_once) == probed(lambda work: work(0)) > 0


def test_torch_func_grad():
    rule = fresh()

    def work(number, f=rule):
        x = torch.linspace(-1, 1 + number, 4, dtype=torch.float64)
        beta = torch.tensor(1.0 + number, dtype=torch.float64)
        per_sample = torch.func.vmap(torch.func.grad(f, (0, 1)), (0, None))
        return per_sample(x, beta)

    for number, found in enumerate(at_once(work)):
        torch.testing.assert_close(found, work(number, native))


def test_a_wrong_rule_fails_in_every_thread():
    rule = fresh()
    rule.def_bwd(lambda residuals, g: (g, None))

    def work(number):
        try:
            gradient_of(rule, number)
        except gt.GradientMismatchError as error:
            return error
        return None

    errors = at_once(work)
    assert all(isinstance(error, gt.GradientMismatchError) for error in errors)


def test_backward_on_another_thread_than_forward():
    x = torch.linspace(-1, 1, 5, requires_grad=True)
    out = fresh()(x, torch.tensor(2.0)).sum()
    thread = threading.Thread(target=out.backward)
    thread.start()
    thread.join()
    expected = torch.autograd.grad(native(x, torch.tensor(2.0)).sum(), x)
    torch.testing.assert_close((x.grad,), expected)
