"""Transforms of functions: grad and value_and_grad, Jacobians, the Hessian, vmap."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeAlias

import torch

from gradtools import trees
from gradtools.second_order.primals import Primals
from gradtools.second_order.reverse import Pullback
from gradtools.second_order.sound import (
    has_no_forward_mode,
    in_forward_mode,
    is_under_way,
    within_transforms,
)

__all__ = ["grad", "hessian", "jacfwd", "jacrev", "value_and_grad", "vmap"]

P = ParamSpec("P")
Function: TypeAlias = Callable[P, Any]

vmap = torch.func.vmap


def grad(
    f: Function[P], argnums: int | tuple[int, ...] = 0, *, has_aux: bool = False
) -> Function[P]:
    """Return the function that computes the gradient of a scalar function.

    Unlike ``torch.func.grad`` it takes code that keeps buffers, checkpoints, or uses
    any ``autograd.Function``, wherever no other transform is around it; and what torch
    differentiates wrongly a second time is right.

    Args:
        f: From tensors in pytrees to a real scalar.
        argnums: The argument to differentiate in, or several.
        has_aux: Whether f returns a pair ``(value, aux)``.

    Returns:
        A function of the same arguments that gives the gradient, in the structure of
        the argument (a tuple for several); with has_aux a pair ``(gradient, aux)``.

    Raises:
        DefinitionError: f returns no scalar, or the argument has no floating tensor.

    Example:
        >>> gt.grad(gt.grad(torch.sin))(torch.tensor(0.5))
        tensor(-0.4794)
    """
    both = value_and_grad(f, argnums, has_aux=has_aux)

    @_named("gradient", f)
    def gradient(*args: Any, **kwargs: Any) -> Any:
        value, found = both(*args, **kwargs)
        return (found, value[1]) if has_aux else found

    return gradient


def value_and_grad(
    f: Function[P], argnums: int | tuple[int, ...] = 0, *, has_aux: bool = False
) -> Callable[P, tuple[Any, Any]]:
    """Return the function that computes a scalar function and its gradient.

    Args:
        f: From tensors in pytrees to a real scalar.
        argnums: The argument to differentiate in, or several.
        has_aux: Whether f returns a pair ``(value, aux)``.

    Returns:
        A function of the same arguments that gives ``(value, gradient)``, with has_aux
        ``((value, aux), gradient)``. (``torch.func.grad_and_value`` has the gradient
        first.)

    Raises:
        DefinitionError: f returns no scalar, or the argument has no floating tensor.

    Example:
        >>> gt.value_and_grad(lambda x: (x**2).sum())(torch.tensor([1.0, 2.0]))
        (tensor(5.), tensor([2., 4.]))
    """

    @_named("value and gradient", f)
    def value_and_gradient(*args: Any, **kwargs: Any) -> Any:
        asked = Primals(args, argnums, "grad")
        flat = asked.flat(functools.partial(f, **kwargs), has_aux=has_aux)
        pull = Pullback(flat.scalar_as_tuple, asked.leaves)
        (value,) = pull.outputs
        found = pull([torch.ones_like(value)], is_last=True)
        return flat.with_aux(flat.output([value]), pull.aux), asked.tree(found)

    return value_and_gradient


def jacrev(
    f: Function[P],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Function[P]:
    """Return the function that computes a Jacobian by reverse mode.

    It is ``torch.func.jacrev``, and right where that is differentiated again.

    Args:
        f: From tensors in pytrees to tensors in a pytree.
        argnums: The argument to differentiate in, or several.
        has_aux: Whether f returns a pair ``(output, aux)``.
        chunk_size: How many rows to compute at a time; None: all at once.

    Returns:
        A function of the same arguments that gives, for each tensor of the output, the
        structure of the argument with tensors of shape ``(*output, *input)``.

    Example:
        >>> gt.jacrev(lambda x: x**2)(torch.tensor([1.0, 2.0]))
        tensor([[2., 0.],
                [0., 4.]])
    """

    @_named("jacobian", f)
    def reverse(*args: Any, **kwargs: Any) -> Any:
        jacobian = torch.func.jacrev(
            _given(f, kwargs),
            argnums,
            has_aux=has_aux,
            chunk_size=chunk_size,
        )
        with within_transforms():
            return jacobian(*args)

    return reverse


def jacfwd(
    f: Function[P],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    randomness: str = "error",
) -> Function[P]:
    """Return the function that computes a Jacobian by forward mode.

    It is ``torch.func.jacfwd``, except where the result is differentiated in its turn
    and where an operator has no forward mode: there :func:`jacrev` computes the same.

    Args:
        f: From tensors in pytrees to tensors in a pytree.
        argnums: The argument to differentiate in, or several.
        has_aux: Whether f returns a pair ``(output, aux)``.
        randomness: What random operators do, see ``torch.func.vmap``.

    Returns:
        A function of the same arguments that gives the Jacobian, as :func:`jacrev`.

    Example:
        >>> gt.jacfwd(lambda x: x**2)(torch.tensor([1.0, 2.0]))
        tensor([[2., 0.],
                [0., 4.]])
    """
    by_reverse = jacrev(f, argnums, has_aux=has_aux)

    @_named("jacobian", f)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if is_under_way(_tensors((args, kwargs))):
            return by_reverse(*args, **kwargs)
        by_forward = torch.func.jacfwd(
            _given(f, kwargs),
            argnums,
            has_aux=has_aux,
            randomness=randomness,
        )
        try:
            with in_forward_mode():
                found = by_forward(*args)
        except RuntimeError as error:
            if not has_no_forward_mode(error):
                raise
            return by_reverse(*args, **kwargs)
        # Of what f captures: a derivative in that would be reverse over forward.
        goes_on = any(x.requires_grad for x in _tensors(found))
        return by_reverse(*args, **kwargs) if goes_on else found

    return forward


def hessian(
    f: Function[P], argnums: int | tuple[int, ...] = 0, *, has_aux: bool = False
) -> Function[P]:
    """Return the function that computes a Hessian, by reverse over reverse.

    ``torch.func.hessian`` goes forward over reverse, which is silently wrong for
    ``layer_norm`` and others.

    Args:
        f: From tensors in pytrees to a real scalar, or several.
        argnums: The argument to differentiate in, or several.
        has_aux: Whether f returns a pair ``(value, aux)``.

    Returns:
        A function of the same arguments that gives the Hessian as pytrees in pytrees,
        with tensors of shape ``(*output, *input, *input)``; with has_aux a pair
        ``(hessian, aux)``.

    Example:
        >>> gt.hessian(lambda x: (x**3).sum())(torch.tensor([1.0, 2.0]))
        tensor([[ 6.,  0.],
                [ 0., 12.]])
    """

    @_named("hessian", f)
    def reverse_over_reverse(*args: Any, **kwargs: Any) -> Any:
        rows = torch.func.jacrev(_given(f, kwargs), argnums, has_aux=has_aux)
        matrix = torch.func.jacrev(rows, argnums, has_aux=has_aux)
        with within_transforms():
            return matrix(*args)

    return reverse_over_reverse


def _given(f: Function[...], kwargs: dict[str, Any]) -> Function[...]:
    """Return a function with its keywords; Dynamo cannot wrap a partial one."""
    return functools.partial(f, **kwargs) if kwargs else f


def _named(what: str, f: Function[...]) -> Callable[[Function[P]], Function[P]]:
    """Give a function the documentation of the one that it is made of."""

    def decorate(function: Function[P]) -> Function[P]:
        functools.update_wrapper(function, f)
        function.__qualname__ = f"{what} of {getattr(f, '__qualname__', f)}"
        return function

    return decorate


def _tensors(tree: Any) -> Sequence[torch.Tensor]:
    return [x for x in trees.flatten(tree)[0] if isinstance(x, torch.Tensor)]
