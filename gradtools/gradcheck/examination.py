"""What a rule is asked: the questions, in order, for each use that is made of it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from gradtools import torch_compat
from gradtools.errors import GradtoolsError
from gradtools.gradcheck import probes
from gradtools.gradcheck.batch import batch, of_patterns
from gradtools.gradcheck.budget import approximation
from gradtools.gradcheck.derivative import (
    at_other_sizes,
    derivative,
    of_every_element,
)
from gradtools.gradcheck.forward_mode import forward_mode
from gradtools.gradcheck.linearity import linearity
from gradtools.gradcheck.probes import Probe
from gradtools.gradcheck.purity import First, first_run
from gradtools.gradcheck.reference import figures
from gradtools.gradcheck.report import Capability, Evidence, Figures, Report
from gradtools.gradcheck.second_order import second_order
from gradtools.gradcheck.subject import Subject, floats
from gradtools.gradcheck.surroundings import Unreachable, buffers_kept, without_ranks
from gradtools.gradcheck.trial import Trial
from gradtools.lowering.flat import Plan
from gradtools.probing import probing
from gradtools.rules.rule import Approximate, Exact, Surrogate
from gradtools.rules.signature import describe

__all__ = ["examine", "examine_batch", "examine_invented"]

MOST_BYTES = 256 * 2**20
BYTES_EACH = 64  # of arguments and outputs: double precision, and a few copies
MANY_NUMBERS = 2**17
FEW_NUMBERS = 2**12


def examine(
    plan: Plan,
    leaves: Sequence[Any],
    capabilities: Collection[Capability] = ("reverse",),
    *,
    full: bool = False,
    watch: bool = True,
) -> Report:
    """Ask everything of a rule that certain uses of it need.

    Args:
        plan: The rule at a signature.
        leaves: The arguments of a call, plain tensors among them.
        capabilities: The uses.
        full: Ask also what no use has asked for yet, and measure what pictures show.
        watch: Look for tensors that reach the rule past its arguments.

    Returns:
        The report; ``failure`` is what the rule got wrong, if anything.
    """
    return _Examination(plan, full, watch).run(
        lambda self: self.ask(leaves, capabilities), leaves
    )


def examine_invented(
    plan: Plan, leaves: Sequence[Any], use: Capability
) -> Report | str:
    """Ask what a use needs of a rule in a trace, on numbers that are made up.

    Returns:
        The report, or why there is none: the function may take no such numbers.
    """
    reason = "a trace has no values, and made-up ones are not in the domain of fun"
    for probe in probes.invented(plan, leaves):
        subject = Subject(plan.rule, probe.leaves)
        try:
            with probing(), torch_compat.clean_autograd(), torch.no_grad():
                outs = subject.fun(probe)
                if all(bool(torch.isfinite(out).all()) for out in outs):
                    if plan.state.remembered is None:
                        plan.state.remembered = probes.Remembered(probe.leaves)
                    return examine(probe.plan, probe.leaves, (use,))
        except Exception as error:  # numbers that the user has not chosen
            reason = (
                "a trace has no values, and on made-up ones the function raises "
                f"{type(error).__name__}: {error}"
            )
    return f"{reason}; give the rule some with probe=, or call it once before"


def examine_batch(plan: Plan, batched: Any, leaves: Sequence[Any]) -> Report:
    """Ask of a rule whether a batch gives what its elements give."""
    return _Examination(plan).run(
        lambda self: self.ask_of_batch(batched, leaves), leaves
    )


class _Examination:
    """One run through the questions."""

    def __init__(self, plan: Plan, full: bool = False, watch: bool = True) -> None:
        self.plan = plan
        self.rule = plan.rule
        self.full = full
        self.watch = watch
        self.evidence: list[Evidence] = []
        self.current: Capability = "reverse"
        self.figures: tuple[Figures, ...] = ()
        self.subject: Any = None

    def run(self, ask: Callable[[_Examination], None], leaves: Sequence[Any]) -> Report:
        """Run in surroundings that the caller will find as they were."""
        start, failure = time.perf_counter(), None
        rule = self.rule
        held = [*leaves, rule.fun, rule.fwd, rule.bwd, rule.jvp]
        with contextlib.ExitStack() as stack:
            stack.enter_context(probing())
            stack.enter_context(torch_compat.without_modes())
            stack.enter_context(torch_compat.clean_autograd())
            stack.enter_context(torch.no_grad())
            stack.enter_context(without_ranks())
            stack.enter_context(buffers_kept(held))
            self.subject = Subject(rule, leaves)
            try:
                with self.subject.randomness.rewound():
                    ask(self)
            except Unreachable as error:
                self.note("everything", "not checked", str(error))
            except GradtoolsError as error:
                failure = copy.copy(error)  # without the frames of this call
                what = error.what.removeprefix(f"{rule.name}: ")
                self.note("verdict", "failed", what)
        return Report(
            rule.where,
            self.plan.shown,
            tuple(self.evidence),
            _claim(rule.contract),
            time.perf_counter() - start,
            self.subject.evaluations,
            failure,
            self.figures,
        )

    def note(self, question: str, outcome: Any, detail: str) -> None:
        self.evidence.append(
            Evidence(question, outcome, detail, capability=self.current)
        )

    def add(self, evidence: Sequence[Evidence]) -> None:
        self.evidence += [
            dataclasses.replace(item, capability=self.current) for item in evidence
        ]

    def ask(self, leaves: Sequence[Any], capabilities: Collection[Capability]) -> None:
        """Ask what the uses of a rule need."""
        probe, whole = self.probes(leaves)
        if probe is None:
            self.note("everything", "not checked", _TOO_BIG)
            return
        probe = self.widened(probe, capabilities)
        questions: dict[Capability, Callable[[Probe], None]] = {
            "reverse": self.reverse,
            "second order": self.second_order,
            "forward mode": self.forward_mode,
            "vmap": self.vmap,
        }
        for self.current, question in questions.items():
            if self.current in capabilities:
                question(probe)
        if whole is not None and "reverse" in capabilities:
            self.whole(whole)

    def probes(self, leaves: Sequence[Any]) -> tuple[Probe | None, Probe | None]:
        """Return the arguments to check on, and the whole ones if those are a part.

        Large arguments are cut: most mistakes are in a part of them as well, and what
        is wrong in single elements autograd finds in the whole.
        """
        if self.rule.probe is not None:
            return probes.given(self.plan), None
        probe = probes.of_call(self.plan, leaves)
        size = _size(probe.leaves)
        if size <= FEW_NUMBERS:  # the outputs may be larger; that is not worth a run
            return probe, None
        fits = BYTES_EACH * size <= MOST_BYTES
        if fits:
            size += _size(self.subject.fun(_copied(probe)))
            fits = BYTES_EACH * size <= MOST_BYTES
        if size <= MANY_NUMBERS:
            return probe, None
        part = self.cut(probe)
        if part is None:
            return (probe if fits else None), None
        return part, probe if fits else None

    def cut(self, probe: Probe) -> Probe | None:
        """Return smaller arguments of the same kind, on which the functions run."""
        most = MANY_NUMBERS
        while (small := probes.smaller(probe, most)) is not None:
            try:
                trial = _copied(small)  # an edit in place is to be seen later, fresh
                outs = self.subject.fun(trial)
                self.subject.fwd(trial.watched(anew=False))
            except Exception:  # a reshape to fixed sizes, say
                return None
            if _size(small.leaves) + _size(outs) <= MANY_NUMBERS:
                self.note(
                    "arguments",
                    "passed",
                    f"cut to {describe(small.paths, small.leaves)}",
                )
                return small
            most //= 4
        return None

    def widened(self, probe: Probe, capabilities: Collection[str]) -> Probe:
        """Return the probe in double precision, where the functions take that."""
        subject = self.subject
        probe = probe.watched(anew=False)
        wide = probes.in_double(probe)
        plain = _copied(probe)
        try:
            trial = _copied(wide)  # x.data.clamp_(0) shows only where it is the first
            outs = subject.fun(trial)
            if self.rule.is_opaque and not _is_alike(outs, subject.fun(plain)):
                return plain  # such a kernel reads other memory than it is told of
            run = subject.fwd(trial)
            if self.rule.jvp is None or [*capabilities] != ["forward mode"]:
                subject.bwd(run, [torch.ones_like(o) for o in run.outs if floats(o)])
            subject.in_double = all(
                not floats(o) or torch.finfo(o.dtype).eps < 1e-15 for o in outs
            )
        except Exception:  # whatever it is, the user's own dtype will show it
            return plain
        return wide

    def reverse(self, probe: Probe) -> None:
        """Ask whether bwd is what its contract claims."""
        subject, claimed = self.subject, self.rule.contract
        near = probes.moved_off_kinks(probe, subject.generator)
        first, evidence = first_run(subject, near, watch=self.watch)
        self.add(evidence)
        if isinstance(claimed, Surrogate):
            if claimed.reference is None:
                self.note("derivative", "passed", "a surrogate, not compared")
                return
            self.note("bwd", "passed", "a surrogate, not compared; its reference is:")
            first = self.of_reference(first, claimed)
        trial = Trial.of(subject, first.run, 1, [first.cotangents], [first.values])
        if self.full:
            self.figures = figures(trial)
        if isinstance(claimed, Approximate):
            self.add(approximation(trial, claimed))
            return
        if self.rule.bwd is not None:
            self.add([linearity(trial)])
        plan = trial.probe.plan  # with the reference of a surrogate in it
        self.add(derivative(trial, Probe(plan, probe.leaves)))
        self.add(at_other_sizes(trial))

    def whole(self, probe: Probe) -> None:
        """Ask autograd about every element of large arguments."""
        self.current, claimed = "reverse", self.rule.contract
        if isinstance(claimed, Exact):
            subject = self.subject
            wide = probe.watched(anew=False)
            wide = probes.in_double(wide) if subject.in_double else wide
            near = probes.moved_off_kinks(wide, subject.generator)
            self.add(of_every_element(Trial.at(subject, near, 1)))

    def of_reference(self, first: First, claimed: Surrogate) -> First:
        """Return what the reference of a surrogate says in the place of its bwd."""
        run = first.run
        rule = dataclasses.replace(self.rule, bwd=claimed.reference)
        plan = dataclasses.replace(run.probe.plan, rule=rule)
        run = dataclasses.replace(run, probe=Probe(plan, run.probe.leaves))
        values = self.subject.bwd(run, first.cotangents)
        return dataclasses.replace(first, run=run, values=values)

    def forward_mode(self, probe: Probe) -> None:
        """Ask whether tangents are right."""
        if not isinstance(self.rule.contract, Exact):
            self.add([_claims_nothing("tangent of the output")])
        else:
            self.add(forward_mode(self.subject, probe))

    def second_order(self, probe: Probe) -> None:
        """Ask whether the derivative of bwd is the second derivative."""
        rule = self.rule
        if rule.once_differentiable:
            evidence = [_not_given("declared once_differentiable")]
        elif not isinstance(rule.contract, Exact):
            evidence = [_claims_nothing("second derivative")]
        else:
            evidence = second_order(self.subject, probe, strict=self.full)
        self.add(evidence)

    def vmap(self, probe: Probe) -> None:
        """Ask whether batches give what their elements give."""
        self.add(of_patterns(self.subject, probe))

    def ask_of_batch(self, batched: Any, leaves: Sequence[Any]) -> None:
        """Ask whether a batch gives what its elements give."""
        self.current = "vmap"
        self.add(batch(self.subject, batched, leaves))


def _is_alike(wide: Sequence[Any], plain: Sequence[Any]) -> bool:
    """Whether outputs in double precision are those in the dtype of the call."""
    for value, other in zip(wide, plain, strict=True):
        if floats(other):
            known = torch.nan_to_num(other.to(value.dtype))
            gap = torch.linalg.vector_norm(torch.nan_to_num(value) - known)
            allowed = 30 * torch.finfo(other.dtype).eps ** 0.5
            if gap > allowed * torch.linalg.vector_norm(known) + 1e-30:
                return False
    return True


def _copied(probe: Probe) -> Probe:
    """Return the probe on tensors that fun may edit: the user's are not ours."""
    leaves = [x.clone() if isinstance(x, torch.Tensor) else x for x in probe.leaves]
    return probe.with_leaves(leaves)


def _claim(contract: Any) -> str:
    """Return a contract as a user would write it, without what it leaves open."""
    given = {k: v for k, v in vars(contract).items() if v is not None}
    given = {k: getattr(v, "__qualname__", v) for k, v in given.items()}
    values = ", ".join(f"{name}={value}" for name, value in given.items())
    return f"{type(contract).__name__}({values})"


_TOO_BIG = (
    f"the arguments are too large to be checked in {MOST_BYTES >> 20} MiB, and the "
    "functions do not take smaller ones; give the rule some with probe="
)


def _not_given(why: str) -> Evidence:
    return Evidence("second derivative", "not given", why)


def _claims_nothing(question: str) -> Evidence:
    return Evidence(question, "passed", "not compared: the contract is not Exact")


def _size(values: Sequence[Any]) -> int:
    return sum(x.numel() for x in values if isinstance(x, torch.Tensor))
