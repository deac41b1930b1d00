"""lift: an existing ``autograd.Function`` class becomes a rule.

The class is not changed and not called through ``apply``: its own forward and backward
run with a :class:`.Context`, whose content becomes the residuals of a rule.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
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
from gradtools.lowering.residuals import Remark
from gradtools.rules.custom_vjp import CustomVJP
from gradtools.rules.options import refuse_options
from gradtools.rules.recorded_context import Context, Outputs, kept, restored
from gradtools.rules.rule import Contract, Exact, Rule, VmapMode, place
from gradtools.rules.signature import Parameters

__all__ = ["Lifted", "lift"]


class Lifted(CustomVJP[..., Any]):
    """A Function class as a rule; made by :func:`lift`.

    Attributes:
        function: The class.
    """

    __slots__ = ("_options", "function")

    def __init__(
        self, rule: Rule, function: type[Function], options: dict[str, Any]
    ) -> None:
        super().__init__(rule)
        self.function = function
        self._options = options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function, as ``function.apply`` would."""
        out = super().__call__(*args, **kwargs)
        if type(out) is tuple and out and type(out[-1]) is Bits:
            return out[-1].undone(out[:-1])
        return out

    def _state(self, **parts: Any) -> None:
        """Replace parts of the rule; a jvp that is given is a usual one."""
        if "jvp" in parts:
            self.rule = dataclasses.replace(self.rule, jvp_takes_residuals=False)
        super()._state(**parts)

    def __set_name__(self, owner: type, name: str) -> None:
        """Stay what it is: in the body of a class it is a function, no method."""

    def __reduce__(self) -> Any:
        made = lift(self.function, **self._options).rule
        stated = {
            role: function
            for role in ("fwd", "bwd", "jvp", "vmap_rule")
            if place(function := getattr(self.rule, role)) != place(getattr(made, role))
        }
        return _lifted_again, (self.function, self._options, stated)


def _lifted_again(
    function: type[Function], options: dict[str, Any], stated: dict[str, Any]
) -> Lifted:
    """Undo ``Lifted.__reduce__``."""
    lifted = lift(function, **options)
    if stated:
        lifted._state(**stated)
    return lifted


def lift(
    function: type[Function],
    /,
    *,
    nondiff_argnums: int | Sequence[int] = (),
    nondiff_argnames: str | Sequence[str] = (),
    contract: Contract = Exact(),  # noqa: B008 (immutable)
    vmap: VmapMode | None = None,
    once_differentiable: bool | None = None,
    edits_in_place: bool = False,
    autocast: torch.dtype | None = None,
    probe: Callable[[], Any] | None = None,
) -> Lifted:
    """Turn an ``autograd.Function`` class into a rule, as it stands.

    The class needs no ``setup_context``, no vmap rule and no ``jvp``. What it saves and
    what it puts on ``ctx`` become residuals: an input or output stays one, whatever else
    forward computed is differentiated through forward where a second derivative asks for
    it. A ``jvp`` and a ``vmap`` that the class has are used. Like any rule it is checked
    on its first call. Lift once, where the class is known, not on every call.

    backward is run afresh each time, on what forward left: what it writes to ``ctx`` is
    gone afterwards. What it returns is summed, cast or dropped as autograd would.

    Args:
        function: The class. Both forms of forward, ``once_differentiable``,
            ``torch.amp.custom_fwd`` and ``custom_bwd`` are understood; an argument that
            is changed in place (``mark_dirty``) is refused.
        nondiff_argnums: Positions of arguments that have no gradient on purpose. One
            that needs a gradient in such a place is an error.
        nondiff_argnames: The same, by name of forward's parameters.
        contract: What backward claims to be: :class:`Exact`, :class:`Surrogate` or
            :class:`Approximate`.
        vmap: How forward and backward are vectorized, see :func:`custom_vjp`. By default
            ``"auto"``, and ``"sequential"`` where the class has a ``vmap`` of its own:
            it serves where no gradient is wanted, and says that torch cannot.
        once_differentiable: Second derivatives are an error. By default what the
            decorator of that name on backward says.
        edits_in_place: The class writes into what it is given: arguments in forward,
            saved tensors and cotangents in backward. It gets copies.
        autocast: Under autocast, cast floating arguments to this dtype and run without
            it.
        probe: Returns the arguments to check the rule on, in place of those of a call.

    Returns:
        A callable with the arguments of ``function.apply``, which may be given by name
        as well, and the methods of :class:`CustomVJP`.

    Raises:
        DefinitionError: It is no Function class, or an option means nothing.

    Example:
        >>> class Cube(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         ctx.square = x * x
        ...         return ctx.square * x
        ...
        ...     @staticmethod
        ...     def backward(ctx, g):
        ...         return 3 * g * ctx.square
        >>> cube = gt.lift(Cube)
        >>> torch.func.hessian(cube)(torch.tensor(2.0))
        tensor(12.)
    """
    given = {
        "nondiff_argnums": nondiff_argnums,
        "nondiff_argnames": nondiff_argnames,
        "contract": contract,
        "vmap": vmap,
        "once_differentiable": once_differentiable,
        "edits_in_place": edits_in_place,
        "autocast": autocast,
        "probe": probe,
    }
    _refuse_no_function(function)
    if not isinstance(edits_in_place, bool):
        raise DefinitionError(
            f"the option edits_in_place={edits_in_place!r} is no bool",
            fix="Use True for a class that writes into what it is given, or leave it "
            "out.",
        )
    parts = _Parts.of(function, edits_in_place)
    if once_differentiable is None:
        once_differentiable = parts.is_once_differentiable
    if vmap is None:
        vmap = "auto" if parts.vmap is None else "sequential"
    refuse_options(
        vmap=vmap,
        contract=contract,
        once_differentiable=once_differentiable,
        autocast=autocast,
        probe=probe,
    )
    fun, has_bwd = _fun(function, parts), parts.backward is not None
    parameters = Parameters(fun, nondiff_argnums, nondiff_argnames)
    nondiff = parameters.nondiff
    rule = Rule(
        name=function.__name__,
        fun=fun,
        parameters=parameters,
        fwd=_fwd(function, parts, nondiff) if has_bwd else None,
        bwd=_bwd(function, parts, nondiff) if has_bwd else None,
        jvp=_jvp(function, parts, nondiff) if parts.jvp is not None else None,
        jvp_takes_residuals=has_bwd and parts.jvp is not None,
        vmap_rule=parts.vmap,
        contract=contract,
        vmap=vmap,
        once_differentiable=once_differentiable,
        materialize_grads=False,
        autocast=autocast,
        probe=probe,
        is_lifted=True,
        definition="a backward, or a jvp, on the class {name}",
    )
    return Lifted(rule, function, given)


def _refuse_no_function(function: Any) -> None:
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
    if _stated(function, function.forward) is None:
        raise DefinitionError(
            f"{function.__name__} has no forward",
            fix="State forward as a staticmethod of the class.",
        )


# What a class states.


class _Parts(NamedTuple):
    """The functions of a class, apart; None for what it does not state.

    They stand in closures one by one: there torch.compile, and whoever looks for what
    they capture, will find them.
    """

    forward: Callable[..., Any]
    setup_context: Callable[..., Any] | None
    backward: Callable[..., Any] | None
    jvp: Callable[..., Any] | None
    vmap: Callable[..., Any] | None
    is_once_differentiable: bool
    edits_in_place: bool

    @classmethod
    def of(cls, function: type[Function], edits_in_place: bool) -> _Parts:
        """Take a class apart."""
        backward = _stated(function, function.backward) or _stated(
            function, function.vjp
        )
        once = False
        while backward is not None and _is_once_differentiable(backward):
            # Without its no_grad: forward mode transposes the code underneath.
            backward, once = backward.__wrapped__, True
        below = backward
        while below is not None:
            once = once or _is_once_differentiable(below)
            below = getattr(below, "__wrapped__", None)
        return cls(
            function.forward,
            _stated(function, function.setup_context),
            backward,
            _stated(function, function.jvp),
            _stated(function, function.vmap),
            once,
            edits_in_place,
        )


def _stated(function: type[Function], method: Any) -> Any:
    """Return a method of a class; None if it is the one that torch's class has."""
    own = getattr(Function, getattr(method, "__name__", ""), None)
    return None if method is own or method in _UNSTATED else method


_UNSTATED = (
    Function.forward, Function.setup_context, Function.backward, Function.vjp,
    Function.jvp, Function.vmap,
)  # fmt: skip


def _is_once_differentiable(backward: Any) -> bool:
    return getattr(backward, "__code__", None) is _ONCE_CODE


_ONCE_CODE = _once_differentiable(lambda ctx: None).__code__


def _signature(parts: _Parts) -> inspect.Signature:
    """Return the arguments of ``apply``: those of forward, by position."""
    try:
        found = list(inspect.signature(parts.forward).parameters.values())
    except (TypeError, ValueError):
        found = [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)]
    if parts.setup_context is None and found[0].kind in _BY_POSITION:
        del found[0]
    return inspect.Signature(
        [
            # fwd gets a keyword of this name.
            p.replace(name="needs_", annotation=p.empty)
            if p.name == "needs"
            else p.replace(annotation=p.empty)
            for p in found
            if p.kind in (*_BY_POSITION, inspect.Parameter.VAR_POSITIONAL)
        ]
    )


_BY_POSITION = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


def _named(
    made: Any, function: type[Function], original: Any, signature: inspect.Signature
) -> Any:
    """Have one of the functions below pass for the method that it calls."""
    made.__name__, made.__qualname__ = function.__name__, function.__qualname__
    made.__module__, made.__doc__ = function.__module__, function.__doc__
    made.__wrapped__ = original
    made.__signature__ = signature
    return made


# The four functions of the rule.


def _runner(function: type[Function], parts: _Parts) -> Callable[..., Any]:
    """Return what runs forward on a context, and looks at what it did."""
    forward, setup_context = parts.forward, parts.setup_context
    edits = parts.edits_in_place

    def run(context: Context, args: tuple[Any, ...]) -> Any:
        if edits:
            args = tuple(_copied(args))
        try:
            if setup_context is None:
                out = forward(context, *args)
            else:
                out = forward(*args)
                setup_context(context, args, out)
        except (RuntimeError, TypeError) as error:
            blamed = _of_a_transform(function, args, error)
            if blamed is None:
                raise
            raise blamed from error
        if isinstance(out, tuple) and type(out) is not tuple:
            out = tuple(out)
        _refuse_dirty(function, parts, context)
        _refuse_nested(function, parts, out)
        return out

    run.__module__ = function.__module__
    return run


def _fun(function: type[Function], parts: _Parts) -> Callable[..., Any]:
    run = _runner(function, parts)
    signature = _signature(parts)
    by_name = {
        name: p.default
        for name, p in signature.parameters.items()
        if p.kind is not p.VAR_POSITIONAL
    }
    names = tuple(by_name)

    def fun(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) < len(names):
            args = _bound(function, names, by_name, args, kwargs)
        context = Context(function, (False,) * len(args))
        out = run(context, args)
        return Bits.hide(out, context)

    return _named(fun, function, parts.forward, signature)


def _bound(
    function: type[Function],
    names: tuple[str, ...],
    defaults: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, ...]:
    """Return the arguments of forward by position, defaults applied."""
    rest = names[len(args) :]
    unknown = [name for name in kwargs if name not in rest]
    values = [kwargs.get(name, defaults[name]) for name in rest]
    missing = [
        name
        for name, value in zip(rest, values, strict=True)
        if value is inspect.Parameter.empty
    ]
    if unknown or missing:
        problem = f"got {unknown} by name" if unknown else f"is missing {missing}"
        raise TypeError(f"{function.__name__}() {problem}")
    return (*args, *values)


def _fwd(
    function: type[Function], parts: _Parts, nondiff: Sequence[int]
) -> Callable[..., Any]:
    run = _runner(function, parts)

    def fwd(*args: Any, needs: Any) -> Any:
        _refuse_needs_inside(function, parts, needs)
        context = Context(function, _flags(needs, nondiff))
        out = run(context, args)
        outputs = Outputs.of(out, context.materialize_grads)
        found = kept(context, args, moving=parts.jvp is not None)
        return Bits.hide(out, context), (*found, outputs)

    signature = _signature(parts)
    needs = inspect.Parameter("needs", inspect.Parameter.KEYWORD_ONLY)
    signature = signature.replace(parameters=[*signature.parameters.values(), needs])
    return _named(fwd, function, parts.forward, signature)


def _bwd(
    function: type[Function], parts: _Parts, nondiff: Sequence[int]
) -> Callable[..., Any]:
    backward: Any = parts.backward
    edits = parts.edits_in_place

    def bwd(*given: Any, needs: Any) -> Any:
        (saved, _, attributes, outputs), cotangent = given[-2:]
        context = restored(Context(function, _flags(needs, nondiff)), saved, attributes)
        cotangents = outputs.cotangents(cotangent)
        if edits:
            context.saved_tensors = tuple(_copied(context.saved_tensors))
            cotangents = _copied(cotangents)
        try:
            returned = _without_autocast(cotangents, backward, context)
        except (RuntimeError, TypeError) as error:
            blamed = _of_a_transform(function, (*saved, *cotangents), error)
            if blamed is None:
                raise
            raise blamed from error
        returned = _fitted(returned, needs)
        if nondiff and len(returned) == len(needs):
            return tuple(g for i, g in enumerate(returned) if i not in nondiff)
        return returned

    kinds = inspect.Parameter
    signature = inspect.Signature(
        [kinds("given", kinds.VAR_POSITIONAL), kinds("needs", kinds.KEYWORD_ONLY)]
    )
    return _named(bwd, function, backward, signature)


def _jvp(
    function: type[Function], parts: _Parts, nondiff: Sequence[int]
) -> Callable[..., Any]:
    jvp: Any = parts.jvp
    run = _runner(function, parts)
    has_bwd = parts.backward is not None

    def push(*given: Any) -> Any:
        end = len(nondiff)
        front, (primals, tangents, *recorded) = given[:end], given[end:]
        if nondiff:
            primals = _merged(primals, nondiff, front)
            tangents = _merged(tangents, nondiff, [None] * len(front))
        flags = [isinstance(tangent, torch.Tensor) for tangent in tangents]
        context = Context(function, _flags(flags, nondiff))
        if has_bwd:  # forward has run, perhaps where torch.func could not follow
            out, (_, saved, attributes, _) = recorded
            restored(context, saved, attributes)
        else:
            out = Bits.hide(run(context, tuple(primals)), context)
            context.saved_tensors = context.saved_for_forward
        return out, _like_output(out, jvp(context, *tangents))

    kinds = inspect.Parameter
    signature = inspect.Signature([kinds("given", kinds.VAR_POSITIONAL)])
    return _named(push, function, jvp, signature)


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


def _copied(values: Sequence[Any]) -> list[Any]:
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in values]


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
    values = returned if isinstance(returned, tuple) else (returned,)
    count = len(needs)
    while len(values) > count and values and values[-1] is None:
        values = values[:-1]
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


# Outputs that have no derivative.


class Bits(Remark):
    """Floating outputs that are marked non-differentiable, travelling as integers.

    A rule's floating outputs all have a derivative. An integer has none, for torch and
    for the check, so such an output crosses as its bits, which costs a view.

    Attributes:
        dtypes: By position of the output: its dtype.
        is_tuple: Forward returned a tuple.
    """

    __slots__ = ("dtypes", "is_tuple")

    def __init__(self, dtypes: dict[int, torch.dtype], is_tuple: bool) -> None:
        self.dtypes = dtypes
        self.is_tuple = is_tuple

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Bits)
            and self.dtypes == other.dtypes
            and self.is_tuple == other.is_tuple
        )

    def __hash__(self) -> int:
        return hash(self.is_tuple)

    @classmethod
    def hide(cls, out: Any, context: Context) -> Any:
        """Return the outputs with such ones among them as integers."""
        marked = context.non_differentiable
        if not marked:
            return out
        outs = out if isinstance(out, tuple) else (out,)
        dtypes = {
            index: value.dtype
            for index, value in enumerate(outs)
            if isinstance(value, torch.Tensor)
            and (value.is_floating_point() or value.is_complex())
            and any(value is tensor for tensor in marked)
        }
        if not dtypes:
            return out
        hidden = [
            _to_bits(value) if index in dtypes else value
            for index, value in enumerate(outs)
        ]
        return (*hidden, cls(dtypes, isinstance(out, tuple)))

    def undone(self, outs: tuple[Any, ...]) -> Any:
        """Return the outputs as forward returned them."""
        shown = tuple(
            _from_bits(value, self.dtypes[index]) if index in self.dtypes else value
            for index, value in enumerate(outs)
        )
        return shown if self.is_tuple else shown[0]


def _to_bits(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.view(_INTEGERS[tensor.dtype.itemsize])


def _from_bits(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_complex:
        return torch.view_as_complex(tensor.view(dtype.to_real()))
    return tensor.view(dtype)


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# What a class cannot be lifted with.


def _refuse_dirty(function: type[Function], parts: _Parts, context: Context) -> None:
    if context.dirty_tensors and not parts.edits_in_place:
        raise DefinitionError(
            f"{function.__name__}: forward changes an argument in place (mark_dirty), "
            "which a rule must not",
            rule=_where(function, parts),
            fix=f"Let it work on copies: lift({function.__name__}, "
            "edits_in_place=True); the argument then stays as it was.",
        )


def _refuse_nested(function: type[Function], parts: _Parts, out: Any) -> None:
    """Raise for outputs that torch would not look into, and give no gradient."""
    outs = out if isinstance(out, tuple) else (out,)
    for index, value in enumerate(outs):
        if isinstance(value, torch.Tensor) or trees.is_leaf(value):
            continue
        if any(_is_floating(leaf) for leaf in trees.flatten(value)[0]):
            raise ForwardContractError(
                f"{function.__name__}: forward returns tensors inside a "
                f"{type(value).__name__}, and autograd gives those no gradient",
                rule=_where(function, parts),
                violations=[
                    Violation(
                        f"output[{index}]" if isinstance(out, tuple) else "output",
                        "a tensor, or a tuple of tensors",
                        f"a {type(value).__name__} of tensors",
                    )
                ],
                fix="Return them as one flat tuple.",
            )


def _refuse_needs_inside(
    function: type[Function], parts: _Parts, needs: Sequence[Any]
) -> None:
    """Raise for arguments inside containers: backward can return nothing for them."""
    names = list(_signature_names(parts, len(needs)))
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
            rule=_where(function, parts),
            violations=violations,
            fix="Pass each tensor as an argument of its own, or detach them.",
        )


def _signature_names(parts: _Parts, count: int) -> Iterator[str]:
    names = [
        p.name
        for p in _signature(parts).parameters.values()
        if p.kind is not p.VAR_POSITIONAL
    ]
    yield from names
    yield from (f"args[{index}]" for index in range(count - len(names)))


def _of_a_transform(
    function: type[Function], values: Sequence[Any], error: Exception
) -> TransformError | None:
    """Say of an error of code that cannot take what a transform hands it."""
    if isinstance(error, (DefinitionError, TransformError, ForwardContractError)):
        return None
    if not any(
        isinstance(value, torch.Tensor) and torch_compat.is_wrapped(value)
        for value in values
    ):
        return None
    problem = str(error).partition("\n")[0]
    return TransformError(
        f"{function.__name__}: forward or backward cannot run on the tensors of a "
        f"torch.func transform: {problem}",
        rule=f"{function.__name__} ({function.__module__})",
        fix=f"Under vmap, run it one element at a time: lift({function.__name__}, "
        'vmap="sequential"); a Function that it applies itself must be lifted too.',
    )


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and (
        leaf.is_floating_point() or leaf.is_complex()
    )


def _where(function: type[Function], parts: _Parts) -> str:
    code = getattr(inspect.unwrap(parts.forward), "__code__", None)
    place = f"{code.co_filename}:{code.co_firstlineno}" if code else function.__module__
    return f"{function.__name__} ({place})"
