"""What has been found out about a rule at one signature; who is told of its uses."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from gradtools.errors import GradtoolsError, TransformError

if TYPE_CHECKING:
    from gradtools.lowering.flat import Plan

__all__ = ["Checks", "State"]


@dataclasses.dataclass(eq=False)
class State:
    """What has been found out about a rule at one signature; shared by its plans.

    Attributes:
        watched: Roles whose captured tensors have been looked for.
        draws: Whether fwd draws random numbers; None: it has run in traces only.
        foreign: Outputs that fwd did not make (a constant that it handed through).
        second_order: Why bwd and fwd cannot be differentiated; None if they can.
        jvp_second_order: Why the jvp rule cannot be differentiated; None if it can.
        linear: Why bwd cannot be transposed; None if it can.
        jvp_linear: Why the jvp rule cannot be transposed; None if it can.
        tested: Preconditions that have been tested.
        under_test: Preconditions whose test is running, in the thread with the lock.
        checked: By capability, what the gradient check found: None, or an error.
        unchecked: Why calls went unchecked, as far as the report says so.
        remembered: Arguments of a call, for checks that come when it is over.
        is_one_of_many: The rule has been met at more signatures than are checked.
        lock: Held while a precondition is tested.
        checking: Held while a check runs, on a thread of its own too: a rule that calls
            itself there has its preconditions tested.
    """

    watched: set[str] = dataclasses.field(default_factory=set)
    draws: bool | None = None
    foreign: frozenset[int] = frozenset()
    second_order: GradtoolsError | None = None
    jvp_second_order: TransformError | None = None
    linear: TransformError | None = None
    jvp_linear: TransformError | None = None
    tested: set[str] = dataclasses.field(default_factory=set)
    under_test: set[str] = dataclasses.field(default_factory=set)
    checked: dict[Hashable, GradtoolsError | None] = dataclasses.field(
        default_factory=dict
    )
    unchecked: set[str] = dataclasses.field(default_factory=set)
    remembered: Any = None
    is_one_of_many: bool = False
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)
    checking: threading.RLock = dataclasses.field(default_factory=threading.RLock)


class Checks(Protocol):
    """What a plan tells of its uses; raises where the rule is found wrong."""

    def under(self, policy: str) -> AbstractContextManager[Any]:
        """Return the context in which a policy of the gradient check is in force."""
        ...

    def before_use(self, plan: Plan, leaves: Sequence[Any]) -> None:
        """Hear that a plan is about to be used on these plain leaves."""
        ...

    def before_batch(self, plan: Plan, batched: Any, leaves: Sequence[Any]) -> None:
        """Hear that a batched plan is about to be used on these plain leaves."""
        ...

    def before_deriving(self, plan: Plan, what: str) -> None:
        """Hear that what was derived from a rule is about to be used."""
        ...
