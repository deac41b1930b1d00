"""Whether torch's transforms of a function agree with plain autograd and loops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from gradtools import trees
from gradtools.errors import DefinitionError, GradientMismatchError, Violation
from gradtools.gradcheck import numeric, probes
from gradtools.gradcheck.report import Evidence, Report
from gradtools.rules.signature import is_differentiable

__all__ = ["Leaves", "check_transforms", "flattened", "weighted"]

Flat = Callable[..., tuple[torch.Tensor, ...]]


class Leaves(NamedTuple):
    """The leaves of a call, and which of them are differentiable."""

    every: Sequence[Any]
    able: Sequence[int]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The differentiable ones."""
        return self.chosen(self.every)

    def chosen(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """Return what stands in the places of the differentiable ones."""
        return tuple(values[place] for place in self.able)

    def spread(self, values: Sequence[Any]) -> list[Any]:
        """Return values for the differentiable ones, None for the others."""
        every: list[Any] = [None] * len(self.every)
        for place, value in zip(self.able, values, strict=True):
            every[place] = value
        return every


def flattened(
    f: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> tuple[Flat, Leaves, trees.Spec]:
    """Return a function of its differentiable leaves alone; the leaves; the spec."""
    every, spec = trees.flatten((tuple(args), dict(kwargs or {})))
    leaves = Leaves(every, [i for i, x in enumerate(every) if is_differentiable(x)])

    def flat(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = list(every)
        for place, tensor in zip(leaves.able, tensors, strict=True):
            values[place] = tensor
        given, named = trees.unflatten(values, spec)
        outs = trees.flatten(f(*given, **named))[0]
        return tuple(out for out in outs if is_differentiable(out))

    return flat, leaves, spec


def _count(like: torch.Tensor) -> torch.Tensor:
    """Return 0, 1, 2, ..., one for each number of a tensor, where that is."""
    return torch.arange(like.numel(), dtype=torch.float64, device=like.device)


def _weights(outs: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return the same numbers for the same shapes, without drawing any."""
    return [
        torch.cos(1.7 * _count(out) + index).reshape(out.shape).to(out.dtype)
        for index, out in enumerate(outs)
    ]


def check_transforms(
    f: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    transforms: Iterable[str] | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-6,
) -> Report:
    """Check that torch's transforms of a function agree with plain autograd and loops.

    Args:
        f: The function, from tensors and other objects in pytrees to tensors in a
            pytree; differentiable, and without a branch on values where vmap is asked.
        args: Its arguments; small ones do, of any shapes.
        kwargs: Its keyword arguments.
        transforms: Which of ``"vjp"``, ``"jvp"``, ``"jacrev"``, ``"jacfwd"``,
            ``"double backward"``, ``"jvp of vjp"``, ``"vmap"``, ``"vmap of vjp"``,
            ``"compile"``; None: all.
        rtol: Relative tolerance, as in ``torch.testing.assert_close``.
        atol: Absolute tolerance.

    Returns:
        What was compared.

    Raises:
        GradientMismatchError: A transform gives something else.
        DefinitionError: The name of a transform is unknown.

    Example:
        >>> from gradtools.testing import check_transforms
        >>> report = check_transforms(torch.sin, (torch.ones(3),), transforms=["vjp"])
        >>> report.outcome
        'passed'
    """
    chosen = tuple(_TRANSFORMS if transforms is None else transforms)
    unknown = [name for name in chosen if name not in _TRANSFORMS]
    if unknown:
        raise DefinitionError(
            f"check_transforms was asked for {unknown[0]!r}, which is none of "
            + ", ".join(map(repr, _TRANSFORMS)),
            fix="Leave transforms= out to check all of them.",
        )
    flat, leaves, _ = flattened(f, args, kwargs)
    primals = tuple(tensor.detach() for tensor in leaves.tensors)
    name = getattr(f, "__name__", type(f).__name__)
    for transform in chosen:
        got, wanted = _TRANSFORMS[transform](flat, primals)
        try:
            torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)
        except AssertionError as error:
            raise GradientMismatchError(
                f"{name}: {transform} does not give what plain autograd and loops give",
                violations=[
                    Violation(transform, "the same numbers", str(error).splitlines()[0])
                ],
                fix="Look at what the function does with shapes, values and in place: "
                "a transform sees other ones.",
                kind="transform",
            ) from error
    evidence = [Evidence(transform, "passed", "agrees") for transform in chosen]
    shapes = ", ".join(str(tuple(primal.shape)) for primal in primals)
    return Report(name, shapes, tuple(evidence))


Pair = tuple[Any, Any]
Primals = tuple[torch.Tensor, ...]


def _by_autograd(flat: Flat, primals: Primals) -> Primals:
    inputs = [primal.clone().requires_grad_() for primal in primals]
    outs = [out for out in flat(*inputs) if out.requires_grad]
    return torch.autograd.grad(outs, inputs, _weights(outs), materialize_grads=True)


def _vjp(flat: Flat, primals: Primals) -> Pair:
    outs, pull, *_ = torch.func.vjp(flat, *primals)
    return pull(tuple(_weights(outs))), _by_autograd(flat, primals)


def _inner(first: Iterable[torch.Tensor], second: Iterable[torch.Tensor]) -> Any:
    pairs = zip(first, second, strict=True)
    return sum((a.conj() * b).real.sum() for a, b in pairs)


def _jvp(flat: Flat, primals: Primals) -> Pair:
    moves = tuple(_weights(primals))
    outs, moved, *_ = torch.func.jvp(flat, primals, moves)
    return _inner(_weights(outs), moved), _inner(_by_autograd(flat, primals), moves)


def weighted(flat: Flat) -> Callable[..., torch.Tensor]:
    """Return a weighted sum of the outputs of a function, in double precision."""

    def loss(*primals: torch.Tensor) -> torch.Tensor:
        outs = flat(*primals)
        # A number goes with tensors of any device: the default one may be another.
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        return zero + _inner(_weights(outs), outs)

    return loss


def _jacobian(of: Callable[..., Any]) -> Callable[[Flat, Primals], Pair]:
    def pair(flat: Flat, primals: Primals) -> Pair:
        places = tuple(range(len(primals)))
        rows = of(flat, argnums=places)(*primals)
        outs = flat(*primals)
        moves = _weights(primals)
        moved = torch.func.jvp(flat, primals, tuple(moves))[1]
        got = [
            sum(
                (jac * move).sum(tuple(range(out.dim(), jac.dim())))
                for jac, move in zip(row, moves, strict=True)
            )
            for row, out in zip(rows, outs, strict=True)
        ]
        return got, list(moved)

    return pair


def _double_backward(flat: Flat, primals: Primals) -> Pair:
    moves = _weights(primals)
    inputs = [primal.clone().requires_grad_() for primal in primals]
    first = torch.autograd.grad(
        weighted(flat)(*inputs), inputs, create_graph=True, materialize_grads=True
    )
    total = _inner(moves, first)
    if not total.requires_grad:
        return [torch.zeros_like(p) for p in primals], _forward_over_reverse(
            flat, primals
        )
    second = torch.autograd.grad(total, inputs, materialize_grads=True)
    return list(second), _forward_over_reverse(flat, primals)


def _forward_over_reverse(flat: Flat, primals: Primals) -> list[torch.Tensor]:
    places = tuple(range(len(primals)))
    gradient = torch.func.grad(weighted(flat), argnums=places)
    return list(torch.func.jvp(gradient, primals, tuple(_weights(primals)))[1])


def _jvp_of_vjp(flat: Flat, primals: Primals) -> Pair:
    """Compare with differences of the gradient, in the numbers' own precision."""
    step = torch.finfo(primals[0].dtype).eps ** (1 / 3)
    moves = _weights(primals)

    def at(sign: float) -> Primals:
        pairs = zip(primals, moves, strict=True)
        return _by_autograd(flat, tuple(p + sign * step * m for p, m in pairs))

    ahead, behind = at(1.0), at(-1.0)
    wanted = [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]
    got = _forward_over_reverse(flat, primals)
    # differences know some digits only: agree on those
    digits = 100 * torch.finfo(primals[0].dtype).eps ** (2 / 3)
    sizes = [max(float(w.abs().max()), 1.0) if w.numel() else 1.0 for w in wanted]
    near = [
        torch.where((g - w).abs() <= digits * size * 10, w, g)
        for g, w, size in zip(got, wanted, sizes, strict=True)
    ]
    return near, wanted


def _rows(primals: Primals) -> list[Primals]:
    generator = torch.Generator().manual_seed(0)
    return [
        tuple(
            p + 1e-2 * k * probes.scale_of(p) * numeric.signs(p, generator)
            for p in primals
        )
        for k in range(3)
    ]


def _vmap(flat: Flat, primals: Primals) -> Pair:
    rows = _rows(primals)
    batch = [torch.stack(column) for column in zip(*rows, strict=True)]
    got = torch.func.vmap(flat, randomness="same")(*batch)
    each = [flat(*row) for row in rows]
    return list(got), [torch.stack(column) for column in zip(*each, strict=True)]


def _vmap_of_vjp(flat: Flat, primals: Primals) -> Pair:
    def gradient(*primals: torch.Tensor) -> Primals:
        outs, pull, *_ = torch.func.vjp(flat, *primals)
        return pull(tuple(_weights(outs)))

    rows = _rows(primals)
    batch = [torch.stack(column) for column in zip(*rows, strict=True)]
    got = torch.func.vmap(gradient, randomness="same")(*batch)
    each = [_by_autograd(flat, row) for row in rows]
    return list(got), [torch.stack(column) for column in zip(*each, strict=True)]


def _compile(flat: Flat, primals: Primals) -> Pair:
    compiled = torch.compile(flat, backend="aot_eager", fullgraph=True)
    return _by_autograd(compiled, primals), _by_autograd(flat, primals)


_TRANSFORMS: dict[str, Callable[[Flat, Primals], Pair]] = {
    "vjp": _vjp,
    "jvp": _jvp,
    "jacrev": _jacobian(torch.func.jacrev),
    "jacfwd": _jacobian(torch.func.jacfwd),
    "double backward": _double_backward,
    "jvp of vjp": _jvp_of_vjp,
    "vmap": _vmap,
    "vmap of vjp": _vmap_of_vjp,
    "compile": _compile,
}
