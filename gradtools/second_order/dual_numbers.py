"""Dual numbers through a run that autograd records: both modes at once.

Tangents are had on the way for what they cost, without a graph of their own, and the
graph of the run is what it is without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from gradtools.second_order.stand_ins import (
    WRONG_IN_FORWARD_MODE,
    is_always,
    stand_in_of,
)

__all__ = ["OneJacobian", "dual"]

Tensor = torch.Tensor


def dual(primal: Tensor, tangent: Tensor) -> Tensor:
    """Return a dual number, without a copy of the tangent where there is a way.

    torch copies a tangent whose storage is larger than that of its primal: a row of a
    block of vectors. A part of a storage can be looked at as a storage.
    """
    size = tangent.nbytes
    if (
        type(tangent) is Tensor
        and tangent.is_contiguous()
        and size < tangent.untyped_storage().nbytes()
        and not (tangent.is_conj() or tangent.is_neg())
    ):
        begin = tangent.storage_offset() * tangent.itemsize
        part = tangent.untyped_storage()[begin : begin + size]
        tangent = tangent.new_empty(0).set_(part, 0, tangent.shape, tangent.stride())
    return forward_ad.make_dual(primal, tangent)


class OneJacobian(TorchFunctionMode):
    """Refuse what forward mode and reverse mode see differently.

    For one derivative of each mode, of one run. What is wrong in a third derivative
    only stays as it is: plain operators in its place would take longer. Tangents come
    out with a graph, since what they are computed with has one. Nobody goes back
    through it, and its residuals are as large as all others: so it is cut.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        options = kwargs or {}
        refused = SEEN_DIFFERENTLY.get(name)
        if refused is not None and refused(*args, **options):
            raise NotImplementedError(f"the forward AD of {name} is another")
        if name in _PRODUCTS and len(args) > 1 and "out" not in options:
            return _product(func, *args, **options)
        stand_in = stand_in_of(func)
        if stand_in is not None and stand_in.order <= 2:
            func = stand_in.function
        out = func(*args, **options)
        if isinstance(out, Tensor):
            return _with_a_bare_tangent(out, name)
        if type(out) is tuple:
            return tuple(
                _with_a_bare_tangent(item, name) if isinstance(item, Tensor) else item
                for item in out
            )
        return out


_PRODUCTS = frozenset(
    {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm"}
    | {f"conv{also}{n}d" for also in ("", "_transpose") for n in (1, 2, 3)}
)
"""Functions that are linear in their first argument, and in the second."""


def _product(
    function: Callable[..., Tensor],
    input: Tensor,  # torch's own names, which are keywords
    weight: Tensor,
    bias: Tensor | None = None,
    *rest: Any,
    **options: Any,
) -> Tensor:
    """Call a function that is linear in its arguments, and move it by the same.

    torch multiplies the zeros that stand for the tangent of an input without one, which
    is what data are, and adds up what the bias could have been part of.
    """

    def product(input: Any, weight: Any, bias: Any) -> Tensor:
        more = (bias, *rest) if rest or bias is not None else ()
        return function(input, weight, *more, **options)

    (x, dx), (w, dw) = forward_ad.unpack_dual(input), forward_ad.unpack_dual(weight)
    b, db = (None, None) if bias is None else forward_ad.unpack_dual(bias)
    if dx is None and dw is None:
        return _with_a_bare_tangent(product(input, weight, bias))
    out = product(x, w, b)
    with torch.no_grad():
        if dw is None:
            tangent = product(dx, w, db)
        else:
            tangent = product(x, dw, db)
            if dx is not None:
                tangent.add_(product(dx, w, None))
    return forward_ad.make_dual(out, tangent)


def _with_a_bare_tangent(out: Tensor, name: str = "") -> Tensor:
    if out.grad_fn is None:
        return out
    primal, tangent = forward_ad.unpack_dual(out)
    if tangent is None or tangent.grad_fn is None:
        return out
    if not tangent._is_view():
        tangent.detach_()
    elif name in _VIEWS_OF_THEIR_OWN:
        return forward_ad.make_dual(primal, tangent.detach())
    return out


# What it returns is a view, and of what nobody else has: it may be replaced.
_VIEWS_OF_THEIR_OWN = frozenset({"multi_head_attention_forward"})
SEEN_DIFFERENTLY: Mapping[str, Callable[..., bool]] = {
    **WRONG_IN_FORWARD_MODE,
    # Tangents flow on where torch.no_grad() stops cotangents,
    "_set_grad_enabled": lambda is_on: not is_on,
    # a hook changes cotangents alone,
    "register_hook": is_always,
    # and dual numbers in a backward are a second derivative.
    "grad": is_always,
    "backward": is_always,
}
