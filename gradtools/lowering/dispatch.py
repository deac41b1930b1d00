"""One call of a rule finds its way: no gradient, plain autograd, or a transform.

    no gradient wanted                     fun itself runs
    plain reverse mode, as before          express: code generated for such calls
    plain reverse mode                     functions.Direct
    a torch.func transform, forward mode   functions.Composable
    torch.compile                          boundary

What can be prepared once per call signature is a :class:`.Plan`, found again by the
exact shapes, dtypes and so on of the arguments. What has been learned about the rule is
a :class:`.State`, found by the coarser key that decides when a rule counts as checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch

from gradtools import torch_compat, trees
from gradtools.errors import DefinitionError
from gradtools.lowering import (
    boundary,
    captures,
    contents,
    express,
    free_variables,
    functions,
    nondiff,
)
from gradtools.lowering.flat import Plan
from gradtools.lowering.state import Checks, State
from gradtools.lowering.user_code import autocast_state, noted
from gradtools.probing import moment
from gradtools.rules.rule import Rule
from gradtools.rules.signature import (
    CallSignature,
    describe,
    flatten_entries,
    is_differentiable,
)

__all__ = ["Lowered"]

_MOST_STATES = 16
_MOST_PLANS = 512
_MOST_CODES = 64
_MOST_STRAYS = 4


class Lowered:
    """A rule with its Functions and plans.

    Args:
        rule: The rule.
        checks: Told of uses before they happen; raises when the rule is wrong.
        policy: Returns the policy of the gradient check.
        chosen: Returns what the policy follows from; it takes less time.

    Attributes:
        express: Takes the entries of a call and returns the output, or ASTRAY.
    """

    def __init__(
        self,
        rule: Rule,
        checks: Checks,
        policy: Callable[[], str],
        chosen: Callable[[], Any],
    ) -> None:
        self.rule = rule
        self.checks = checks
        self.policy = policy
        self.chosen = chosen
        self.direct = functions.named(functions.Direct, rule.name)
        self.plans: dict[Hashable, Plan] = {}
        self.states: dict[Hashable, State] = {}
        self.codes: dict[express.Pattern, express.Code] = {}
        self.express: Callable[[Sequence[Any]], Any] = express.astray
        functions_of = (rule.fun, rule.fwd, rule.bwd, rule.jvp)
        self.names = frozenset[str]().union(
            *map(free_variables.names_used, functions_of)
        )
        self.free = [
            (function, path)
            for function in functions_of
            for path in free_variables.free_variables(function).values()
            if not contents.never_holds_tensors(free_variables.follow(function, path))
        ]

    @boundary.unseen
    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the rule."""
        rule = self.rule
        if moment.is_plain:
            return rule.fun(*args, **kwargs)
        if not (
            torch_compat.transforms_active()
            or torch_compat.dual_level() >= 0
            or rule.autocast
        ):
            if not torch.is_grad_enabled():
                return rule.fun(*args, **kwargs)
            entries = rule.parameters.bind(args, kwargs)
            if not _may_need_gradient(entries):
                return self.call_fun(args, kwargs, entries)
        else:
            entries = rule.parameters.bind(args, kwargs)
        if len(entries) != len(args):  # else express was asked already
            out = self.express(entries)
            if out is not express.ASTRAY:
                return out
        return self.run_entries(entries)

    def call_fun(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], entries: tuple[Any, ...]
    ) -> Any:
        """Call fun where no argument needs a gradient."""
        out = self.rule.fun(*args, **kwargs)
        if isinstance(out, torch.Tensor) and not out.requires_grad:
            return out
        if _may_need_gradient((out,)):
            self.refuse_derivative(out, flatten_entries(entries)[0])
        return out

    @boundary.unseen
    def run_entries(self, entries: tuple[Any, ...]) -> Any:
        """Call the rule with bound arguments."""
        moving = torch_compat.forward_ad_active(within_forward=False)
        transformed = moving or torch_compat.transforms_active()
        leaves, spec = flatten_entries(entries)
        if self.rule.autocast is not None and torch_compat.autocast_enabled():
            leaves = [_cast(leaf, self.rule.autocast) for leaf in leaves]
            with _without_autocast():
                return self.run(leaves, spec, entries, transformed, moving)
        return self.run(leaves, spec, entries, transformed, moving)

    def run(
        self,
        leaves: Sequence[Any],
        spec: trees.Spec | None,
        entries: Sequence[Any],
        transformed: bool,
        moving: bool,
    ) -> Any:
        """Run the rule on flat values by the way that the moment asks for."""
        needs = wanted(leaves, transformed, moving)
        if moving and self.rule.bwd is None and self.rule.jvp is None:
            # It serves where nothing moves: inside another rule's jvp, say.
            pairs = zip(needs, leaves, strict=True)
            needs = tuple(n and torch_compat.is_differentiated(x) for n, x in pairs)
        if self.rule.parameters.nondiff:
            needs = nondiff.without(self.rule, needs, leaves, entries)
        if not any(needs):
            return self.run_primal(leaves, spec, entries, transformed)
        if boundary.is_exporting():  # without Dynamo: strict=False
            if torch_compat.is_being_differentiated():
                raise boundary.differentiated_in_export(self.rule)
            boundary.warn_of_export(self.rule.name)
            return self.rule.parameters.call(self.rule.fun, entries)
        order = torch_compat.order(leaves) if transformed else 1
        plan = self.plan(leaves, spec, entries, needs, moving, order)
        if plan.state.watched and self.owes(leaves):
            plan.state.watched.clear()  # look for captured tensors again
        if transformed:
            return express.unpacked(functions.composed(plan, leaves))
        returned = self.direct.apply(plan, *leaves)
        self.learn(plan, leaves, entries)
        return express.unpacked(returned)

    def learn(self, plan: Plan, leaves: Sequence[Any], entries: Sequence[Any]) -> None:
        """Have the next calls like this one served by generated code."""
        layout = plan.layout  # once: another thread may take it meanwhile
        if plan.express is not None:
            # Calls of several kinds take turns, or more shapes than code remembers.
            self.express = plan.express.code.serve(plan.express)
        elif layout is not None and express.is_settled(plan):
            plan.layout = None
            plan.is_learning = False
            learned = express.pattern_of(plan, layout, leaves, entries, bool(self.free))
            if learned is not None:
                self.express = self.code(learned).learn(plan, layout, leaves)
        elif plan.strays < _MOST_STRAYS:
            plan.is_learning = True  # from the second call on

    def code(self, pattern: express.Pattern) -> express.Code:
        """Return the code for a pattern, written on its first occasion."""
        code = self.codes.get(pattern)
        if code is None:
            if len(self.codes) >= _MOST_CODES:
                self.codes.clear()
            code = express.Code(self.rule, pattern, self.chosen, self.owes, self.checks)
            self.codes[pattern] = code
        return code

    def owes(self, leaves: Sequence[Any]) -> bool:
        """Whether a tensor that is no argument has come to need a gradient."""
        return next(self.owed(leaves), None) is not None

    def run_primal(
        self,
        leaves: Sequence[Any],
        spec: trees.Spec | None,
        entries: Sequence[Any],
        transformed: bool,
    ) -> Any:
        """Run fun alone: nobody wants a gradient."""
        rule = self.rule
        if transformed and (rule.vmap != "auto" or rule.vmap_rule is not None):
            needs = (False,) * len(leaves)
            signature = CallSignature(rule.parameters, entries, leaves, spec, needs)
            state = self.state(("primal", str(spec), *map(_roughly, leaves)))
            state.watched = set() if torch.is_grad_enabled() else {"fwd"}
            plan = Plan(
                rule,
                signature,
                state,
                self.policy(),
                checks=self.checks,
                primal=True,
            )
            *tensors, layout = functions.composed(plan, leaves)
            return layout.outputs.rebuild(tensors)
        values = leaves
        if spec is not None:
            values = trees.with_sizes(trees.unflatten(leaves, spec), spec)
        try:
            out = rule.parameters.call(rule.fun, values)
        except Exception as error:
            noted(error, rule, "fun")
            raise
        if torch.is_grad_enabled() or torch_compat.forward_ad_active():
            self.refuse_derivative(out, leaves)
        return out

    def refuse_derivative(self, out: Any, leaves: Sequence[Any]) -> None:
        """Raise where the output has a derivative that no argument accounts for."""
        tensors = trees.Structure.split(out)[0]
        owed = [t for t in tensors if torch_compat.is_differentiated(t)]
        if owed:
            source = next(self.owed(leaves), owed[0])
            objects = [leaf for leaf in leaves if not isinstance(leaf, contents.PLAIN)]
            where = contents.name_of(source, self.rule.fun, objects)
            raise captures.captured(self.rule, "fun", where)

    def plan_for_check(self, entries: tuple[Any, ...]) -> tuple[Plan, Sequence[Any]]:
        """Return a plan in which every differentiable argument counts; its leaves."""
        leaves, spec = flatten_entries(entries)
        needs = tuple(map(is_differentiable, leaves))
        return self.make_plan(leaves, spec, entries, needs, False, (), "always"), leaves

    def plan_for_trace(
        self, entries: tuple[Any, ...], wants: Callable[[Any], bool] | None
    ) -> tuple[Plan, Sequence[Any]]:
        """Return a plan for a call that is being traced; its leaves."""
        leaves, spec = flatten_entries(entries)
        needs = tuple(map(wants or is_differentiable, leaves))
        autocast = autocast_state(_devices(leaves))
        policy = self.policy()
        return (
            self.make_plan(leaves, spec, entries, needs, False, autocast, policy),
            leaves,
        )

    def plan(
        self,
        leaves: Sequence[Any],
        spec: trees.Spec | None,
        entries: Sequence[Any],
        needs: tuple[bool, ...],
        moving: bool,
        order: int,
    ) -> Plan:
        """Return the plan for a call, made on its first occasion."""
        autocast = autocast_state(_devices(leaves))
        policy = self.policy()
        try:
            key = (spec, needs, moving, order, autocast, policy)
            key = (*key, *map(_exactly, leaves))
            plan = self.plans.get(key)
        except TypeError:  # sizes that are symbols have no hash
            key = plan = None
        if plan is None:
            plan = self.make_plan(
                leaves, spec, entries, needs, moving, autocast, policy, order
            )
            if key is not None:
                if len(self.plans) >= _MOST_PLANS:
                    self.plans.clear()
                self.plans[key] = plan
        if plan.has_callables:
            paths = plan.signature.paths()
            captures.refuse_hidden_parameters(self.rule, paths, leaves)
        return plan

    def make_plan(
        self,
        leaves: Sequence[Any],
        spec: trees.Spec | None,
        entries: Sequence[Any],
        needs: tuple[bool, ...],
        moving: bool,
        autocast: Any,
        policy: str,
        order: int = 1,
    ) -> Plan:
        """Prepare a call signature, or raise where the call can mean nothing."""
        rule = self.rule
        self.refuse_undefined()
        signature = CallSignature(rule.parameters, entries, leaves, spec, needs)
        nondiff.refuse(rule, entries)
        callables = any(map(captures.may_hide_parameters, leaves))
        return Plan(
            rule,
            signature,
            self.state((str(spec), needs, autocast, *map(_roughly, leaves))),
            policy,
            autocast,
            self.checks,
            moving=moving,
            order=order,
            has_callables=callables,
            shown=describe(signature.paths(), leaves),
        )

    def state(self, key: Hashable) -> State:
        """Return what is known of the rule at a signature."""
        state = self.states.get(key)
        if state is None:
            if len(self.states) >= _MOST_STATES:
                return State(is_one_of_many=True)
            state = self.states.setdefault(key, State())
        return state

    def refuse_undefined(self) -> None:
        """Raise where a gradient is wanted of a rule that states none."""
        if self.rule.bwd is None and self.rule.jvp is None:
            raise DefinitionError(
                f"{self.rule.name}: a derivative is wanted, and the rule states none",
                rule=self.rule.where,
                fix=f"State it: {self.rule.definition.format(name=self.rule.name)}.",
            )

    def owed(self, leaves: Sequence[Any]) -> Iterator[torch.Tensor]:
        """Yield tensors within reach of the rule that need a gradient.

        They are no arguments: free variables of its functions, or inside of objects.
        """
        held = [free_variables.follow(function, path) for function, path in self.free]
        held += [leaf for leaf in leaves if not isinstance(leaf, contents.PLAIN)]
        for value in held:
            is_self = self.rule.is_method and value is leaves[0]
            for tensor in contents.tensors_used(value, self.names, is_self=is_self):
                if captures.needs_gradient(tensor) and not any(
                    tensor is leaf for leaf in leaves
                ):
                    yield tensor


def wanted(leaves: Sequence[Any], transformed: bool, moving: bool) -> tuple[bool, ...]:
    """Return for each leaf whether a derivative in it may be asked for."""
    if not (moving or torch.is_grad_enabled()):
        return (False,) * len(leaves)  # no_grad holds for every level of transforms
    if not transformed:
        return tuple(
            isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves
        )
    return tuple(
        is_differentiable(leaf)
        and (moving or torch_compat.requires_grad_at_any_level(leaf))
        for leaf in leaves
    )


def _may_need_gradient(values: Iterable[Any]) -> bool:
    """Whether a tensor among these needs a gradient; True of what only pytree knows."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.requires_grad:
                return True
        elif type(value) in (tuple, list):
            if _may_need_gradient(value):
                return True
        elif type(value) is dict:
            if _may_need_gradient(value.values()):
                return True
        elif not isinstance(value, contents.WITHOUT_TENSORS):
            return True
    return False


def _devices(leaves: Iterable[Any]) -> list[str]:
    if not torch_compat.autocast_enabled():
        return []
    kinds = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}
    return sorted(kinds)


def _exactly(leaf: Any) -> Hashable:
    """Key for a plan: all that the plan depends on."""
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return _roughly(leaf)


def _roughly(leaf: Any) -> Hashable:
    """Key for what is known of a rule: an annealed float, a new lambda are no news.

    A number that hides the others, being zero, one or infinite, has not told of them.
    """
    if isinstance(leaf, torch.Tensor):
        ones_and_zeros = tuple(size if size < 2 else -1 for size in leaf.shape)
        return leaf.dtype, leaf.device, ones_and_zeros
    if isinstance(leaf, (bool, int, str, torch.dtype, torch.device)):
        return type(leaf), leaf
    if isinstance(leaf, (float, complex)):
        return type(leaf), express.TELLING_LITTLE.get(leaf)
    return type(leaf), getattr(leaf, "__code__", None)


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    eligible = (
        isinstance(leaf, torch.Tensor)
        and leaf.is_floating_point()
        and leaf.dtype != torch.float64
        and torch.is_autocast_enabled(leaf.device.type)
    )
    return leaf.to(dtype) if eligible else leaf


@contextlib.contextmanager
def _without_autocast() -> Generator[None]:
    with contextlib.ExitStack() as stack:
        for device in torch_compat.autocast_devices():
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
