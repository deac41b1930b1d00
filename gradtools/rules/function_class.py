"""A ``torch.autograd.Function`` class taken apart, and why one cannot be lifted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable as _once_differentiable

from gradtools import torch_compat, trees
from gradtools.errors import (
    DefinitionError,
    ForwardContractError,
    TransformError,
    Violation,
)
from gradtools.rules.rule import place

__all__ = [
    "FunctionParts",
    "blamed_on_a_transform",
    "refuse_needs_inside",
    "refuse_nested",
    "refuse_no_function",
]


class FunctionParts(NamedTuple):
    """The functions of a class, apart; None for what it does not state.

    They stand in closures one by one: there torch.compile, and whoever looks for what
    they capture, will find them.
    """

    function: type[Function]
    forward: Callable[..., Any]
    setup_context: Callable[..., Any] | None
    backward: Callable[..., Any] | None
    jvp: Callable[..., Any] | None
    vmap: Callable[..., Any] | None
    is_once_differentiable: bool

    @classmethod
    def of(cls, function: type[Function]) -> FunctionParts:
        """Take a class apart."""
        backward = _stated(function.backward) or _stated(function.vjp)
        once = False
        while backward is not None and _is_once_differentiable(backward):
            # Without its no_grad: forward mode transposes the code underneath.
            backward, once = backward.__wrapped__, True
        below = backward
        while below is not None:
            once = once or _is_once_differentiable(below)
            below = getattr(below, "__wrapped__", None)
        return cls(
            function,
            function.forward,
            _stated(function.setup_context),
            backward,
            _stated(function.jvp),
            _stated(function.vmap),
            once,
        )

    @property
    def where(self) -> str:
        """Name and place of the class, for messages."""
        return f"{self.function.__name__} ({place(self.forward)})"

    def signature(self) -> inspect.Signature:
        """Return the arguments of ``apply``: those of forward, by position."""
        try:
            found = list(inspect.signature(self.forward).parameters.values())
        except (TypeError, ValueError):
            found = [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)]
        if self.setup_context is None and found and found[0].kind in _BY_POSITION:
            del found[0]
        return inspect.Signature(
            [
                # fwd gets a keyword of the name "needs".
                p.replace(
                    name="needs_" if p.name == "needs" else p.name, annotation=p.empty
                )
                for p in found
                if p.kind in (*_BY_POSITION, p.VAR_POSITIONAL)
            ]
        )


_BY_POSITION = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


def _stated(method: Any) -> Any:
    """Return a method of a class; None if it is the one that torch's class has."""
    return None if method in _UNSTATED else method


_UNSTATED = (
    Function.forward, Function.setup_context, Function.backward, Function.vjp,
    Function.jvp, Function.vmap,
)  # fmt: skip


def _is_once_differentiable(backward: Any) -> bool:
    return getattr(backward, "__code__", None) is _ONCE_CODE


_ONCE_CODE = _once_differentiable(lambda ctx: None).__code__


def refuse_no_function(function: Any) -> None:
    """Raise for what is no Function class, or one of another kind."""
    of_class = getattr(function, "__self__", None)
    if isinstance(of_class, type) and issubclass(of_class, Function):
        raise DefinitionError(
            f"lift takes a Function class, and got {of_class.__name__}.apply",
            fix=f"Hand over the class: lift({of_class.__name__}).",
        )
    if not (isinstance(function, type) and issubclass(function, Function)):
        raise DefinitionError(
            f"lift takes a torch.autograd.Function class, and got {function!r}",
            fix="Use custom_vjp for a function, and lift for a class with forward and "
            "backward.",
        )
    if hasattr(function, "forward_extended"):
        raise DefinitionError(
            f"{function.__name__} is a NestedIOFunction, whose forward and backward "
            "are called in another way",
            fix="Derive it from torch.autograd.Function, or use custom_vjp: it takes "
            "pytrees.",
        )
    if _stated(function.forward) is None:
        raise DefinitionError(
            f"{function.__name__} has no forward",
            fix="State forward as a staticmethod of the class.",
        )


def refuse_nested(function: type[Function], where: str, out: Any) -> None:
    """Raise for outputs that torch would not look into, and give no gradient."""
    outs = out if isinstance(out, tuple) else (out,)
    for index, value in enumerate(outs):
        if isinstance(value, torch.Tensor) or trees.is_leaf(value):
            continue
        if any(_is_floating(leaf) for leaf in trees.flatten(value)[0]):
            kind = type(value).__name__
            output = f"output[{index}]" if isinstance(out, tuple) else "output"
            raise ForwardContractError(
                f"{function.__name__}: forward returns tensors inside a {kind}, and "
                "autograd gives those no gradient",
                rule=where,
                violations=[
                    Violation(
                        output,
                        "a tensor, or a tuple of tensors",
                        f"a {kind} of tensors",
                    )
                ],
                fix="Return them as one flat tuple.",
            )


def refuse_needs_inside(
    function: type[Function], where: str, names: Sequence[str], needs: Sequence[Any]
) -> None:
    """Raise for arguments inside containers: backward can return nothing for them."""
    violations = [
        Violation(
            f"args.{name}", "a tensor by itself", f"a {type(need).__name__} of tensors"
        )
        for name, need in zip(names, needs, strict=True)
        if not isinstance(need, bool) and any(trees.flatten(need)[0])
    ]
    if violations:
        raise DefinitionError(
            f"{function.__name__}: a tensor that needs a gradient is inside a "
            "container, where a Function gives it none",
            rule=where,
            violations=violations,
            fix="Pass each tensor as an argument of its own, or detach them.",
        )


def blamed_on_a_transform(
    function: type[Function], where: str, values: Sequence[Any], error: Exception
) -> TransformError | None:
    """Say of an error that code cannot take what a transform hands it; else None."""
    if isinstance(error, (DefinitionError, TransformError, ForwardContractError)):
        return None
    if not any(
        isinstance(value, torch.Tensor) and torch_compat.is_wrapped(value)
        for value in values
    ):
        return None
    name, problem = function.__name__, str(error).partition("\n")[0]
    return TransformError(
        f"{name}: forward or backward cannot run on the tensors of a torch.func "
        f"transform: {problem}",
        rule=where,
        fix="Let it run on plain ones, one element of a batch at a time: "
        f'lift({name}, vmap="sequential"). A Function that it applies itself must '
        "support torch.func, or be lifted too.",
    )


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and (
        leaf.is_floating_point() or leaf.is_complex()
    )
