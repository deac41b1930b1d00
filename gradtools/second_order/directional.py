"""First derivatives that compose: jvp, vjp and linearize."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from gradtools import torch_compat
from gradtools.gradcheck.surroundings import buffers_kept
from gradtools.second_order.primals import (
    Argnums,
    Flat,
    Primals,
    Tensors,
    as_tuple,
)
from gradtools.second_order.reverse import Pullback
from gradtools.second_order.sound import (
    has_no_forward_mode,
    in_forward_mode,
    is_under_way,
    usable,
)

__all__ = ["jvp", "linearize", "transposed", "vjp"]


def jvp(
    f: Callable[..., Any],
    primals: Any,
    tangents: Any,
    *,
    argnums: Argnums = None,
    has_aux: bool = False,
) -> Any:
    """Push tangents forward through a function: its Jacobian times a vector.

    By forward mode, which keeps no graph. Where an operator has none, and where the
    result is differentiated in its turn, by two reverse passes instead (J. Townsend, "A
    new trick for calculating Jacobian vector products", 2017): torch's reverse mode
    over forward mode is silently wrong for some operators.

    Args:
        f: From tensors in pytrees to tensors in a pytree.
        primals: The arguments of f, a tuple.
        tangents: In the structure of the primals that count, with the shape, dtype and
            device of each; None stands for zeros.
        argnums: Which arguments count: all as a tuple (None), one by itself (an int),
            or a tuple of some.
        has_aux: Whether f returns a pair ``(output, aux)``.

    Returns:
        ``(output, output_tangent)``, with has_aux ``(output, output_tangent, aux)``.
        The tangent of what is no floating tensor is None.

    Raises:
        DefinitionError: The tangents do not fit the primals.

    Example:
        >>> gt.jvp(torch.sin, (torch.zeros(2),), (torch.tensor([1.0, 2.0]),))
        (tensor([0., 0.]), tensor([1., 2.]))
    """
    asked = Primals(as_tuple(primals, "jvp"), argnums, "jvp")
    vectors = asked.tangents(tangents)
    flat = asked.flat(f, has_aux=has_aux)
    outputs, pushed, aux = _forward(flat, asked.leaves, vectors) or _by_transposition(
        flat, asked.leaves, vectors
    )
    pair = flat.output(outputs), flat.output(pushed, constants=False)
    return (*pair, flat.aux.rebuild(aux)) if has_aux else pair


def vjp(f: Callable[..., Any], *primals: Any, has_aux: bool = False) -> Any:
    """Evaluate a function, and return what pulls cotangents back through it.

    Outside of transforms with plain autograd, so that f may checkpoint, keep buffers,
    or use any ``autograd.Function``.

    Args:
        f: From tensors in pytrees to tensors in a pytree.
        *primals: Its arguments.
        has_aux: Whether f returns a pair ``(output, aux)``.

    Returns:
        ``(output, pull)``, with has_aux ``(output, pull, aux)``: ``pull(cotangents)``
        takes a tree like the output and returns a tuple like the primals. It may be
        called any number of times.

    Raises:
        DefinitionError: No argument can be differentiated; cotangents do not fit.

    Example:
        >>> out, pull = gt.vjp(lambda x, y: x * y, torch.tensor(2.0), torch.tensor(3.0))
        >>> pull(torch.tensor(1.0))
        (tensor(3.), tensor(2.))
    """
    asked = Primals(primals, None, "vjp")
    flat = asked.flat(f, has_aux=has_aux)
    recorded = Pullback(flat, asked.leaves)
    output = flat.output(recorded.outputs)

    def pull(cotangents: Any) -> Any:
        if not recorded.outputs:  # nothing that it returns has a derivative
            return asked.tree([torch.zeros_like(leaf) for leaf in asked.leaves])
        given = Primals((output,), 0, "vjp").tangents(cotangents, "cotangents")
        return asked.tree(recorded(given))

    return (output, pull, flat.aux.rebuild(recorded.aux)) if has_aux else (output, pull)


def linearize(f: Callable[..., Any], *primals: Any, has_aux: bool = False) -> Any:
    """Evaluate a function, and return its derivative as a linear function.

    The derivative is kept as the graph of two reverse passes: each product is then one
    backward pass through it, and the function is not run again.

    Args:
        f: From tensors in pytrees to tensors in a pytree.
        *primals: Its arguments.
        has_aux: Whether f returns a pair ``(output, aux)``.

    Returns:
        ``(output, jvp_fn)``, with has_aux ``(output, jvp_fn, aux)``:
        ``jvp_fn(*tangents)`` takes one tree per primal and returns one like the output.

    Raises:
        DefinitionError: No argument can be differentiated; tangents do not fit.

    Example:
        >>> out, push = gt.linearize(torch.sin, torch.zeros(2))
        >>> push(torch.tensor([1.0, 2.0])), push(torch.tensor([3.0, 4.0]))
        (tensor([1., 2.]), tensor([3., 4.]))
    """
    asked = Primals(primals, None, "linearize")
    flat = asked.flat(f, has_aux=has_aux)
    pull = Pullback(flat, asked.leaves, order=2)
    linear = transposed(pull) if pull.outputs else None

    def push(*tangents: Any) -> Any:
        vectors = asked.tangents(tangents)
        return flat.output(linear(vectors) if linear else (), constants=False)

    output = flat.output(pull.outputs)
    return (output, push, flat.aux.rebuild(pull.aux)) if has_aux else (output, push)


def transposed(pull: Pullback) -> Pullback:
    """Return the function that pushes tangents forward, from the one that pulls back.

    At ones rather than zeros: bwd of logcumsumexp, for one, takes a logarithm of its
    cotangent, and its transpose at zero is NaN.
    """
    ones = [torch.ones_like(out) for out in pull.outputs]
    return Pullback(lambda *cotangents: (pull(cotangents), ()), ones, upon=pull)


def _forward(
    flat: Flat, leaves: Tensors, vectors: Tensors
) -> tuple[Tensors, Tensors, Tensors] | None:
    """Push tangents forward by forward mode; None where that would not do."""
    if is_under_way((*leaves, *vectors)):
        return None
    is_vectorized = torch_compat.transforms_active()
    by_duals = _by_transform if is_vectorized else _by_dual_numbers
    try:
        with in_forward_mode():
            outputs, pushed, aux = by_duals(flat, leaves, vectors)
    except RuntimeError as error:
        if not has_no_forward_mode(error):
            raise
        return None
    if any(tensor.requires_grad for tensor in pushed):  # of what f captures
        with buffers_kept([flat]):  # this run has updated them
            return _by_transposition(flat, leaves, vectors)
    return outputs, pushed, aux


def _by_transposition(
    flat: Flat, leaves: Tensors, vectors: Tensors
) -> tuple[Tensors, Tensors, Tensors]:
    pull = Pullback(flat, leaves, order=2)
    pushed = transposed(pull)(vectors, is_last=True) if pull.outputs else ()
    return pull.outputs, pushed, pull.aux


def _by_transform(
    flat: Flat, leaves: Tensors, vectors: Tensors
) -> tuple[Tensors, Tensors, Tensors]:
    found: Any = torch.func.jvp(flat, tuple(leaves), tuple(vectors), has_aux=True)
    return found


def _by_dual_numbers(
    flat: Flat, leaves: Tensors, vectors: Tensors
) -> tuple[Tensors, Tensors, Tensors]:
    with forward_ad.dual_level():
        inputs = map(usable, leaves)
        outputs, aux = flat(*map(forward_ad.make_dual, inputs, vectors))
        pairs = [forward_ad.unpack_dual(out) for out in outputs]
        aux = tuple(forward_ad.unpack_dual(tensor).primal for tensor in aux)
    pushed = [torch.zeros_like(p) if t is None else t for p, t in pairs]
    return [pair.primal for pair in pairs], pushed, aux
