"""Functions that return their argument and change its gradient.

All take a tensor or a pytree of tensors. All but ``stop_gradient`` are rules: they hold
under every transform. Those that are linear in the cotangent have a forward mode too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from gradtools import trees
from gradtools.errors import DefinitionError
from gradtools.lowering.contract import refuse_unlike
from gradtools.rules.custom_vjp import custom_vjp
from gradtools.rules.rule import Surrogate

__all__ = [
    "clip_grad",
    "grad_map",
    "reverse_grad",
    "scale_grad",
    "stop_gradient",
    "straight_through",
]

T = TypeVar("T")


@custom_vjp(contract=Surrogate())
def clip_grad(x: T, min: float | None = None, max: float | None = None) -> T:
    """Return ``x``; clip its gradient to ``[min, max]``, element by element.

    Args:
        x: A tensor or a pytree of tensors.
        min: Lower bound of the gradient.
        max: Upper bound of the gradient.

    Returns:
        ``x``. There is no forward mode: a clip is not linear.

    Raises:
        DefinitionError: No gradient of zero would stay zero: ``min`` is above 0, or
            ``max`` below, or the two are exchanged.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> torch.autograd.grad((gt.clip_grad(x, -1, 1) ** 2).sum(), x)
        (tensor([1., 1.]),)
    """
    return x


@clip_grad.def_fwd
def _(x: Any, min: Any = None, max: Any = None) -> Any:
    if (_is_number(min) and min > 0) or (_is_number(max) and max < 0):
        raise DefinitionError(
            f"clip_grad: there is no 0 between the bounds {min} and {max}, so that no "
            "gradient could vanish",
            fix="Give both bounds: clip_grad(x, -0.1, 0.1).",
        )
    return x, (min, max)


def _is_number(bound: Any) -> bool:
    return isinstance(bound, int | float)


@clip_grad.def_bwd
def _(residuals: Any, g: Any) -> Any:
    low, high = residuals
    if low is None and high is None:
        return g, None, None
    return trees.map_tensors(lambda t: t.clamp(low, high), g), None, None


@custom_vjp(contract=Surrogate())
def scale_grad(x: T, scale: float) -> T:
    """Return ``x``; multiply its gradient by ``scale``.

    Args:
        x: A tensor or a pytree of tensors.
        scale: A number, or a tensor that broadcasts with ``x`` and needs no gradient.

    Returns:
        ``x``.

    Example:
        >>> torch.func.grad(lambda x: gt.scale_grad(x, 0.5))(torch.tensor(3.0))
        tensor(0.5000)
    """
    return x


@scale_grad.def_fwd
def _(x: Any, scale: Any) -> Any:
    return x, scale


@scale_grad.def_bwd
def _(scale: Any, g: Any) -> Any:
    return trees.map_tensors(lambda t: t * scale, g), None


def reverse_grad(x: T) -> T:
    """Return ``x``; negate its gradient (adversarial training, Ganin et al. 2016).

    Args:
        x: A tensor or a pytree of tensors.

    Returns:
        ``x``.

    Example:
        >>> torch.func.grad(gt.reverse_grad)(torch.tensor(3.0))
        tensor(-1.)
    """
    return scale_grad(x, -1.0)


def stop_gradient(x: T) -> T:
    """Return ``x`` as a constant for every kind of derivative.

    Args:
        x: A tensor or a pytree of tensors; anything else in it is handed through.

    Returns:
        ``x``, detached.

    Example:
        >>> torch.func.grad(lambda x: x * gt.stop_gradient(x))(torch.tensor(3.0))
        tensor(3.)
    """
    return trees.map_tensors(torch.Tensor.detach, x)


def straight_through(function: Callable[[T], T]) -> Callable[[T], T]:
    """Return ``function`` with the gradient of the identity (Bengio et al. 2013).

    Args:
        function: Takes and returns a tensor of the same shape and dtype, or a pytree of
            such; ``torch.round``, say.

    Returns:
        The function; its gradient passes as if it had returned its argument. Where a
        gradient is wanted and what ``function`` returns is not like its argument, it
        raises a :class:`ForwardContractError`.

    Example:
        >>> quantize = gt.straight_through(torch.round)
        >>> torch.func.vjp(quantize, torch.tensor(1.4))[1](torch.tensor(1.0))
        (tensor(1.),)
    """

    def fun(x: Any) -> Any:
        return function(x)

    fun.__name__ = f"straight_through_{getattr(function, '__name__', 'function')}"
    rule = custom_vjp(fun, contract=Surrogate())

    def fwd(x: Any) -> Any:
        out = function(x)
        refuse_unlike(rule.rule, "fun", out, x)
        return out, ()

    rule.defvjp(fwd, lambda _, g: (g,))
    return rule


def grad_map(function: Callable[[Any], Any]) -> Callable[[T], T]:
    """Return the identity with ``function`` applied to the gradient.

    Args:
        function: Takes the cotangent (a tensor, or a pytree like the argument) and
            returns one of the same structure, shapes and dtypes.

    Returns:
        The identity. Forward mode exists where ``function`` is linear.

    Example:
        >>> normalized = gt.grad_map(lambda g: g / g.norm())
        >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> torch.autograd.grad((normalized(x) ** 2).sum(), x)
        (tensor([0.6000, 0.8000]),)
    """

    def fun(x: Any) -> Any:
        return x

    fun.__name__ = f"grad_map_{getattr(function, '__name__', 'function')}"
    rule = custom_vjp(fun, contract=Surrogate())
    rule.defvjp(lambda x: (x, ()), lambda _, g: (function(g),))
    return rule
