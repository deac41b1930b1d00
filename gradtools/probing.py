"""Whether the running code is a real call or part of a check."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

__all__ = ["is_checking", "is_plain", "plainly", "probing"]


class _Depth(threading.local):
    value = 0
    is_plain = False


_depth = _Depth()


def is_checking() -> bool:
    """Return whether the calling code runs inside a check of gradtools.

    A rule is run a few more times when it is first used. Code with a side effect asks
    here, so that a log prints once per real call::

        @rule.def_fwd
        def _(x):
            if not gt.is_checking():
                print("called with", tuple(x.shape))
            return x * 2, ()
    """
    return _depth.value > 0


@contextlib.contextmanager
def probing() -> Iterator[None]:
    """Mark what runs inside as part of a check."""
    _depth.value += 1
    try:
        yield
    finally:
        _depth.value -= 1


def is_plain() -> bool:
    """Whether rules are to stand aside, so that autograd sees their functions."""
    return _depth.is_plain


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Run functions without the rules inside: their derivatives are not in question."""
    before, _depth.is_plain = _depth.is_plain, True
    try:
        yield
    finally:
        _depth.is_plain = before
