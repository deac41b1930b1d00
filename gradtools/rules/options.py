"""What the decorators may be told: a function, and options that mean something."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_args

import torch

from gradtools.errors import DefinitionError
from gradtools.rules.rule import Contract, VmapMode

__all__ = ["name_of", "refuse_options"]

_MODES = get_args(VmapMode)
_OPAQUE_MODES = tuple(mode for mode in _MODES if mode != "auto")


def _are_dtypes(value: Any) -> bool:
    values = (value,) if isinstance(value, torch.dtype) else value
    return isinstance(values, (tuple, list)) and all(
        isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)
        for dtype in values
    )


_OPTIONS: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "vmap": (
        lambda value: value in _MODES,
        f"none of {', '.join(map(repr, _MODES))}",
        'Leave it out ("auto"), or use "sequential" for code that torch cannot see.',
    ),
    "contract": (
        lambda value: isinstance(value, Contract),
        "no contract",
        "Use Exact(), Surrogate(reference=...) or Approximate(rel=...).",
    ),
    "once_differentiable": (
        lambda value: isinstance(value, bool),
        "no bool",
        "Use True where bwd is not differentiable, or leave it out.",
    ),
    "materialize_grads": (
        lambda value: isinstance(value, bool),
        "no bool",
        "Use False to get None for the cotangent of an unused output.",
    ),
    "autocast": (
        lambda value: (
            value is None
            or (isinstance(value, torch.dtype) and value.is_floating_point)
        ),
        "no floating dtype",
        "Use a dtype such as torch.float32, or leave it out.",
    ),
    "probe": (
        lambda value: value is None or callable(value),
        "no function",
        "Use a function without parameters that returns the tuple of arguments.",
    ),
    "external_vmap": (
        lambda value: value in _OPAQUE_MODES,
        f"none of {', '.join(map(repr, _OPAQUE_MODES))}",
        'Use "sequential": torch cannot vectorize what it cannot see.',
    ),
    "out": (
        callable,
        "no function",
        "Use a function of the same arguments that returns empty tensors like the "
        "output: out=lambda x: torch.empty_like(x).",
    ),
    "numpy": (
        lambda value: isinstance(value, bool),
        "no bool",
        "Use True for a function of arrays, or leave it out for one of tensors.",
    ),
    "dtypes": (
        _are_dtypes,
        "no floating dtype, and no tuple of them",
        "Use torch.float32, say, or leave it out for a kernel that takes any.",
    ),
    "allow_nan": (
        lambda value: isinstance(value, bool),
        "no bool",
        "Use True where NaN is an answer, or leave it out.",
    ),
    "gradient": (
        lambda value: value is None or callable(value) or value == "finite-differences",
        'no function, nor "finite-differences"',
        "Use a function gradient(cotangent, *args), or state the rule with def_bwd.",
    ),
}


def refuse_options(**options: Any) -> None:
    """Raise for an option of a decorator that means nothing."""
    for name, value in options.items():
        fits, problem, fix = _OPTIONS[name]
        if not fits(value):
            option = name.removeprefix("external_")
            raise DefinitionError(
                f"the option {option}={value!r} is {problem}", fix=fix
            )


def name_of(fun: Any) -> str:
    """Return the name that a rule takes from its function."""
    if isinstance(fun, (staticmethod, classmethod)):
        kind = type(fun).__name__
        raise DefinitionError(
            f"a rule is stated of a function, and {fun!r} is a {kind}",
            fix=f"Put @{kind} on the outside, above the rule's decorator.",
        )
    if not callable(fun):
        raise DefinitionError(
            f"a rule is stated of a function, and {fun!r} is none",
            fix="Decorate the function, or call the decorator with options only.",
        )
    while isinstance(fun, functools.partial):
        fun = fun.func
    return getattr(fun, "__name__", type(fun).__name__)
