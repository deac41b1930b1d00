"""False alarms: right rules that the check of a first call would refuse.

``python -m tests.benchmarks.false_alarms [--op NAME] [--jobs 2] [--samples 2]``

First every operator of torch's own test database that autograd can derive in float64,
as a rule whose bwd is autograd itself: whatever the check says against it is false. An
operator counts as its worst sample. Then, also alone with ``--float32``, rules by hand
in float32: the ones that the mutation benchmark spoils, small, and a gallery on a
million numbers each.

The exit status is 1 on an alarm or a crash, or where more than 15 operators are not
checked.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import multiprocessing
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.utils import _pytree as pytree

import gradtools as gt

MOST_NOT_CHECKED = 15
SLOW = 2.0  # seconds, from which on an operator is named with its time
WORST_FIRST = ("crash", "ALARM", "op itself fails", "not checked", "passed", "no input")


class Result(NamedTuple):
    """What became of an operator or a rule, and why."""

    name: str
    outcome: str
    why: tuple[str, ...] = ()
    seconds: float = 0.0
    evaluations: int = 0
    note: str = ""


def is_floating(leaf: Any) -> bool:
    """Whether a value is a tensor that has derivatives."""
    return isinstance(leaf, torch.Tensor) and (
        leaf.is_floating_point() or leaf.is_complex()
    )


def rule_of(fun, fwd, bwd):
    """Return a rule that nobody has called yet."""
    rule = gt.custom_vjp(fun)
    rule.defvjp(fwd, bwd)
    return rule


def first_call(rule, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Call a rule as a user does for the first time; return outcome, reasons, reports.

    Exceptions that are not gradtools' own are the caller's.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            rule(*args, **kwargs)
        except gt.GradtoolsError as error:
            return "ALARM", _described(error), rule.reports
    reasons = _reasons(rule.reports)
    if not reasons:  # a gap that is told and stands in no report is one as well
        told = [str(warning.message) for warning in caught]
        reasons = tuple(text for text in told if "gradtools did not check" in text)
    return ("not checked" if reasons else "passed"), reasons, rule.reports


def _described(error: gt.GradtoolsError) -> tuple[str, ...]:
    places = (
        f"    {where}: expected {expected}, got {got}"
        for where, expected, got in error.violations
    )
    return f"{type(error).__name__}: {error.what}", *places


def _reasons(reports: Sequence[Any]) -> tuple[str, ...]:
    return tuple(
        f"{item.question}: {item.detail}"
        for report in reports
        for item in report.evidence
        if item.outcome == "not checked"
    )


# torch's operators, with autograd for a bwd.


def operators() -> dict[str, Any]:
    """Return the operators with a derivative in float64 on a CPU, by their names."""
    from torch.testing._internal.common_methods_invocations import op_db

    return {
        op.formatted_name: op
        for op in op_db
        if op.supports_autograd and torch.float64 in op.supported_backward_dtypes("cpu")
    }


class Case(NamedTuple):
    """A function, and the arguments on which it is called."""

    fun: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    marks: list[bool]  # which leaves of (args, kwargs) have a derivative

    def is_full(self) -> bool:
        """Whether there is a number to derive in."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        pairs = zip(leaves, self.marks, strict=True)
        return any(leaf.numel() > 0 for leaf, mark in pairs if mark)


def case_of(op: Any, sample: Any) -> Case:
    """Return an operator as torch's own gradient tests call it on a sample."""
    tree = (sample.input, *sample.args), dict(sample.kwargs)
    leaves, spec = pytree.tree_flatten(tree)
    # OpInfo knows of which tensors the operator has a derivative: not of the weights
    # of a loss, say.
    marks = [is_floating(leaf) and leaf.requires_grad for leaf in leaves]

    def fun(*args: Any, **kwargs: Any) -> Any:
        # The rest is copied: batch norm updates its statistics in place, and a rule
        # consists of pure functions.
        given = [
            leaf.clone() if isinstance(leaf, torch.Tensor) and not mark else leaf
            for leaf, mark in zip(
                pytree.tree_leaves((args, kwargs)), marks, strict=True
            )
        ]
        args, kwargs = pytree.tree_unflatten(given, spec)
        out = op.gradcheck_wrapper(op.get_op(), *args, **kwargs)
        return sample.output_process_fn_grad(out)

    fun.__name__ = fun.__qualname__ = op.formatted_name
    args, kwargs = pytree.tree_unflatten(_activated(leaves, marks), spec)
    return Case(fun, args, kwargs, marks)


def _activated(leaves: Sequence[Any], marks: Sequence[bool]) -> list[Any]:
    return [
        leaf.detach().requires_grad_() if mark else leaf
        for leaf, mark in zip(leaves, marks, strict=True)
    ]


def autograd_rule(case: Case) -> Any:
    """Return a rule whose bwd runs the function again and asks autograd."""

    def fwd(*args: Any, **kwargs: Any) -> Any:
        # An operator that draws has to draw the same in bwd.
        state = torch.get_rng_state()
        return case.fun(*args, **kwargs), (args, kwargs, state)

    def bwd(residuals: Any, g: Any) -> Any:
        args, kwargs, state = residuals
        leaves, spec = pytree.tree_flatten((args, kwargs))
        leaves = _activated(leaves, case.marks)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(state)
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            outs = case.fun(*args, **kwargs)
        args, kwargs = pytree.tree_unflatten(
            _cotangents(outs, leaves, case.marks, g), spec
        )
        return *args, kwargs

    return rule_of(case.fun, fwd, bwd)


def _cotangents(outs, leaves, marks, g):
    """Return autograd's cotangents, None for leaves that have none."""
    pairs = [
        (out, given)
        for out, given in zip(
            pytree.tree_leaves(outs), pytree.tree_leaves(g), strict=True
        )
        if is_floating(out) and out.requires_grad and given is not None
    ]
    wanted = [leaf for leaf, mark in zip(leaves, marks, strict=True) if mark]
    found: Iterator[Any] = itertools.repeat(None)
    if pairs:
        of, given = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(of, wanted, given, allow_unused=True))
    return [next(found) if mark else None for mark in marks]


def samples_of(op: Any, count: int) -> list[Case]:
    """Return the first samples with numbers to derive in, and empty ones before."""
    cases: list[Case] = []
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
        case = case_of(op, sample)
        if any(case.marks):
            cases.append(case)
            count -= case.is_full()
        if not count:
            break
    return cases


def examine_case(case: Case, name: str) -> Result:
    """Call one operator on one sample for the first time."""
    start, rule = time.perf_counter(), autograd_rule(case)
    try:
        outcome, why, reports = first_call(rule, case.args, case.kwargs)
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        outcome, why, reports = _blamed(case, error), (text,), rule.reports
    seconds = time.perf_counter() - start
    evaluations = max((report.evaluations for report in reports), default=0)
    return Result(name, outcome, why, seconds, evaluations)


def _blamed(case: Case, error: Exception) -> str:
    """Return whether the operator without a rule fails in the same way."""
    try:
        outs = case.fun(*case.args, **case.kwargs)
        _cotangents(
            outs,
            pytree.tree_leaves((case.args, case.kwargs)),
            case.marks,
            pytree.tree_map_only(torch.Tensor, torch.ones_like, outs),
        )
    except type(error):
        return "op itself fails"
    except Exception:
        return "crash"
    return "crash"


def examine(unit: tuple[str, int]) -> Result:
    """Call one operator on some samples; the worst of them is its result."""
    name, count = unit
    start = time.perf_counter()
    try:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cases = samples_of(OPERATORS[name], count)
            results = [examine_case(case, name) for case in cases]
    except Exception as error:  # of the samples
        results = [Result(name, "op itself fails", (repr(error)[:200],))]
    seconds = time.perf_counter() - start
    if seconds > SLOW:
        print(f"slow: {name} {seconds:.1f} s", flush=True)
    return _worst(name, results, seconds)


def _worst(name: str, results: Sequence[Result], seconds: float) -> Result:
    if not results:
        return Result(name, "no input", ("no sample has a derivative",), seconds)
    worst = min(results, key=lambda result: WORST_FIRST.index(result.outcome))
    evaluations = max(result.evaluations for result in results)
    return worst._replace(seconds=seconds, evaluations=evaluations)


OPERATORS: dict[str, Any] = {}


def _start_worker() -> None:
    torch.set_num_threads(1)
    OPERATORS.update(operators())


def examine_all(names: Sequence[str], count: int, jobs: int) -> list[Result]:
    """Examine operators, in processes of their own where there is more than one."""
    units = [(name, count) for name in names]
    if jobs <= 1 or len(units) == 1:
        return list(map(examine, units))
    # An executor, not a pool: where an operator kills the process, it says so.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _start_worker) as pool:
        return list(pool.map(examine, units, chunksize=8))


# Rules by hand.


class Entry(NamedTuple):
    """A function with its derivative by hand, and arguments of about a given size."""

    fun: Callable[..., Any]
    fwd: Callable[..., Any]
    bwd: Callable[..., Any]
    args: Callable[[int], tuple[Any, ...]]

    def active(self, size: int) -> tuple[Any, ...]:
        """Return arguments that require a gradient."""
        return activated(self.args(size))


def activated(args: Any) -> Any:
    """Return arguments whose tensors require a gradient where they can."""
    return pytree.tree_map(
        lambda x: x.detach().requires_grad_() if is_floating(x) else x, args
    )


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return normal numbers in float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def square(size: int) -> torch.Tensor:
    """Return a matrix of about ``size`` normal numbers."""
    side = round(size**0.5)
    return normal(side, side)


def indices(like: torch.Tensor, high: int) -> torch.Tensor:
    """Return random indices in the shape of a tensor."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(high, like.shape, generator=generator)


GALLERY: dict[str, Entry] = {}


def _enter(name, fun, fwd, bwd, args):
    GALLERY[name] = Entry(fun, fwd, bwd, args)


def _enter_elementwise(name, function, derivative, prepare=lambda x: x):
    """Enter a function of one tensor that saves its input."""

    def fun(x):
        return function(x)

    fun.__name__ = fun.__qualname__ = name
    _enter(
        name,
        fun,
        lambda x: (function(x), x),
        lambda x, g: g * derivative(x),
        lambda size: (prepare(normal(size)),),
    )


def swish(x, beta):
    return x * torch.sigmoid(beta * x)


def swish_fwd(x, beta):
    s = torch.sigmoid(beta * x)
    return x * s, (x, beta, s)


def swish_bwd(residuals, g):
    x, beta, s = residuals
    ds = s * (1 - s)
    return g * (s + x * beta * ds), (g * x * x * ds).sum()


_enter(
    "swish",
    swish,
    swish_fwd,
    swish_bwd,
    lambda size: (normal(size), torch.tensor(1.5)),
)


def gelu_derivative(x):
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density


def mish_derivative(x):
    t = torch.tanh(functional.softplus(x))
    return t + x * (1 - t * t) * torch.sigmoid(x)


SELU_SCALE, SELU_ALPHA = 1.0507009873554804934193349852946, 1.67326324235437728

_enter_elementwise("gelu", functional.gelu, gelu_derivative)
_enter_elementwise("mish", functional.mish, mish_derivative)
_enter_elementwise("softplus", functional.softplus, torch.sigmoid)
_enter_elementwise("elu", functional.elu, lambda x: torch.where(x > 0, 1.0, x.exp()))
_enter_elementwise(
    "selu",
    functional.selu,
    lambda x: SELU_SCALE * torch.where(x > 0, 1.0, SELU_ALPHA * x.exp()),
)
# With numbers right on the kinks, as layers before them leave there.
_enter_elementwise("relu", torch.relu, lambda x: (x > 0).to(x.dtype), torch.relu)
_enter_elementwise("abs", torch.abs, torch.sign, torch.relu)
_enter_elementwise(
    "clamp",
    lambda x: x.clamp(-1, 1),
    lambda x: ((x >= -1) & (x <= 1)).to(x.dtype),
    lambda x: x.clamp(-1, 1),
)
_enter_elementwise(
    "log1pexp",
    lambda x: torch.log1p(torch.exp(x)),
    lambda x: 1 - 1 / (1 + torch.exp(x)),
)


def tanh(x):
    return torch.tanh(x)


def tanh_fwd(x):
    y = torch.tanh(x)
    return y, y


_enter(
    "tanh",
    tanh,
    tanh_fwd,
    lambda y, g: g * (1 - y * y),
    lambda size: (normal(size),),
)


def linear_bwd(residuals, g):
    x, weight = residuals
    return g @ weight, g.T @ x, g.sum(0)


def _linear_args(size):
    x = square(size)
    width = min(64, len(x))
    return x, normal(width, len(x), seed=1), normal(width, seed=2)


_enter(
    "linear",
    lambda x, weight, bias: x @ weight.T + bias,
    lambda x, weight, bias: (x @ weight.T + bias, (x, weight)),
    linear_bwd,
    _linear_args,
)


def layer_norm(x, weight, bias):
    return functional.layer_norm(x, x.shape[-1:], weight, bias)


def layer_norm_fwd(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + 1e-5)
    xhat = centred * rstd
    return xhat * weight + bias, (xhat, rstd, weight)


def layer_norm_bwd(residuals, g):
    xhat, rstd, weight = residuals
    gw = g * weight
    mean, along = gw.mean(-1, keepdim=True), (gw * xhat).mean(-1, keepdim=True)
    return rstd * (gw - mean - xhat * along), (g * xhat).sum(0), g.sum(0)


def _layer_norm_args(size):
    x = square(size)
    return x, 1 + 0.1 * normal(len(x), seed=1), 0.1 * normal(len(x), seed=2)


_enter("layer_norm", layer_norm, layer_norm_fwd, layer_norm_bwd, _layer_norm_args)


def rms_norm_fwd(x, weight):
    rrms = torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)
    return x * rrms * weight, (x, rrms, weight)


def rms_norm_bwd(residuals, g):
    x, rrms, weight = residuals
    xhat, gw = x * rrms, g * weight
    return rrms * (gw - xhat * (gw * xhat).mean(-1, keepdim=True)), (g * xhat).sum(0)


_enter(
    "rms_norm",
    lambda x, weight: functional.rms_norm(x, x.shape[-1:], weight, 1e-6),
    rms_norm_fwd,
    rms_norm_bwd,
    lambda size: _layer_norm_args(size)[:2],
)


def cross_entropy(logits, target):
    return functional.cross_entropy(logits, target)


def cross_entropy_fwd(logits, target):
    log_p = torch.log_softmax(logits, 1)
    return -log_p.gather(1, target[:, None]).mean(), (log_p.exp(), target)


def cross_entropy_bwd(residuals, g):
    p, target = residuals
    one_hot = torch.zeros_like(p).scatter(1, target[:, None], 1.0)
    return g * (p - one_hot) / len(p), None


def _cross_entropy_args(size):
    classes = min(100, round(size**0.5))
    logits = normal(size // classes, classes)
    return logits, indices(logits[:, 0], classes)


_enter(
    "cross_entropy",
    cross_entropy,
    cross_entropy_fwd,
    cross_entropy_bwd,
    _cross_entropy_args,
)


def logsumexp_fwd(x):
    out = torch.logsumexp(x, 1)
    return out, (x, out)


def logsumexp_bwd(residuals, g):
    x, out = residuals
    return g[:, None] * torch.exp(x - out[:, None])


_enter(
    "logsumexp",
    lambda x: torch.logsumexp(x, 1),
    logsumexp_fwd,
    logsumexp_bwd,
    lambda size: (square(size),),
)
_enter(
    "cumsum",
    lambda x: x.cumsum(1),
    lambda x: (x.cumsum(1), None),
    lambda _, g: g.flip(1).cumsum(1).flip(1),
    lambda size: (square(size),),
)


def gather_bwd(residuals, g):
    shape, index = residuals
    return g.new_zeros(shape).scatter_add(1, index, g), None


def _gather_args(size):
    x = square(size)
    return x, indices(x, len(x))


_enter(
    "gather",
    lambda x, index: x.gather(1, index),
    lambda x, index: (x.gather(1, index), (x.shape, index)),
    gather_bwd,
    _gather_args,
)
_enter(
    "scatter_add",
    lambda x, index, source: x.scatter_add(1, index, source),
    lambda x, index, source: (x.scatter_add(1, index, source), index),
    lambda index, g: (g, None, g.gather(1, index)),
    lambda size: (*_gather_args(size), normal(*square(size).shape, seed=2)),
)
_enter(
    "broadcast multiply",
    lambda x, row: x * row,
    lambda x, row: (x * row, (x, row)),
    lambda kept, g: (g * kept[1], (g * kept[0]).sum(0)),
    lambda size: (square(size), normal(len(square(size)), seed=1)),
)
_enter(
    "sum",
    lambda x: x.sum(),
    lambda x: (x.sum(), x.shape),
    lambda shape, g: g.expand(shape),
    lambda size: (square(size),),
)
_enter(
    "mean",
    lambda x: x.mean(),
    lambda x: (x.mean(), x.shape),
    lambda shape, g: (g / shape.numel()).expand(shape),
    lambda size: (square(size),),
)


def sort_fwd(x):
    values, index = x.sort(1)
    return values, index


_enter(
    "sort",
    lambda x: x.sort(1).values,
    sort_fwd,
    lambda index, g: torch.zeros_like(g).scatter(1, index, g),
    lambda size: (square(size),),
)


def max_fwd(x):
    values, index = x.max(1)
    return values, (x.shape, index)


def max_bwd(residuals, g):
    shape, index = residuals
    return g.new_zeros(shape).scatter(1, index[:, None], g[:, None])


_enter("max", lambda x: x.max(1).values, max_fwd, max_bwd, lambda size: (square(size),))


def normalize_fwd(x):
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / norm, (x / norm, norm)


def normalize_bwd(residuals, g):
    y, norm = residuals
    return (g - y * (g * y).sum(1, keepdim=True)) / norm


_enter(
    "normalize",
    lambda x: functional.normalize(x, dim=1),
    normalize_fwd,
    normalize_bwd,
    lambda size: (square(size),),
)


def seconds_by_hand(fwd, bwd, args, times: int = 5) -> float:
    """Return the median time of fwd and bwd, called directly, without gradients."""
    measured = []
    with torch.no_grad():
        for _ in range(times):
            start = time.perf_counter()
            out, residuals = fwd(*args)
            bwd(residuals, pytree.tree_map_only(torch.Tensor, torch.ones_like, out))
            measured.append(time.perf_counter() - start)
    return statistics.median(measured)


def examine_by_hand(name: str, fun, fwd, bwd, args) -> Result:
    """Call a rule by hand for the first time."""
    rule = rule_of(fun, fwd, bwd)
    try:
        outcome, why, reports = first_call(rule, activated(args), {})
    except Exception as error:
        return Result(name, "crash", (repr(error)[:300],))
    note = ""
    with contextlib.suppress(Exception):  # a wrong one may not run at all
        note = f"{seconds_by_hand(fwd, bwd, args) * 1e3:9.2f} ms"
    return Result(
        name,
        outcome,
        why,
        sum(report.seconds for report in reports),
        sum(report.evaluations for report in reports),
        note,
    )


def small_rules() -> list[Result]:
    """Examine the right rules of the mutation benchmark, in float32."""
    try:
        from tests.benchmarks.right_rules import RULES
    except ImportError:
        return []
    return [
        examine_by_hand(r.name, r.fun, r.fwd, r.bwd, r.args(torch.float32, 0))
        for r in RULES.values()
    ]


def large_rules(size: int = 10**6) -> list[Result]:
    """Examine the gallery, in float32 on a million numbers."""
    return [
        examine_by_hand(name, entry.fun, entry.fwd, entry.bwd, entry.args(size))
        for name, entry in GALLERY.items()
    ]


# What is printed.


def print_counts(results: Sequence[Result]) -> None:
    """Print how many have which outcome, and the reasons of those that not passed."""
    outcomes = Counter(result.outcome for result in results)
    print(", ".join(f"{outcomes[o]} {o}" for o in WORST_FIRST if outcomes[o]))
    for outcome in WORST_FIRST:
        listed = [r for r in results if r.outcome == outcome]
        if outcome != "passed" and listed:
            print(f"\n-- {outcome}: {len(listed)}")
            for result in listed:
                print(f"{result.name}: " + "\n".join(dict.fromkeys(result.why)))


def print_operators(results: Sequence[Result], seconds: float) -> None:
    """Print the first part."""
    print_counts(results)
    slowest = max(results, key=lambda result: result.seconds)
    most = max(results, key=lambda result: result.evaluations)
    middle = statistics.median(result.seconds for result in results)
    print(f"\n{seconds:.0f} s in all; an operator takes {middle * 1e3:.0f} ms (median)")
    print(f"slowest: {slowest.name}, {slowest.seconds:.1f} s")
    print(f"most evaluations: {most.name}, {most.evaluations} on one sample\n")


def print_by_hand(title: str, results: Sequence[Result]) -> None:
    """Print a table of rules by hand."""
    print(f"\n{title}")
    print(f"{'rule':<24}{'outcome':<13}{'check':>9}{'evaluations':>13}{'fwd+bwd':>14}")
    for r in results:
        print(
            f"{r.name:<24}{r.outcome:<13}{r.seconds:8.3f}s{r.evaluations:>13}{r.note:>14}"
        )
    print_counts(results)


def is_bad(results: Sequence[Result]) -> bool:
    """Whether an alarm or a crash is among the results."""
    return any(result.outcome in {"ALARM", "crash"} for result in results)


def run_operators(names: Sequence[str], options: argparse.Namespace) -> bool:
    """Run and print the first part; return whether it went badly."""
    start = time.perf_counter()
    results = examine_all(names, options.samples, options.jobs)
    print_operators(results, time.perf_counter() - start)
    unchecked = sum(result.outcome == "not checked" for result in results)
    return is_bad(results) or unchecked > MOST_NOT_CHECKED


def run_by_hand() -> bool:
    """Run and print the second part; return whether it went badly."""
    small, large = small_rules(), large_rules()
    print_by_hand("right rules, float32", small)
    print_by_hand("gallery, float32, a million numbers", large)
    return is_bad([*small, *large])


def main() -> int:
    """Run the benchmark as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--op", metavar="NAME", help="only this operator")
    parser.add_argument("--float32", action="store_true", help="only the second part")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=2, metavar="K")
    options = parser.parse_args()
    _start_worker()
    is_wrong = False
    if not options.float32:
        names = [
            name
            for name, op in OPERATORS.items()
            if options.op in (None, name, op.name)
        ]
        if not names:
            parser.error(f"no operator {options.op}")
        print(f"torch {torch.__version__}: {len(names)} operators")
        is_wrong = run_operators(names, options)
    if options.op is None:
        is_wrong = run_by_hand() or is_wrong
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
