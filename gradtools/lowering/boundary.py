"""torch.compile: the only module that knows of it.

Dynamo traces a rule in one of two ways. With no transform active, and a backend that
goes through AOT autograd, it follows a Function into fwd and bwd, guards on all that
they read, and drops nothing: one that was written for the call (:mod:`.traced`), or
else :class:`.Traced`. Where a torch.func transform or a forward-mode level
is active it would drop bwd without a sign; and a backend that runs Dynamo's graph as it
is would differentiate bwd without the residuals. There the rule crosses as one opaque
call (``nonstrict_trace``), and everything happens as in eager mode when AOT autograd,
or the backend, runs that call.

What crosses is tensors and constants. Python numbers that fwd and bwd read from
closures, globals and objects would be baked in, so the traced code reads them too and
Dynamo guards on them: :mod:`.settings`.

Nothing here imports ``torch._dynamo`` (that takes seconds): functions that Dynamo must
treat specially are marked by attribute, and the crossing is made by the first trace
that needs it.
"""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import contextlib
import itertools
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar

import torch

from gradtools import torch_compat
from gradtools.errors import GradtoolsError, TransformError
from gradtools.lowering import luggage
from gradtools.lowering.flat import Plan
from gradtools.lowering.free_variables import follow
from gradtools.lowering.settings import Cells, Settings, settings_read
from gradtools.lowering.stand_ins import Known, Unknown
from gradtools.lowering.trace_time import (
    at_trace_time,
    attempts,
    autocast_here,
    goes_through_aot,
    is_exporting_here,
    is_moving,
    level_is_outside,
    must_cross,
    next_attempt,
    passing,
)
from gradtools.lowering.traced import STATE, Traced
from gradtools.rules.rule import Rule
from gradtools.rules.signature import CallSignature, Parameters, flatten_entries
from gradtools.warning import warn

__all__ = [
    "Crossable",
    "Opaque",
    "call",
    "call_kernel",
    "differentiated_in_export",
    "export_flag_holder",
    "is_exporting",
    "is_tracing",
    "register",
    "unseen",
    "warn_of_export",
    "without_compiling",
]

P = ParamSpec("P")
R = TypeVar("R")

is_tracing: Callable[[], bool] = torch.compiler.is_dynamo_compiling
is_exporting: Callable[[], bool] = torch.compiler.is_exporting
export_flag_holder: Any = torch.compiler
"""Its ``_is_exporting_flag`` says the same; an attribute takes less time."""


def unseen(function: Callable[P, R]) -> Callable[P, R]:
    """Keep Dynamo from compiling a function, and all that it calls, frame by frame.

    After a graph break Dynamo goes on with whatever Python frame comes next: with the
    rooms of gradtools, and with the user's functions in the midst of a check.
    """
    code: Any = function
    _frames.set_code_exec_strategy(code.__code__, _SKIP)
    return function


_C: Any = torch._C
_frames: Any = _C._dynamo.eval_frame
_SKIP = _frames._FrameExecStrategy(_frames._FrameAction.SKIP, _frames._FrameAction.SKIP)


def without_compiling() -> contextlib.AbstractContextManager[Any]:
    """Run compiled functions as they are: the caller may hold Dynamo's lock."""
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


class Crossable(Protocol):
    """What can be called on the other side of the boundary."""

    key: str
    rule: Rule
    cells: Cells
    written: Any

    def run_entries(self, entries: Sequence[Any]) -> Any:
        """Call the rule in eager mode, with bound arguments."""
        ...

    def write_for_trace(
        self,
        entries: tuple[Any, ...],
        wants: Callable[[Any], bool],
        binding: Sequence[str],
        otherwise: Callable[[], None],
    ) -> str:
        """Write code for a call; return its name, or nothing where that cannot be."""
        ...

    def before_trace(
        self,
        entries: tuple[Any, ...] | None,
        wants: Callable[[Any], bool] | None,
        order: int,
    ) -> None:
        """Check the rule on arguments like these, which have no values."""
        ...


class Opaque(Protocol):
    """A function that Dynamo cannot look into, and no derivative is asked of."""

    key: str
    where: str
    parameters: Parameters

    def run_entries(self, entries: Sequence[Any]) -> Any:
        """Call it in eager mode, with bound arguments."""
        ...


_keys = itertools.count()
_registry: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def register(target: Crossable | Opaque) -> str:
    """Return the name by which a rule is found on the other side."""
    key = f"rule {next(_keys)}"
    _registry[key] = target
    return key


_dual = torch_compat.dual_level_holder


def call(target: Crossable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a rule while Dynamo traces."""
    rule = target.rule
    name = "" if _dual._current_level >= 0 else _written()
    if name == "fun":
        return rule.fun(*args, **kwargs)
    if name:
        return getattr(target.written, name)(args, kwargs)
    entries = rule.parameters.bind(args, kwargs)
    leaves, spec = flatten_entries(entries)
    if is_exporting_here():
        if _needs_gradient(leaves):
            warn_of_export(rule.name)
        return rule.parameters.call(rule.fun, entries)
    # Dynamo guards on the level that it reads itself, and compiles anew under another.
    moving = is_moving() or _dual._current_level >= 0
    if moving and level_is_outside():
        _make_crossing()
        return _outside(target, entries)
    if rule.bwd is None or moving or must_cross():
        if rule.bwd is not None or rule.jvp is not None or _needs_gradient(leaves):
            _before_trace(target.key, True)
        return _cross(target, entries, leaves, moving)
    if not _needs_gradient(leaves):
        return rule.parameters.call(rule.fun, entries)
    _before_trace(target.key, False)
    needs = tuple(isinstance(x, torch.Tensor) and x.requires_grad for x in leaves)
    signature = CallSignature(rule.parameters, entries, leaves, spec, needs)
    plan = Plan(rule, signature, STATE, autocast=autocast_here())
    *tensors, outputs = Traced.apply(plan, *leaves)
    return outputs.rebuild(tensors)


def _needs_gradient(leaves: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves
    )


@at_trace_time
def _before_trace(key: str, transformed: bool) -> None:
    """Let the check run on what Dynamo knows of the arguments."""
    known = _known(call)
    try:
        entries = known.stand_in("entries")
    except Unknown:
        entries = None
    _check(_registry[key], entries, None if transformed else known.wants, known)


@at_trace_time
def _written() -> str:
    """Have code written for this call; return the attribute that holds it.

    Returns:
        The attribute; "fun" where no gradient is wanted; nothing where the rule must
        cross, or no code can be written.
    """
    known = _known(call)
    target = known.object("target")
    parameters = target.rule.parameters
    try:
        args, kwargs = known.stand_in("args"), known.stand_in("kwargs")
    except Unknown:
        return ""
    try:
        entries = parameters.bind(args, kwargs)
    except TypeError as error:  # a misspelled keyword, say: Dynamo would not name it
        raise passing(error) from None
    if (
        target.written.is_closed
        or target.rule.bwd is None
        or torch.compiler.is_exporting()
        or torch_compat.forward_ad_active()
        or must_cross()
    ):
        return ""
    leaves = flatten_entries(entries)[0]
    if not (torch.is_grad_enabled() and any(map(known.wants, leaves))):
        return "fun"
    _check(target, entries, known.wants, known)
    places = (f"args[{index}]" for index in range(len(args)))
    by_name = {name: _Place(f"kwargs[{name!r}]") for name in kwargs}
    bound = parameters.bind(tuple(map(_Place, places)), by_name)
    if not all(isinstance(x, (_Place, bool, int, str, type(None))) for x in bound):
        return ""  # a default that has no text
    binding = [x if isinstance(x, _Place) else repr(x) for x in bound]
    return target.write_for_trace(entries, known.wants, binding, _otherwise(target))


def _known(function: Callable[..., Any]) -> Known:
    """Return what Dynamo knows in a function here that it follows."""
    frame: Any = torch_compat.running_trace().output.current_tx
    while frame.f_code is not function.__code__:
        frame = frame.parent
    return Known(frame.symbolic_locals)


class _Place(str):
    """Text for where an argument is found."""


def _otherwise(target: Crossable) -> Callable[[], None]:
    """Return what starts a trace anew, by the general way."""

    @at_trace_time
    def otherwise() -> None:
        from torch._dynamo import exc

        target.written.is_closed = True
        raise exc.UnspecializeRestartAnalysis(
            restart_reason="gradtools: fwd or bwd went otherwise"
        )

    return otherwise


def _check(target: Any, entries: Any, wants: Any, known: Known) -> None:
    """Check a rule; raise what is found in a way that Dynamo hands on."""
    try:
        target.before_trace(entries, wants, torch_compat.order(known.examples))
    except GradtoolsError as error:
        raise passing(error) from None


@at_trace_time
def warn_of_export(name: str) -> None:
    """Say what torch.export leaves of a rule."""
    warn(
        f"torch.export keeps the forward of the rule {name} only: what is exported has "
        "the derivative of its function, not of the rule (pytorch#106388)"
    )


def differentiated_in_export(rule: Rule) -> TransformError:
    """Return the error for what torch fails in, with an assertion of its own."""
    return TransformError(
        f"{rule.name}: torch.export(strict=False) cannot trace a derivative by "
        "torch.func, or by dual numbers, of a rule",
        rule=rule.where,
        fix="Export the function, and take its derivative outside; or trace it with "
        "make_fx.",
    )


# The crossing.


def _cross(
    target: Crossable, entries: Sequence[Any], leaves: Sequence[Any], moving: bool
) -> Any:
    """Call a rule through a call that Dynamo does not look into."""
    _ = {target.key}  # a constant from here on, see below
    _make_crossing()
    skeleton, given, holes = luggage.packed(entries, leaves)
    everything = (target.rule, target.cells, *leaves)
    seen: list[int] = []
    for path, number in _settings(target.key):
        # A number is compared, or Dynamo may make a symbol of it and guard on nothing.
        found = follow(everything, path)
        seen.append(1 if isinstance(found, (int, float)) and found == number else 0)
    moved = True if moving else False  # noqa: SIM210 (a constant to Dynamo)
    return _crossed(target.key, skeleton, given, holes, moved)


def call_kernel(target: Opaque, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function that Dynamo does not look into while it traces."""
    entries = target.parameters.bind(args, kwargs)
    leaves, _ = flatten_entries(entries)
    _ = {target.key}
    _make_crossing()
    _refuse_strict_export(target.key)
    return _crossed(target.key, *luggage.packed(entries, leaves), False)


def _crossed(key: str, *packed: Any) -> Any:
    """Cross, and say what went wrong: Dynamo would call all of it an odd output."""
    out = _crossing(key, *packed, "" + next_attempt())  # "" + : torch guards on none
    _refuse_failed(key)
    return out


@at_trace_time
def _refuse_failed(key: str) -> None:
    """Raise what went wrong on the other side."""
    error = attempts.taken()
    if isinstance(error, GradtoolsError):
        raise passing(error) from error.__cause__
    if error is not None:
        raise passing(_untraceable(_registry[key], error)) from error


def _untraceable(target: Any, error: Exception) -> TransformError:
    """Return the error for what is raised by code that Dynamo does not look into."""
    where = getattr(target, "rule", target).where
    problem = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return TransformError(
        f"{where.split()[0]}: torch.compile cannot trace it: {problem}",
        rule=where,
        fix="In a trace tensors have shapes, dtypes and devices, and no values. Let "
        "code depend on these alone, or call it outside of what is compiled.",
    )


_crossing: Any = None
_outside: Any = None


@at_trace_time
def _make_crossing() -> None:
    """Make the crossing."""
    global _crossing, _outside
    import torch._dynamo

    if _crossing is None:
        _crossing = torch._dynamo.nonstrict_trace(_other_side)
        _outside = torch._dynamo.disable(
            _run_entries,
            reason="gradtools: forward mode around a compiled region loses the rule; "
            "open the level (or call jvp) inside the compiled function",
        )


@at_trace_time
def _refuse_strict_export(key: str) -> None:
    """Raise where torch.export traces by Dynamo, which cannot write the crossing."""
    if torch.compiler.is_exporting():
        where = _registry[key].where
        raise passing(
            TransformError(
                f"{where.split()[0]}: torch.export(strict=True) cannot trace an "
                "external",
                rule=where,
                fix="Export with strict=False, which is the default.",
            )
        )


@at_trace_time
def _settings(key: str) -> Settings:
    """List what the rule's functions read past their arguments."""
    target, objects = _registry[key], _known(_cross).objects("leaves")
    try:
        return settings_read(
            target.rule, target.cells, objects, in_aot=goes_through_aot()
        )
    except GradtoolsError as error:
        raise passing(error) from None


def _other_side(
    key: str,
    skeleton: Any,
    leaves: list[Any],
    holes: list[Any],
    moving: bool,
    attempt: str,
) -> Any:
    """Call the rule as in eager mode."""
    if attempts.is_due(attempt):
        try:
            out = _other_side(key, skeleton, leaves, holes, moving, attempt)
            luggage.refuse_objects(out, _registry[key])
        except Exception as error:
            attempts.fail(error)
            return ()
        return out
    entries = luggage.unpacked(skeleton, leaves, holes)
    with torch_compat.dual_level_announced(moving):
        return _registry[key].run_entries(entries)


def _run_entries(target: Crossable, entries: Sequence[Any]) -> Any:
    return target.run_entries(entries)
