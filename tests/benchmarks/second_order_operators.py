"""Second derivatives: which operators of torch get them wrong and do not say so.

``python -m tests.benchmarks.second_order_operators [--jobs N] [--only NAME]``

Every operator of torch's own test database, on some small samples in float64, under a
scalar function that mixes everything. Its Hessian times a direction in three
spellings, against differences of its gradient: reverse over reverse (autograd twice),
forward over reverse and reverse over forward (torch.func). The first derivatives as
well, against differences of the function.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import signal
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch.utils import _pytree as pytree

from tests.benchmarks import false_alarms
from tests.benchmarks.false_alarms import Case

LARGEST = 20_000  # numbers in a sample
STEPS = (1e-3, 1e-4, 1e-5)  # the first at which the differences converge counts
TOLERANCE = 3e-6  # relative, of the differences and of what is compared with them
SECONDS = 120  # for an operator
SAMPLES = 6  # of an operator

Tensors = Sequence[torch.Tensor]


class Finding(NamedTuple):
    """What one spelling gives on one sample, or why the sample says nothing."""

    spelling: str
    outcome: str
    why: str = ""
    error: float = 0.0


def inputs_of(case: Case) -> tuple[torch.Tensor, ...]:
    """Return the tensors in which a case has derivatives."""
    leaves = pytree.tree_leaves((case.args, case.kwargs))
    return tuple(x.detach() for x in itertools.compress(leaves, case.marks))


def scalar_of(case: Case) -> Callable[..., torch.Tensor]:
    """Return a scalar function of these tensors that depends on all that comes out."""
    leaves, spec = pytree.tree_flatten((case.args, case.kwargs))
    pairs = list(zip(leaves, case.marks, strict=True))

    def outputs(xs: Tensors) -> list[torch.Tensor]:
        torch.default_generator.manual_seed(0)  # an operator may draw
        given = iter(xs)
        filled = [next(given) if mark else leaf for leaf, mark in pairs]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        leaves_out = pytree.tree_leaves(case.fun(*args, **kwargs))
        outs = filter(false_alarms.is_floating, leaves_out)
        dense = (x if x.layout == torch.strided else x.to_dense() for x in outs)
        return [
            torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in dense
        ]

    outs = outputs([x.clone().requires_grad_() for x in inputs_of(case)])
    derived = [out.requires_grad for out in outs]
    weights = [torch.randn(out.shape, dtype=torch.float64) for out in outs]
    # A sine that turns many times has derivatives that no difference finds.
    scales = [max([1.0, *out.detach().abs().flatten().tolist()]) for out in outs]

    def phi(*xs: torch.Tensor) -> torch.Tensor:
        terms = (
            (weight * torch.sin(out / scale + 0.3)).sum()
            for out, weight, scale in zip(outputs(xs), weights, scales, strict=True)
        )
        return sum(itertools.compress(terms, derived))

    return phi


def gradient(phi, xs) -> Tensors:
    """Return autograd's first derivatives."""
    leaves = [x.detach().requires_grad_() for x in xs]
    return torch.autograd.grad(phi(*leaves), leaves, materialize_grads=True)


def product(xs: Tensors, ys: Tensors) -> torch.Tensor:
    """Return the scalar product."""
    return sum((x * y).sum() for x, y in zip(xs, ys, strict=True))


def reverse_over_reverse(phi, xs, v) -> Tensors:
    """Return the Hessian times a direction by autograd twice."""
    leaves = [x.detach().requires_grad_() for x in xs]
    first = torch.autograd.grad(
        phi(*leaves), leaves, create_graph=True, materialize_grads=True
    )
    along = product(first, v)
    if not along.requires_grad:
        return [torch.zeros_like(x) for x in xs]
    return torch.autograd.grad(along, leaves, materialize_grads=True)


def numbers(xs: Tensors) -> tuple[int, ...]:
    """Return the positions of all arguments."""
    return tuple(range(len(xs)))


SECOND = {
    "reverse over reverse": reverse_over_reverse,
    "forward over reverse": lambda phi, xs, v: torch.func.jvp(
        torch.func.grad(phi, numbers(xs)), xs, v
    )[1],
    "reverse over forward": lambda phi, xs, v: torch.func.grad(
        lambda *ys: torch.func.jvp(phi, ys, v)[1], numbers(xs)
    )(*xs),
}


def size(tensor: torch.Tensor) -> float:
    """Return the largest absolute value."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def differences(phi, xs, v, step) -> tuple[Tensors, list[float]]:
    """Return derivatives along v, of phi and of its gradient, with their errors."""

    def at(t: float) -> Tensors:
        moved = [x + t * d for x, d in zip(xs, v, strict=True)]
        return [phi(*moved), *gradient(phi, moved)]

    middle = at(0.0)
    central, bends = [], []
    for h in (step, step / 2, step / 4):
        sides = list(zip(at(h), middle, at(-h), strict=True))
        central.append([(right - left) / (2 * h) for right, _, left in sides])
        bends.append([size(right - 2 * mid + left) / h for right, mid, left in sides])
    rough, fine = (
        [(4 * half - whole) / 3 for whole, half in zip(*pair, strict=True)]
        for pair in itertools.pairwise(central)
    )
    # On a kink of the gradient its central difference converges, to neither side: the
    # one-sided differences stay as far apart however small the step is.
    errors = [
        size(one - other) + (last if last > first / 2 else 0.0)
        for one, other, first, last in zip(fine, rough, bends[0], bends[2], strict=True)
    ]
    return fine, errors


def converging(phi, xs, v) -> tuple[Tensors, list[float]] | None:
    """Return the derivatives by differences where these have limits."""
    for step in STEPS:
        values, errors = differences(phi, xs, v, step)
        scales = size(values[0]), *[max(map(size, values[1:]))] * len(xs)
        pairs = zip(errors, scales, strict=True)
        if all(error <= TOLERANCE * max(scale, 1e-3) for error, scale in pairs):
            return values, errors
    return None


def compare(found: Tensors, wanted: Tensors, errors: Sequence[float]) -> float:
    """Return the largest relative error, 0 where all are right, inf for a nan."""
    largest, worst = max(map(size, wanted)), 0.0
    for x, y, error in zip(found, wanted, errors, strict=True):
        off = size(x - y)
        if not off <= 10 * error + TOLERANCE * max(size(y), 1e-3 * largest, 1e-3):
            relative = off / max(size(x), size(y))
            worst = math.inf if math.isnan(relative) else max(worst, relative)
    return worst


def attempt(spelling, derive, wanted, errors) -> Finding:
    """Return what one spelling gives."""
    try:
        found = [x.detach() for x in derive()]
    except Exception as error:
        if torch._C._functorch.maybe_current_level() is not None:
            # The exception has left levels of torch.func behind.
            torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(0)
        return Finding(spelling, "raises", first_line(error))
    worst = compare(found, wanted, errors)
    outcome = "wrong" if worst < math.inf else "nan"
    return Finding(spelling, outcome if worst else "right", "", worst)


def first_line(error: Exception) -> str:
    """Return an exception as one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def examine_case(case: Case) -> list[Finding]:
    """Try all spellings on one sample."""
    xs = inputs_of(case)
    v = tuple(torch.randn_like(x) for x in xs)
    try:
        phi = scalar_of(case)
        reference = converging(phi, xs, v)
        if reference is None:  # on a kink: beside it
            xs = tuple(x + 0.1 * torch.randn_like(x) for x in xs)
            reference = converging(phi, xs, v)
    except Exception as error:
        return [Finding("sample", "fails", first_line(error))]
    if reference is None:
        return [Finding("sample", "has no derivatives")]
    (slope, *bend), (error, *errors) = reference
    first = {
        "reverse": lambda: [product(gradient(phi, xs), v)],
        "forward": lambda: [torch.func.jvp(phi, xs, v)[1]],
    }
    found = [attempt(name, derive, [slope], [error]) for name, derive in first.items()]
    if found[0].outcome != "right":  # there are no second derivatives to compare with
        return found
    return found + [
        attempt(name, partial(derive, phi, xs, v), bend, errors)
        for name, derive in SECOND.items()
    ]


def examine(name: str) -> list[Finding]:
    """Try all spellings on some samples of one operator."""
    signal.alarm(SECONDS)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    op = false_alarms.OPERATORS[name]
    samples = op.sample_inputs("cpu", torch.float64, requires_grad=True)
    few = [false_alarms.case_of(op, x) for x in itertools.islice(samples, 400)]
    small = [c for c in few if 0 < sum(x.numel() for x in inputs_of(c)) <= LARGEST]
    chosen = small[:: max(1, len(small) // SAMPLES)][:SAMPLES]
    return [finding for case in chosen for finding in examine_case(case)]


def print_told(name: str, findings: Sequence[Finding]) -> None:
    """Print what is wrong, raises in reverse over reverse, or could not be tried."""
    groups = defaultdict(list)
    for spelling, outcome, why, error in findings:
        told = "reverse over reverse" if outcome == "raises" else spelling
        if outcome != "right" and spelling == told:
            groups[spelling, outcome, why].append(error)
    for (spelling, outcome, why), errors in groups.items():
        samples = sum(f.spelling == spelling for f in findings)
        off = f"{min(errors):.0e} to {max(errors):.0e}" if outcome == "wrong" else why
        heading = f"{name:<48}{spelling:<22}{outcome} {len(errors)}/{samples}"
        print(f"{heading} {off}", flush=True)


def main() -> None:
    """Run the benchmark as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=1, metavar="N")
    parser.add_argument("--only", metavar="NAME")
    options = parser.parse_args()
    torch.set_num_threads(1)
    false_alarms.OPERATORS.update(false_alarms.operators())
    names = [x for x in false_alarms.OPERATORS if options.only in (None, x)]
    if not names:
        parser.error(f"no operator {options.only}")
    print(f"torch {torch.__version__}: {len(names)} operators", flush=True)
    counts: Counter[tuple[str, str]] = Counter()
    # A process for each operator: one may crash, hang or leave its mark on torch.
    context = multiprocessing.get_context("fork")
    with context.Pool(options.jobs, maxtasksperchild=1) as pool:
        for name, result in [(n, pool.apply_async(examine, (n,))) for n in names]:
            try:
                findings = result.get(SECONDS + 10)
            except Exception as error:
                findings = [Finding("process", "fails", first_line(error))]
            print_told(name, findings)
            counts.update((f.spelling, f.outcome) for f in findings)
    print("\nsamples:")
    for (spelling, outcome), count in sorted(counts.items()):
        print(f"{spelling:<22}{outcome:<20}{count:>6}")


if __name__ == "__main__":
    main()
