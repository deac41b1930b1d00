"""lift: an existing ``autograd.Function`` class becomes a rule.

The class is not changed and not called through ``apply``: its own forward and backward
run with a :class:`.Context`, whose content becomes the residuals of a rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import Function

from gradtools.errors import DefinitionError
from gradtools.lowering.boundary import is_tracing
from gradtools.rules.custom_vjp import CustomVJP
from gradtools.rules.function_class import FunctionParts, refuse_no_function
from gradtools.rules.lifted_functions import make_bwd, make_fun, make_fwd, make_jvp
from gradtools.rules.marked_outputs import Bits
from gradtools.rules.options import refuse_options
from gradtools.rules.rule import Contract, Exact, Rule, VmapMode, place
from gradtools.rules.sharing import shared_arguments
from gradtools.rules.signature import Parameters

__all__ = ["Lifted", "lift"]


class Lifted(CustomVJP[..., Any]):
    """A Function class as a rule; made by :func:`.lift`.

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
        if not is_tracing():
            args = shared_arguments(args)
        return _shown(super().__call__(*args, **kwargs))

    def run_entries(self, entries: Sequence[Any]) -> Any:
        """Call the function with arguments that are bound already."""
        return _shown(super().run_entries(entries))

    def _state(self, **parts: Any) -> None:
        """Replace parts of the rule; a jvp that is given is a usual one."""
        if "jvp" in parts:
            self.rule = dataclasses.replace(self.rule, jvp_takes_residuals=False)
        super()._state(**parts)

    def restated(self, parts: dict[str, Any]) -> Lifted:
        """Replace parts of the rule, and return it."""
        if parts:
            self._state(**parts)
        return self

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


def _shown(out: Any) -> Any:
    """Return what forward returned for what the rule did."""
    if type(out) is tuple and out and type(out[-1]) is Bits:
        return out[-1].undone(out[:-1])
    return out


def _lifted_again(
    function: type[Function], options: dict[str, Any], stated: dict[str, Any]
) -> Lifted:
    """Undo ``Lifted.__reduce__``."""
    return lift(function, **options).restated(stated)


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
    what it puts on ``ctx`` become residuals: an input or output stays one, and what
    else forward computed is differentiated through forward where a second derivative
    asks for it. A ``jvp`` and a ``vmap`` that the class has are used. Like any rule it
    is checked on its first call. Lift once, where the class is known, not on every
    call.

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
        vmap: How forward and backward are vectorized, see :func:`custom_vjp`. By
            default ``"auto"``, and ``"sequential"`` where the class has a ``vmap`` of
            its own: it serves where no gradient is wanted, and says that torch cannot.
        once_differentiable: Second derivatives are an error. By default what the
            decorator of that name on backward says.
        edits_in_place: The class writes into what it is given: arguments in forward,
            saved tensors and cotangents in backward. It gets copies.
        autocast: Under autocast, cast floating arguments to this dtype and run without
            it.
        probe: Returns the arguments to check the rule on, in place of those of a call.

    Returns:
        A callable with the arguments of ``function.apply``, which may be given by name
        as well, and the methods of :class:`.CustomVJP`.

    Raises:
        DefinitionError: It is no Function class, or an option has a value that it does
            not know.

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
    options = {
        "nondiff_argnums": nondiff_argnums,
        "nondiff_argnames": nondiff_argnames,
        "contract": contract,
        "vmap": vmap,
        "once_differentiable": once_differentiable,
        "edits_in_place": edits_in_place,
        "autocast": autocast,
        "probe": probe,
    }
    refuse_no_function(function)
    if not isinstance(edits_in_place, bool):
        raise DefinitionError(
            f"the option edits_in_place={edits_in_place!r} is no bool",
            fix="Use True for a class that writes into what it is given, or leave it "
            "out.",
        )
    parts = FunctionParts.of(function)
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
    fun, has_bwd = make_fun(parts, edits=edits_in_place), parts.backward is not None
    parameters = Parameters(fun, nondiff_argnums, nondiff_argnames)
    given = parts, parameters.nondiff
    rule = Rule(
        name=function.__name__,
        fun=fun,
        parameters=parameters,
        fwd=make_fwd(*given, edits=edits_in_place) if has_bwd else None,
        bwd=make_bwd(*given, edits=edits_in_place) if has_bwd else None,
        jvp=make_jvp(*given, edits=edits_in_place) if parts.jvp else None,
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
    return Lifted(rule, function, options)
