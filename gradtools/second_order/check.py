"""check_second_order: whether second derivatives of a function can be trusted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from gradtools import trees
from gradtools.errors import GradientMismatchError, Violation
from gradtools.gradcheck.report import Evidence, Report
from gradtools.rules.signature import describe, is_differentiable
from gradtools.second_order.curvature import hvp_fn
from gradtools.second_order.directional import linearize
from gradtools.second_order.primals import Argnums, Primals, Tensors, name_of
from gradtools.second_order.products import hvp
from gradtools.second_order.sound import has_no_forward_mode, in_forward_mode
from gradtools.second_order.transforms import grad

__all__ = ["check_second_order"]

CALLS = 3
"""How often a reusable operator is called: some are right once only."""
MOST_OPERATORS = 200
_SCALARS: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
"""Numbers that go with tensors of any device, whatever the default one is."""


def check_second_order(
    f: Callable[..., Any],
    *primals: Any,
    argnums: Argnums = None,
    rtol: float = 1e-5,
    generator: torch.Generator | None = None,
) -> Report:
    """Compare second derivatives of a function with differences of its gradient.

    In float64, along random directions: :func:`hvp`, :func:`hvp_fn` and
    :func:`linearize` of the gradient, called three times each, and what
    torch.func.hessian does, forward over reverse. Where they disagree each operator of
    the function is tried by itself, to name the one that is to blame.

    Args:
        f: From tensors in pytrees to a real scalar, smooth around the primals.
        *primals: Its arguments; floating tensors are taken to float64.
        argnums: Which of them count, as in :func:`hvp`.
        rtol: The relative error that is allowed, beyond that of the differences.
        generator: For the directions.

    Returns:
        What was compared, with errors. Where torch's forward over reverse is wrong, the
        report says so; nothing here uses it by itself.

    Raises:
        GradientMismatchError: What :func:`hvp` gives is not the derivative of the
            gradient, or a product changes from call to call.
        DefinitionError: f returns no scalar.

    Example:
        >>> report = gt.check_second_order(lambda x: (x**4).sum(), torch.ones(3))
        >>> report.outcome
        'passed'
    """
    began = time.perf_counter()
    values = trees.map_tensors(_doubled, primals)
    asked = Primals(values, argnums, "check_second_order")
    trial = _Trial(f, asked, rtol, generator or torch.Generator().manual_seed(0))
    evidence = list(trial.evidence())
    failed = [item for item in evidence if item.outcome == "failed"]
    report = Report(
        name_of(f),
        describe(asked.paths(), asked.every),
        tuple(evidence),
        contract=f"within {rtol:.0e}",
        seconds=time.perf_counter() - began,
        evaluations=trial.evaluations,
    )
    if failed:
        blamed = trial.blamed(_by_autograd) or trial.own_functions()
        raise GradientMismatchError(
            f"{name_of(f)}: its second derivative is not that of its gradient",
            kind="second order",
            violations=[
                Violation(item.question, "the differences", item.detail)
                for item in failed
            ],
            fix=f"To blame: {', '.join(blamed) or 'no operator by itself'}. Compute it "
            "another way, or state its derivative as a rule.",
        )
    return report


class _Trial:
    """A function with directions, and what its products should be."""

    def __init__(
        self,
        f: Callable[..., Any],
        asked: Primals,
        rtol: float,
        generator: torch.Generator,
    ) -> None:
        self.f, self.asked, self.rtol = f, asked, rtol
        self.evaluations = 0
        self.directions = [
            [_drawn(leaf, generator) for leaf in asked.leaves] for _ in range(CALLS)
        ]
        self.wanted = [self._differences(move) for move in self.directions]

    def evidence(self) -> Iterator[Evidence]:
        """Yield what is found of each spelling."""
        asked, f = self.asked, self.f
        trees_of = [asked.tree(move) for move in self.directions]
        yield self._compared(
            "hvp",
            [hvp(f, asked.args, tree, argnums=asked.argnums) for tree in trees_of],
        )
        with hvp_fn(f, *asked.args, argnums=asked.argnums) as op:
            yield self._compared(
                f"hvp_fn, called {CALLS} times",
                [_as_given(op, asked, tree) for tree in trees_of],
            )
        first = self.gradient()
        _, push = linearize(first, *asked.leaves)
        yield self._compared(
            f"linearize, called {CALLS} times",
            [asked.tree(push(*move)) for move in self.directions],
        )
        yield self._forward_over_reverse()
        yield self._forward_mode()

    def gradient(self) -> Callable[..., Tensors]:
        """Return the gradient as a function of the leaves."""
        flat = self.asked.flat(self.f)
        numbers = tuple(range(len(self.asked.leaves)))
        return grad(lambda *leaves: flat.scalar(*leaves)[0], numbers)

    def blamed(self, product: Callable[..., Tensors]) -> list[str]:
        """Return the operators of which a product is wrong by itself."""
        seen: dict[str, None] = {}
        with _Recorder() as recorder:
            self.f(*self.asked.args)
        for call in recorder.calls[:MOST_OPERATORS]:
            if call.name not in seen and call.is_wrong(product, self.rtol):
                seen[call.name] = None
        return list(seen)

    def own_functions(self) -> list[str]:
        """Return the hand-written Functions in the graph, which nothing can try."""
        leaves = [leaf.detach().requires_grad_() for leaf in self.asked.leaves]
        value, _ = self.asked.flat(self.f).scalar(*leaves)
        stack, names = [value.grad_fn], {}
        while stack:
            node = stack.pop()
            if node is not None:
                if isinstance(node, torch.autograd.function.BackwardCFunction):
                    names[type(node).__name__.removesuffix("Backward")] = None
                stack += [below for below, _ in node.next_functions]
        return list(names)

    def _forward_over_reverse(self) -> Evidence:
        question = "torch.func, forward over reverse"
        try:
            found = [
                self.asked.tree(self._by_jvp_of_jacrev(m)) for m in self.directions
            ]
        except (RuntimeError, NotImplementedError) as error:
            detail = f"raises {type(error).__name__}: {str(error).splitlines()[0]}"
            return Evidence(question, "not given", detail, None, "second order")
        item = self._compared(question, found)
        if item.outcome == "passed":
            return item
        names = ", ".join(self.blamed(_by_jvp_of_jacrev)) or "no operator by itself"
        detail = f"{item.detail}; to blame: {names}; nothing here uses it"
        return Evidence(question, "not given", detail, item.error, "second order")

    def _forward_mode(self) -> Evidence:
        """Say whether jvp can go by forward mode, and if not, because of what."""
        flat, move = self.asked.flat(self.f), tuple(self.directions[0])
        try:
            with in_forward_mode():
                torch.func.jvp(flat, tuple(self.asked.leaves), move, has_aux=True)
        except RuntimeError as error:
            if not has_no_forward_mode(error):
                raise
            why = str(error).splitlines()[0]
            detail = f"{why}; jvp goes by two reverse passes"
            return Evidence("forward mode", "not given", detail, None, "forward mode")
        detail = "every operator has it"
        return Evidence("forward mode", "passed", detail, None, "forward mode")

    def _by_jvp_of_jacrev(self, move: Tensors) -> Tensors:
        flat = self.asked.flat(self.f)
        return _by_jvp_of_jacrev(
            lambda *leaves: flat.scalar(*leaves)[0], self.asked.leaves, move
        )

    def _compared(self, question: str, found: Sequence[Any]) -> Evidence:
        errors = [
            wanted.distance(self.asked.tangents(tree, "the products"))
            for wanted, tree in zip(self.wanted, found, strict=True)
        ]
        worst = max(range(len(errors)), key=errors.__getitem__)
        allowed = self.rtol + self.wanted[worst].error
        is_right = errors[worst] <= allowed
        detail = f"off by {errors[worst]:.1e} of its size (allowed: {allowed:.0e})"
        if not is_right and len(set(map(_magnitude, errors))) > 1:
            detail += f", in call {worst + 1}"
        return Evidence(
            question,
            "passed" if is_right else "failed",
            detail,
            errors[worst],
            "second order",
        )

    def _differences(self, move: Tensors) -> _Wanted:
        flat = self.asked.flat(self.f)
        found = _extrapolated(
            lambda *leaves: flat.scalar(*leaves)[0], self.asked.leaves, move
        )
        self.evaluations += 4 * len(_STEPS)
        return found


class _Wanted(NamedTuple):
    """A product by differences, and its own relative error."""

    values: Tensors
    error: float

    def distance(self, found: Tensors) -> float:
        """Return how far something else is off, relative to the larger of the two."""
        far = _norm([a - b for a, b in zip(found, self.values, strict=True)])
        size = max(_norm(self.values), _norm(found), 1e-8)
        return far / size if math.isfinite(far) else math.inf


class _Call(NamedTuple):
    """One call of an operator, on values of its own."""

    name: str
    function: Callable[..., Any]
    leaves: Tensors
    rebuilt: Callable[[Tensors], tuple[Any, Any]]

    def is_wrong(self, product: Callable[..., Tensors], rtol: float) -> bool:
        """Whether a product of the operator by itself is not what differences say."""
        generator = torch.Generator().manual_seed(0)
        move = [_drawn(leaf, generator) for leaf in self.leaves]
        try:
            wanted = _extrapolated(self._weighed, self.leaves, move)
            found = product(self._weighed, self.leaves, move)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return False
        return wanted.error < rtol < wanted.distance(found)

    def _weighed(self, *leaves: torch.Tensor) -> torch.Tensor:
        args, kwargs = self.rebuilt(leaves)
        outs = trees.flatten(self.function(*args, **kwargs))[0]
        parts = [torch.sin(out + 0.3).sum() for out in outs if _is_double(out)]
        weights = torch.linspace(1, 2, max(len(parts), 1), **_SCALARS)
        return sum(
            (w * part for w, part in zip(weights, parts, strict=True)),
            torch.zeros((), **_SCALARS),
        )


class _Recorder(TorchFunctionMode):
    """Collect calls of operators on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        every, spec = trees.flatten((args, kwargs or {}))
        every = [x.detach() if isinstance(x, torch.Tensor) else x for x in every]
        places = [i for i, x in enumerate(every) if _is_double(x)]

        def rebuilt(leaves: Tensors) -> tuple[Any, Any]:
            values = list(every)
            for place, leaf in zip(places, leaves, strict=True):
                values[place] = leaf
            return trees.unflatten(values, spec)

        name = getattr(func, "__name__", str(func))
        if places and not name.startswith("__"):
            self.calls.append(_Call(name, func, [every[i] for i in places], rebuilt))
        return func(*args, **(kwargs or {}))


_STEPS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)


def _extrapolated(
    f: Callable[..., torch.Tensor], leaves: Tensors, move: Tensors
) -> _Wanted:
    """Return central differences of the gradient, each by two steps (Richardson).

    Of all steps that whose result differs least from its neighbour's, which is then the
    error.
    """

    def gradient(step: float) -> Tensors:
        inputs = [
            (leaf + step * m).detach().requires_grad_()
            for leaf, m in zip(leaves, move, strict=True)
        ]
        with torch.enable_grad():
            value = f(*inputs)
        if not value.requires_grad:
            return [torch.zeros_like(leaf) for leaf in inputs]
        return torch.autograd.grad(value, inputs, materialize_grads=True)

    def slope(step: float) -> Tensors:
        near, far = (
            [(a - b) / (2 * h) for a, b in zip(gradient(h), gradient(-h), strict=True)]
            for h in (step / 2, step)
        )
        return [(4 * a - b) / 3 for a, b in zip(near, far, strict=True)]

    slopes = [slope(step) for step in _STEPS]
    pairs = [
        _Wanted(values, _Wanted(other, 0.0).distance(values))
        for values, other in zip(slopes[1:], slopes, strict=False)
    ]
    return min(pairs, key=lambda wanted: wanted.error)


def _by_autograd(
    f: Callable[..., torch.Tensor], leaves: Tensors, move: Tensors
) -> Tensors:
    inputs = [leaf.detach().requires_grad_() for leaf in leaves]
    with torch.enable_grad():
        first = torch.autograd.grad(
            f(*inputs), inputs, create_graph=True, materialize_grads=True
        )
        along = sum((a * b).sum() for a, b in zip(first, move, strict=True))
    if not isinstance(along, torch.Tensor) or not along.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(along, inputs, materialize_grads=True)


def _by_jvp_of_jacrev(
    f: Callable[..., torch.Tensor], leaves: Tensors, move: Tensors
) -> Tensors:
    numbers = tuple(range(len(leaves)))
    found: Any = torch.func.jvp(
        torch.func.jacrev(f, numbers), tuple(leaves), tuple(move)
    )
    return found[1]


def _as_given(op: Any, asked: Primals, tree: Any) -> Any:
    """Multiply, and put back the tuple that an operator of one primal leaves out."""
    found = op(tree) if isinstance(asked.argnums, int) else op(*tree)
    return (found,) if asked.argnums is None and len(asked.args) == 1 else found


def _doubled(tensor: torch.Tensor) -> torch.Tensor:
    if not is_differentiable(tensor):
        return tensor
    kind = torch.complex128 if tensor.dtype.is_complex else torch.float64
    return tensor.detach().to(kind)


def _drawn(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a direction of the size of a tensor, or of one."""
    move = torch.randn(
        like.shape, generator=generator, dtype=like.dtype, device=generator.device
    )
    size = float(like.abs().mean()) if like.numel() else 0.0
    return move.to(like.device) * (size or 1.0)


def _is_double(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype is torch.float64


def _norm(tensors: Tensors) -> float:
    return math.sqrt(sum(float(t.abs().square().sum()) for t in tensors))


def _magnitude(error: float) -> int:
    return round(math.log10(max(error, 1e-16)))
