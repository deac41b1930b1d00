"""Warnings that point at the user's line.

What is to be said comes up anywhere: under a transform, inside ``backward``, while
torch.compile traces. Between there and the user lie frames of gradtools, of torch and
of code that gradtools wrote, in no fixed number; no ``stacklevel`` would do.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType

__all__ = ["warn"]

_BETWEEN = ("gradtools", "torch", "contextlib", "functools", "threading")


def warn(message: str) -> None:
    """Issue a UserWarning at the innermost line that is the user's."""
    frame = _of_the_user(sys._getframe(1))  # pyright: ignore[reportPrivateUsage]
    warnings.warn_explicit(
        message,
        UserWarning,
        filename=frame.f_code.co_filename,
        lineno=frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _of_the_user(frame: FrameType) -> FrameType:
    """Go outwards to a frame that is no machinery; to the last one if there is none."""
    while frame.f_back is not None and _is_machinery(frame):
        frame = frame.f_back
    return frame


def _is_machinery(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__")  # code that is written has none
    return name is None or name.partition(".")[0] in _BETWEEN
