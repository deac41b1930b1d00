"""The functions of a rule, made of the methods of a Function class.

Each runs one of the methods on a :class:`.Context`. The residuals are what the context
keeps: ``(saved, saved for jvp, attributes, arguments of need, outputs)``.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradtools import torch_compat
from gradtools.errors import DefinitionError
from gradtools.lowering.boundary import is_tracing
from gradtools.rules.function_class import (
    FunctionParts,
    blamed_on_a_transform,
    refuse_needs_inside,
    refuse_nested,
)
from gradtools.rules.marked_inputs import Aliases, answered, marked
from gradtools.rules.marked_outputs import Bits
from gradtools.rules.recorded_context import (
    Context,
    Outputs,
    TracedContext,
    kept,
    restored,
)
from gradtools.rules.sharing import (
    bared,
    exchanged,
    shared_attributes,
)

__all__ = ["make_bwd", "make_fun", "make_fwd", "make_jvp"]

Run = Callable[[Context, tuple[Any, ...]], tuple[Any, Aliases]]
_KIND = inspect.Parameter


def _runner(parts: FunctionParts, *, edits: bool) -> Run:
    """Return what runs forward on a context, and looks at what it did."""
    # Apart: what stands in a closure is looked through for what the class captures.
    function, where = parts.function, parts.where
    forward, setup_context = parts.forward, parts.setup_context

    def run(context: Context, args: tuple[Any, ...]) -> tuple[Any, Aliases]:
        given, aliases = bared(_copied(args) if edits else args), Aliases()
        answers: Any = contextlib.nullcontext()
        if not is_tracing():  # Dynamo's way has the tensors that torch would hand over
            given, aliases = marked(given, context.needs_input_grad)
            answers = answered(given, context.needs_input_grad)
        try:
            with exchanged(args, given), answers:
                if setup_context is None:
                    out = forward(context, *given)
                else:
                    out = forward(*given)
                    setup_context(context, given, out)
        except (RuntimeError, TypeError) as error:
            blamed = blamed_on_a_transform(function, where, args, error)
            if blamed is None:
                raise
            raise blamed from error
        if isinstance(out, tuple) and type(out) is not tuple:
            out = tuple(out)
        if context.dirty_tensors and not edits:
            raise _dirty(function, where)
        refuse_nested(function, where, out)
        if aliases:
            out = aliases.undone(out)
            context.non_differentiable = aliases.undone(context.non_differentiable)
        return out, aliases

    run.__module__ = parts.function.__module__
    return run


def _context(function: type, flags: tuple[bool, ...]) -> Context:
    return TracedContext(function, flags) if is_tracing() else Context(function, flags)


def _dirty(function: type, where: str) -> DefinitionError:
    name = function.__name__
    return DefinitionError(
        f"{name}: forward changes an argument in place (mark_dirty), which a rule must "
        "not",
        rule=where,
        fix=f"Let it work on copies: lift({name}, edits_in_place=True); the argument "
        "then stays as it was.",
    )


def make_fun(parts: FunctionParts, *, edits: bool) -> Callable[..., Any]:
    """Return the primal: forward on a context that is thrown away."""
    run, function = _runner(parts, edits=edits), parts.function
    signature = parts.signature()
    defaults = {
        name: p.default
        for name, p in signature.parameters.items()
        if p.kind is not p.VAR_POSITIONAL
    }

    def fun(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) < len(defaults):
            args = _bound(function.__name__, defaults, args, kwargs)
        context = _context(function, (False,) * len(args))
        out, _ = run(context, args)
        return Bits.hide(out, context.non_differentiable)

    return _named(fun, parts, parts.forward, signature)


def _bound(
    name: str, defaults: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Return the arguments of forward by position, defaults applied."""
    rest = list(defaults)[len(args) :]
    unknown = [key for key in kwargs if key not in rest]
    if unknown:
        raise TypeError(f"{name}() got {unknown} by name")
    values = [kwargs.get(key, defaults[key]) for key in rest]
    missing = [
        key for key, value in zip(rest, values, strict=True) if value is _KIND.empty
    ]
    if missing:
        raise TypeError(f"{name}() is missing {missing}")
    return (*args, *values)


def make_fwd(
    parts: FunctionParts, nondiff: Sequence[int], *, edits: bool
) -> Callable[..., Any]:
    """Return fwd: forward, and what its context keeps."""
    run, function, where = _runner(parts, edits=edits), parts.function, parts.where
    moving = parts.jvp is not None
    signature = parts.signature()
    kinds = signature.parameters.items()
    named = [name for name, p in kinds if p.kind is not p.VAR_POSITIONAL]

    def fwd(*args: Any, needs: Any) -> Any:
        if not all(isinstance(need, bool) for need in needs):
            rest = (f"args[{index}]" for index in range(len(needs) - len(named)))
            refuse_needs_inside(function, where, [*named, *rest], needs)
        context = _context(function, _flags(needs, nondiff))
        out, aliases = run(context, args)
        outputs = Outputs.of(context, out)
        saved, for_jvp, attributes = kept(context, args, aliases, moving=moving)
        used: dict[int, Any] = {}
        if not is_tracing():  # Dynamo's way is for first derivatives
            attributes, used = shared_attributes(attributes, args, aliases)
        out = Bits.hide(out, context.non_differentiable)
        return out, (saved, for_jvp, attributes, used, outputs)

    parameters = [*signature.parameters.values(), _KIND("needs", _KIND.KEYWORD_ONLY)]
    return _named(fwd, parts, parts.forward, inspect.Signature(parameters))


def make_bwd(
    parts: FunctionParts, nondiff: Sequence[int], *, edits: bool
) -> Callable[..., Any]:
    """Return bwd: backward, on a context as forward left it."""
    backward: Any = parts.backward
    function, where = parts.function, parts.where

    def bwd(*given: Any, needs: Any) -> Any:
        (saved, _, attributes, used, outputs), cotangent = given[-2:]
        if used:
            saved, used = _wanting_gradients(saved, used, needs)
        sharing = tuple(attributes.values())
        # No more than forward knew of, which a check of other arguments may ask for.
        flags = zip(_flags(needs, nondiff), outputs.wanted, strict=True)
        context = _context(function, tuple([now and then for now, then in flags]))
        restored(context, saved, dict(zip(attributes, bared(sharing), strict=True)))
        cotangents = outputs.cotangents(cotangent)
        if edits:
            context.saved_tensors = _copied(context.saved_tensors)
            cotangents = _copied(cotangents)
        try:
            with exchanged(sharing, used):
                returned = _without_autocast(cotangents, backward, context)
        except (RuntimeError, TypeError) as error:
            blamed = blamed_on_a_transform(
                function, where, (*saved, *cotangents), error
            )
            if blamed is None:
                raise
            raise blamed from error
        returned = _fitted(returned, needs)
        if nondiff and len(returned) == len(needs):
            return tuple(g for i, g in enumerate(returned) if i not in nondiff)
        return returned

    parameters = [
        _KIND("given", _KIND.VAR_POSITIONAL),
        _KIND("needs", _KIND.KEYWORD_ONLY),
    ]
    return _named(bwd, parts, backward, inspect.Signature(parameters))


def make_jvp(
    parts: FunctionParts, nondiff: Sequence[int], *, edits: bool
) -> Callable[..., Any]:
    """Return the jvp rule: jvp on a context as forward left it."""
    jvp: Any = parts.jvp
    function = parts.function
    run = _runner(parts, edits=edits)
    has_bwd = parts.backward is not None

    def push(*given: Any) -> Any:
        end = len(nondiff)
        front, (primals, tangents, *recorded) = given[:end], given[end:]
        if nondiff:
            primals = _merged(primals, nondiff, front)
            tangents = _merged(tangents, nondiff, [None] * len(front))
        flags = [isinstance(tangent, torch.Tensor) for tangent in tangents]
        context = _context(function, _flags(flags, nondiff))
        sharing: tuple[Any, ...] = ()
        used: Any = ()
        if has_bwd:  # forward has run, perhaps where torch.func could not follow
            out, (_, saved, attributes, used, _) = recorded
            sharing = tuple(attributes.values())
            restored(context, saved, dict(zip(attributes, bared(sharing), strict=True)))
        else:
            out, aliases = run(context, tuple(primals))
            out = Bits.hide(out, context.non_differentiable)
            context.saved_tensors = aliases.undone(context.saved_for_forward)
        with exchanged(sharing, used):
            moved = jvp(context, *tangents)
        return out, _like_output(out, moved)

    parameters = [_KIND("given", _KIND.VAR_POSITIONAL)]
    return _named(push, parts, jvp, inspect.Signature(parameters))


def _named(
    made: Any, parts: FunctionParts, original: Any, signature: inspect.Signature
) -> Any:
    """Have a function pass for the method that it calls."""
    function = parts.function
    made.__name__, made.__qualname__ = function.__name__, function.__qualname__
    made.__module__, made.__doc__ = function.__module__, function.__doc__
    made.__wrapped__ = original
    made.__signature__ = signature
    return made


def _flags(needs: Sequence[Any], nondiff: Sequence[int]) -> tuple[bool, ...]:
    """Return ``needs_input_grad``: torch does not look into containers."""
    return tuple(
        need is True and index not in nondiff for index, need in enumerate(needs)
    )


def _merged(values: Sequence[Any], places: Sequence[int], others: Any) -> list[Any]:
    merged = list(values)
    for index, other in zip(places, others, strict=True):
        merged.insert(index, other)
    return merged


def _copied(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in values)


def _wanting_gradients(
    saved: Sequence[Any], used: dict[int, Any], needs: Sequence[Any]
) -> tuple[Sequence[Any], dict[int, Any]]:
    """Have shared parameters require a gradient, as they do where the class runs.

    backward may ask autograd for it; in a check the arguments are bare.
    """
    if torch.is_grad_enabled() or torch_compat.transforms_active():
        return saved, used
    fresh = {
        id(tensor): tensor.detach().requires_grad_()
        for place, tensor in used.items()
        if place >= 0 and needs[place] is True and not tensor.requires_grad
    }
    return (
        [fresh.get(id(tensor), tensor) for tensor in saved],
        {place: fresh.get(id(tensor), tensor) for place, tensor in used.items()},
    )


def _without_autocast(
    cotangents: Sequence[Any], backward: Any, context: Context
) -> Any:
    """Run backward as autograd would; ``custom_bwd`` says where it wants autocast."""
    for device in {g.device.type for g in cotangents if isinstance(g, torch.Tensor)}:
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return _without_autocast(cotangents, backward, context)
    return backward(context, *cotangents)


def _fitted(returned: Any, needs: Sequence[Any]) -> tuple[Any, ...]:
    """Return one gradient per argument where torch would take what backward returned.

    More may come if it is None; less, if it is for arguments that need none: defaults.
    """
    values: tuple[Any, ...] = returned if isinstance(returned, tuple) else (returned,)
    if all(value is None for value in values[len(needs) :]):
        values = values[: len(needs)]
    missing = needs[len(values) :]
    if missing and not any(need is True for need in missing):
        values = (*values, *[None] * len(missing))
    return values


def _like_output(out: Any, moved: Any) -> Any:
    """Return the tangents that jvp gave, None for an output that can have none."""
    outs = out if isinstance(out, tuple) else (out,)
    given = moved if isinstance(moved, tuple) else (moved,)
    given = (*given, *[None] * (len(outs) - len(given)))
    tangents = tuple(
        tangent
        if isinstance(value, torch.Tensor)
        and (value.is_floating_point() or value.is_complex())
        else None
        for value, tangent in zip(outs, given, strict=False)
    )
    return tangents if isinstance(out, tuple) else tangents[0]
