"""external: a kernel, a C function or a simulator as a function with a rule."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec, TypeVar, cast

import numpy as np
import torch

from gradtools.errors import DefinitionError
from gradtools.lowering.boundary import call, is_exporting, is_tracing
from gradtools.rules.custom_vjp import CustomVJP
from gradtools.rules.differences import bwd_by_differences, jvp_by_differences
from gradtools.rules.kernel import Kernel
from gradtools.rules.options import name_of, refuse_options
from gradtools.rules.repeated import ASTRAY
from gradtools.rules.rule import Approximate, Contract, Exact, Rule
from gradtools.rules.signature import Parameters
from gradtools.torch_compat import dual_level_holder, transforms_active

__all__ = ["External", "external"]

P = ParamSpec("P")
R = TypeVar("R")

OpaqueMode = Literal["sequential", "expand_dims", "broadcast_all"]
DIFFERENCES = "finite-differences"


class External(CustomVJP[P, R]):
    """A function that torch cannot see into; made by :func:`.external`."""

    __slots__ = ("kernel",)

    def __init__(self, rule: Rule, kernel: Kernel) -> None:
        super().__init__(rule)
        self.kernel = kernel
        kernel.operators.rule = weakref.ref(self)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function."""
        if is_tracing():
            return call(self, args, kwargs)
        last = self.kernel.last
        if not (
            last is None
            or kwargs
            or transforms_active()
            or dual_level_holder._current_level >= 0
        ):
            out = last(args, torch.is_grad_enabled())
            if out is not ASTRAY:
                return out
        if is_exporting():
            return self.kernel.exported(args, kwargs)
        return super().__call__(*args, **kwargs)


def external(
    function: Callable[..., Any] | None = None,
    /,
    *,
    out: Callable[..., Any],
    vmap: OpaqueMode = "sequential",
    numpy: bool = False,
    dtypes: torch.dtype | Sequence[torch.dtype] = (),
    allow_nan: bool = False,
    gradient: Callable[..., Any] | Literal["finite-differences"] | None = None,
    contract: Contract | None = None,
    once_differentiable: bool = False,
    materialize_grads: bool = True,
    nondiff_argnums: int | Sequence[int] = (),
    nondiff_argnames: str | Sequence[str] = (),
    probe: Callable[[], Any] | None = None,
) -> Any:
    """Make a function that torch cannot see into one that torch can use.

    A kernel in C, C++, CUDA or Triton, a function of numpy's or scipy's, a simulator:
    it is called with contiguous tensors that have values and no graph, and returns new
    ones. Its gradient is a rule like any other, with the methods of
    :func:`custom_vjp`; under ``torch.compile`` and ``torch.export`` it is an operator
    that is not looked into.

    Verified on every call: that the output is what ``out`` says, shares no memory with
    an argument or an earlier output that is in use, and that torch knows of no edit in
    place. Verified on the first call with a kind of arguments (dtypes, numbers of
    dimensions), and on every one under ``gradcheck_policy("always")``: that no argument
    has other values than before, and that NaN does not come of finite numbers.

    Args:
        function: The kernel. Its arguments may be pytrees, numbers and any objects; at
            least one is a tensor. It must not edit them.
        out: Takes the same arguments and returns a tensor, or a tree of them, with the
            output's shapes, dtypes and devices; the values do not matter. In a trace
            its arguments have none.
        vmap: What a batch is to the kernel: ``"sequential"`` one element at a time;
            ``"expand_dims"`` one call with a leading batch dimension, of size 1 where
            an argument is not batched; ``"broadcast_all"`` with one of full size
            everywhere. ``out`` sees the same arguments as the kernel.
        numpy: Hand over arrays, and take arrays back. They share the tensor's memory on
            the CPU, and cannot be written to; from a GPU they are copies.
        dtypes: Of the floating tensors that the kernel takes; any, if left out. Others
            are an error, and the gradient check keeps to these.
        allow_nan: NaN is an answer.
        gradient: ``gradient(cotangent, *args)``, another external, say, which returns
            what a bwd returns; or ``"finite-differences"``: central differences, two
            runs for every number in the arguments, and two per argument for a tangent.
            Left out: state it with ``def_bwd`` or ``defvjp``.
        contract: What the gradient claims to be; ``Exact()``, or for differences
            ``Approximate()``.
        once_differentiable: See :func:`custom_vjp`.
        materialize_grads: Likewise.
        nondiff_argnums: Likewise.
        nondiff_argnames: Likewise.
        probe: Likewise.

    Returns:
        The function, with the methods of :class:`.CustomVJP`; or, without a function, a
        decorator.

    Raises:
        DefinitionError: An option has a value that it does not know.

    Example:
        >>> import numpy as np
        >>> @gt.external(out=torch.empty_like, numpy=True)
        ... def log1p(x):
        ...     return np.log1p(x)
        >>> @log1p.def_bwd
        ... def _(residuals, g):
        ...     ((x,), output) = residuals
        ...     return g / (1 + x)
        >>> x = torch.tensor([0.0, 1.0])
        >>> torch.func.vmap(torch.func.grad(log1p))(x)
        tensor([1.0000, 0.5000])
    """
    refuse_options(
        out=out,
        external_vmap=vmap,
        numpy=numpy,
        dtypes=dtypes,
        allow_nan=allow_nan,
        gradient=gradient,
        once_differentiable=once_differentiable,
        materialize_grads=materialize_grads,
        probe=probe,
    )
    by_differences = gradient == DIFFERENCES
    if contract is None:
        contract = Approximate() if by_differences else Exact()
    refuse_options(contract=contract)

    def state(function: Callable[..., Any]) -> External[..., Any]:
        name = name_of(function)
        if isinstance(function, np.ufunc):  # its keywords do not go together
            function = _by_position(function)
        kernel = Kernel(
            name,
            function,
            out,
            numpy=numpy,
            dtypes=(dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes),
            allow_nan=allow_nan,
        )
        fun = called(function, kernel)
        rule = Rule(
            name=name,
            fun=fun,
            parameters=Parameters(fun, nondiff_argnums, nondiff_argnames),
            contract=contract,
            vmap=vmap,
            once_differentiable=once_differentiable or by_differences,
            materialize_grads=materialize_grads,
            probe=probe,
            is_opaque=True,
        )
        made = External(rule, kernel)
        if by_differences:
            state = {"vmap": vmap, "once_differentiable": True}
            made.def_bwd(bwd_by_differences(kernel, external, **state))
            made.def_jvp(jvp_by_differences(made, external, **state))
        elif gradient is not None:
            made.def_bwd(_bwd_of(rule, cast("Callable[..., Any]", gradient)))
        return made

    return state if function is None else state(function)


def called(function: Callable[..., Any], kernel: Kernel) -> Callable[..., Any]:
    """Return the function with a kernel's care around it.

    What it captures is looked for where a rule is called: in ``function``, and nowhere
    else, for ``run`` is not the user's.
    """

    def run(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return kernel(args, kwargs)

    def fun(*args: Any, **kwargs: Any) -> Any:
        return run(function, args, kwargs)

    return functools.wraps(function)(fun)


def _by_position(ufunc: Callable[..., Any]) -> Callable[..., Any]:
    """Return a ufunc as a function of its inputs alone."""

    def call(*args: Any) -> Any:
        return ufunc(*args)

    call.__name__ = ufunc.__name__
    return call


def _bwd_of(rule: Rule, gradient: Callable[..., Any]) -> Callable[..., Any]:
    """Return the bwd that a ``gradient=`` stands for."""
    if rule.parameters.nondiff:
        raise DefinitionError(
            f"{rule.name}: gradient= takes all arguments, and some are nondiff",
            rule=rule.where,
            fix="Leave out nondiff_argnums and nondiff_argnames, or use def_bwd.",
        )

    def bwd(residuals: Any, cotangent: Any) -> Any:
        entries, _ = residuals
        return rule.parameters.call(functools.partial(gradient, cotangent), entries)

    return functools.wraps(gradient)(bwd)
