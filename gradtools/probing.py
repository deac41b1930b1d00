"""Whether the running code is a real call or part of a check."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator

__all__ = ["is_checking", "moment", "plainly", "probing"]


class _Moment(threading.local):
    """What a thread is doing: how deep in checks it is, and whether rules count."""

    value = 0
    is_plain = False


moment = _Moment()


def is_checking() -> bool:
    """Return whether the calling code runs inside a check of gradtools.

    A rule is run a few more times when it is first used. Code with a side effect asks
    here, so that a log prints once per real call.

    Example:
        >>> @gt.custom_vjp
        ... def double(x):
        ...     return 2 * x
        >>> @double.def_fwd
        ... def _(x):
        ...     if not gt.is_checking():
        ...         print("called with", tuple(x.shape))
        ...     return 2 * x, ()
        >>> _ = double.def_bwd(lambda residuals, g: 2 * g)
        >>> double(torch.ones(2, requires_grad=True)).sum().backward()
        called with (2,)
    """
    return moment.value > 0


@contextlib.contextmanager
def probing() -> Generator[None]:
    """Mark what runs inside as part of a check."""
    moment.value += 1
    try:
        yield
    finally:
        moment.value -= 1


@contextlib.contextmanager
def plainly() -> Generator[None]:
    """Run functions without the rules inside: their derivatives are not in question."""
    before, moment.is_plain = moment.is_plain, True
    try:
        yield
    finally:
        moment.is_plain = before
