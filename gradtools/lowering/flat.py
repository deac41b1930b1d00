"""Plan: a rule and a call signature as pure functions of flat tensors.

Everything that torch will see of a rule goes through a plan: ``forward`` and
``backward`` take and give flat lists, run the user's functions on the user's
containers, and verify what those return. A plan knows nothing of contexts, graphs or
transforms; :mod:`.batching` makes another plan of it, :mod:`.functions` lowers either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from gradtools import torch_compat
from gradtools.lowering import captures, contents, contract, forward_mode
from gradtools.lowering.cotangents import fitted
from gradtools.lowering.replay import is_traced, random_state, replayed, same
from gradtools.lowering.residuals import Layout, lay_out, opaque_objects
from gradtools.lowering.state import Checks, State
from gradtools.lowering.user_code import noted, under_autocast, under_policy
from gradtools.probing import probing
from gradtools.rules.rule import Rule
from gradtools.rules.signature import CallSignature
from gradtools.trees import Structure

__all__ = ["Lowerable", "Plan"]

Tensors = Sequence[torch.Tensor]
Optional = Sequence[torch.Tensor | None]


class Lowerable(Protocol):
    """What can be lowered: pure functions of flat tensors.

    ``leading`` are the sizes of batch dimensions that all tensors carry in front, where
    a rule is vectorized by ``expand_dims`` or ``broadcast_all``; else empty.
    """

    rule: Rule
    signature: CallSignature
    state: State
    primal: bool
    moving: bool
    order: int
    autocast: tuple[tuple[str, torch.dtype], ...]

    @property
    def has_jvp(self) -> bool:
        """Whether the user stated a jvp rule."""
        ...

    def first_use(self, leaves: Sequence[Any]) -> None:
        """Let the check run, on plain tensors, before the rule is trusted."""
        ...

    def first_batch(self, batched: Any, leaves: Sequence[Any]) -> None:
        """Let the check run before the rule is trusted with a batch."""
        ...

    def first_derived(self, what: str) -> None:
        """Let the check run before "forward mode" or "second order" is trusted."""
        ...

    def forward(
        self, leaves: Sequence[Any], *, leading: tuple[int, ...] = ()
    ) -> tuple[Tensors, Tensors, Layout]:
        """Return the output tensors, the new residual tensors and the layout."""
        ...

    def backward(
        self,
        layout: Any,
        kept: Tensors,
        cotangents: Optional,
        needs: Sequence[bool],
        *,
        leading: tuple[int, ...] = (),
    ) -> Optional:
        """Return one cotangent per leaf, given one per output tensor."""
        ...

    def jvp(
        self,
        layout: Any,
        leaves: Sequence[Any],
        tangents: Optional,
        outs: Tensors,
        kept: Tensors = (),
        *,
        leading: tuple[int, ...] = (),
    ) -> Optional:
        """Return one tangent per output tensor, by the user's jvp rule."""
        ...


@dataclasses.dataclass(eq=False)
class Plan:
    """A rule at one call signature.

    Attributes:
        rule: The rule.
        signature: The call.
        state: What is known about the two.
        policy: The gradient check's policy at the call (backward runs on threads of
            autograd's, which do not see the caller's context).
        autocast: Device types under autocast at the call, with their dtypes.
        checks: Told of every use until nothing is left to check.
        primal: The plan serves calls that want no gradient: ``fun`` alone runs.
        moving: Forward mode is active at the call.
        order: How many derivatives of the call are under way.
        has_callables: Some argument may hold parameters.
        is_unchecked: The check still wants to hear of uses.
        shown: The arguments in words.
        layout: How the last call was laid out, where :mod:`.express` may learn from it.
        is_learning: Calls are still looked at to write code for the next ones.
        express: What code that was written for such calls knows of them.
        strays: How often a call was not like the one that code was written for.
    """

    rule: Rule
    signature: CallSignature
    state: State
    policy: str = "off"
    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    checks: Checks | None = None
    primal: bool = False
    moving: bool = False
    order: int = 1
    has_callables: bool = False
    is_unchecked: bool = True
    shown: str = ""
    layout: Layout | None = None
    is_learning: bool = False
    express: Any = None
    strays: int = 0

    @property
    def has_jvp(self) -> bool:
        """Whether the user stated a jvp rule."""
        return self.rule.jvp is not None

    def first_use(self, leaves: Sequence[Any]) -> None:
        """Let the check run, on plain tensors, before the rule is trusted."""
        if self.is_unchecked and self.checks is not None:
            self.checks.before_use(self, leaves)

    def first_batch(self, batched: Any, leaves: Sequence[Any]) -> None:
        """Let the check run before the rule is trusted with a batch."""
        if self.checks is not None:
            self.checks.before_batch(self, batched, leaves)

    def first_derived(self, what: str) -> None:
        """Let the check run before "forward mode" or "second order" is trusted."""
        if self.checks is not None:
            self.checks.before_deriving(self, what)

    def forward(
        self, leaves: Sequence[Any], *, leading: tuple[int, ...] = ()
    ) -> tuple[Tensors, Tensors, Layout]:
        """Run fwd; return the outputs, the new residuals and the layout."""
        state = self.state
        entries = self.signature.entries(leaves)
        first = "fwd" not in state.watched
        rng = None
        if state.draws is not False and not is_traced(leaves):
            rng = random_state(leaves)
        if first:
            out, residuals = self._first_forward(entries, leaves)
        else:
            out, residuals = self.call_fwd(entries)
        if state.draws is None and rng is not None:
            state.draws = not same(rng, random_state(leaves))
        outs, new, layout = self.laid_out(out, residuals, leaves)
        layout.rng = rng if state.draws else None
        return outs, new, layout

    def laid_out(
        self, out: Any, residuals: Any, leaves: Sequence[Any]
    ) -> tuple[Tensors, Tensors, Layout]:
        """Take apart what fwd gave: the outputs, the new residuals and the layout."""
        outs, outputs = Structure.split(out)
        if outputs.constants and not self.primal:
            contract.refuse_hidden_outputs(self.rule, outputs, leaves)
        tensors, structure = Structure.split(residuals)
        layout, new = lay_out(outputs, outs, structure, tensors, leaves)
        if layout.opaque:
            layout.versions = contents.versions(layout.opaque)
        if new and not torch.is_grad_enabled():
            self._refuse_captured(new, leaves)
        return self._own(outs, leaves), new, layout

    def call_fwd(self, entries: Sequence[Any]) -> tuple[Any, Any]:
        """Run the user's fwd on the user's arguments; return output and residuals."""
        rule, parameters = self.rule, self.signature.parameters
        is_fun = rule.fwd is None or self.primal
        extra: dict[str, Any] = {}
        if rule.fwd_takes_needs and not is_fun:
            extra["needs"] = self.signature.needs_tree(self.signature.needs)
        try:
            function: Any = rule.fun if is_fun else rule.fwd
            function = under_policy(function, self.policy, self.checks)
            returned = parameters.call(function, entries, **extra)
        except Exception as error:
            noted(error, rule, "fun" if is_fun else "fwd")
            raise
        return self.parted(entries, returned)

    def parted(self, entries: Sequence[Any], returned: Any) -> tuple[Any, Any]:
        """Return output and residuals, given what fwd (or fun in its place) gave."""
        rule, parameters = self.rule, self.signature.parameters
        residuals: Any
        if self.primal:
            return returned, ()
        if rule.fwd is not None:
            out, residuals = contract.output_and_residuals(rule, returned)
        elif rule.bwd is None:
            return returned, tuple(entries)  # what the jvp rule will be transposed at
        else:
            out, residuals = returned, (tuple(entries), returned)
        if rule.bwd_takes_self or parameters.nondiff:
            own = entries[:1] if rule.bwd_takes_self else ()
            residuals = (*own, *(entries[i] for i in parameters.nondiff), residuals)
        return out, residuals

    def backward(
        self,
        layout: Layout,
        kept: Tensors,
        cotangents: Optional,
        needs: Sequence[bool],
        *,
        leading: tuple[int, ...] = (),
    ) -> Optional:
        """Run bwd; return one cotangent per leaf."""
        if layout.versions:
            contract.refuse_edited(self.rule, layout.versions)
        if self.rule.bwd is None:
            if self.state.jvp_linear is not None:
                raise self.state.jvp_linear
            return forward_mode.transposed_jvp(self, layout, kept, cotangents, needs)
        if "bwd" in self.state.watched:
            returned = self.call_bwd(layout, kept, cotangents, needs)
        else:
            count = len(kept)
            returned = self._first(
                "bwd",
                lambda given: self.call_bwd(
                    layout, given[:count], given[count:], needs
                ),
                (*kept, *cotangents),
                (*layout.residuals.constants.values(), *_inside(layout.opaque)),
            )
        cast = bool(self.autocast) or self.rule.autocast is not None
        return fitted(self.rule, self.signature, returned, cast=cast, leading=leading)

    def call_bwd(
        self, layout: Layout, kept: Tensors, cotangents: Optional, needs: Sequence[bool]
    ) -> Any:
        """Run the user's bwd on the user's containers; return what it returned."""
        rule = self.rule
        bwd = under_policy(rule.bwd, self.policy, self.checks)
        residuals = layout.rebuild(kept)
        cotangent = layout.outputs.cotangents(cotangents)
        first: Sequence[Any] = ()
        if rule.bwd_takes_self or rule.parameters.nondiff:
            *first, residuals = residuals
        extra: dict[str, Any] = {}
        if rule.bwd_takes_needs:
            extra["needs"] = self.signature.needs_tree(needs)
        try:
            if self.autocast or torch_compat.autocast_enabled():
                return under_autocast(
                    self.autocast_then(), bwd, *first, residuals, cotangent, **extra
                )
            return bwd(*first, residuals, cotangent, **extra)
        except Exception as error:
            noted(error, rule, "bwd")
            raise

    def jvp(
        self,
        layout: Layout,
        leaves: Sequence[Any],
        tangents: Optional,
        outs: Tensors = (),
        kept: Tensors = (),
        *,
        leading: tuple[int, ...] = (),
    ) -> Optional:
        """Run the user's jvp rule; return one tangent per output tensor."""
        signature = self.signature
        filled = [
            torch.zeros_like(leaf) if tangent is None and meta is not None else tangent
            for leaf, tangent, meta in zip(
                leaves, tangents, signature.metas, strict=True
            )
        ]
        if "jvp" in self.state.watched:
            returned = self.call_jvp(leaves, filled, layout, outs, kept)
        else:
            count, end = len(leaves), 2 * len(leaves) + len(kept)
            returned = self._first(
                "jvp",
                lambda given: self.call_jvp(
                    given[:count],
                    given[count : 2 * count],
                    layout,
                    given[end:],
                    given[2 * count : end],
                ),
                (*leaves, *filled, *kept, *outs),
            )
        return contract.output_tangents(self.rule, returned, layout.outputs, outs)

    def call_jvp(
        self,
        leaves: Sequence[Any],
        tangents: Sequence[Any],
        layout: Layout,
        outs: Tensors,
        kept: Tensors,
    ) -> Any:
        """Run the user's jvp rule on the user's containers; return what it returned."""
        rule, signature = self.rule, self.signature
        jvp: Any = rule.jvp
        primals, moved = signature.entries(leaves), signature.entries(tangents)
        nondiff = rule.parameters.nondiff
        first = [
            *(primals[:1] if rule.jvp_takes_self else ()),
            *(primals[i] for i in nondiff),
        ]
        given = tuple(p for i, p in enumerate(primals) if i not in nondiff)
        moved = tuple(t for i, t in enumerate(moved) if i not in nondiff)
        try:
            if rule.jvp_takes_residuals:
                recorded = layout.outputs.rebuild(outs), layout.rebuild(kept)
                first, moved = [*first, given], (moved, *recorded)
            else:
                first, moved = [*first, given], (moved,)
            return under_autocast(self.autocast_then(), jvp, *first, *moved)
        except Exception as error:
            noted(error, rule, "jvp")
            raise

    def autocast_then(self) -> list[tuple[str, torch.dtype | None]]:
        """Return the autocast state of the call, for devices under it then or now."""
        states = dict(self.autocast)
        devices = {*states, *torch_compat.autocast_devices()}
        return [(device, states.get(device)) for device in devices]

    def _first_forward(
        self, entries: Sequence[Any], leaves: Sequence[Any]
    ) -> tuple[Any, Any]:
        """Run fwd for the first time, and learn what does not change between calls."""
        role = "fun" if self.rule.fwd is None or self.primal else "fwd"
        with captures.Watch(self.rule, role, leaves) as watch:
            out, residuals = self.call_fwd(entries)
        outs = Structure.split(out)[0]
        kept, structure = Structure.split(residuals)
        hidden = _inside(opaque_objects(structure, leaves))
        watch.refuse(outs, "output: ")
        watch.refuse((*kept, *hidden), "residuals: ")
        unknown = (i for i, out in enumerate(outs) if not watch.is_known(out))
        self.state.foreign = frozenset(unknown)
        self.state.watched.add("fwd")
        return out, residuals

    def _first(
        self,
        role: str,
        run: Callable[[Sequence[Any]], Any],
        values: Sequence[Any],
        objects: Iterable[Any] = (),
    ) -> Any:
        """Run bwd or jvp for the first time, and look for captured tensors.

        Args:
            role: Which of the two it is.
            run: Calls it on flat values.
            values: The values.
            objects: What else it is given.
        """
        if torch.is_grad_enabled() and not torch_compat.transforms_active():
            # What a Function that is called inside returns would look captured.
            bare = [x.detach() if isinstance(x, torch.Tensor) else x for x in values]
            watch = captures.Watch(self.rule, role, (*bare, *objects))
            with probing(), replayed(random_state(values)), torch.no_grad(), watch:
                run(bare)
            returned = run(values)
        else:
            with captures.Watch(self.rule, role, (*values, *objects)):
                returned = run(values)
        self.state.watched.add(role)
        return returned

    def _refuse_captured(self, new: Tensors, leaves: Sequence[Any]) -> None:
        """Raise for a residual that needs a gradient and is no argument's."""
        for tensor in new:
            if tensor.requires_grad and not torch_compat.is_view_of(tensor, leaves):
                where = contents.name_of(tensor, self.rule.fwd or self.rule.fun)
                raise captures.captured(self.rule, "fwd", f"residuals: {where}")

    def _own(self, outs: Tensors, leaves: Sequence[Any]) -> Tensors:
        """Give every output a tensor of its own where it is an input or another output.

        An input that is returned as it is, and one tensor returned twice, would come
        out of a Function with an all-zero gradient, or not at all; a constant that fwd
        hands through would become part of the graph.
        """
        seen = {id(leaf) for leaf in leaves}
        owned = list(outs)
        for index, out in enumerate(outs):
            if id(out) in seen:
                owned[index] = out.view_as(out)
            elif index in self.state.foreign:
                owned[index] = out.detach()
            seen.add(id(out))
        if self.moving:
            # torch wants the tangent of a view to be a view of the input's tangent,
            # which a rule's tangent is not.
            owned = [out.clone() if torch_compat.is_view(out) else out for out in owned]
        return owned


def _inside(objects: Iterable[Any]) -> list[torch.Tensor]:
    """Return the tensors inside opaque objects."""
    return [tensor for value in objects for _, tensor in contents.hidden_tensors(value)]
