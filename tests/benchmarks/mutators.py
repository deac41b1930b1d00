"""Mutators: mechanical mistakes, made in a right rule.

Each takes a RightRule and returns its mutants: one per argument where the mistake is
one of a cotangent, else one for the rule, none where it cannot be made. Nothing here
knows how the library checks rules; whether a mutant is wrong at all, judge.py decides.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tests.benchmarks.right_rules import Place, RightRule, differentiable

OTHER_DTYPE = {
    torch.float64: torch.float32,
    torch.float32: torch.float64,
    torch.complex128: torch.complex64,
    torch.complex64: torch.complex128,
}


@dataclass(frozen=True)
class Mutant:
    """A rule with one mistake.

    Attributes:
        rule: Name of the right rule.
        mutator: Name of the mutator.
        target: The argument or term, where there are several.
        fun: The function.
        fwd: Its forward.
        bwd: Its backward.
        options: For ``gt.custom_vjp``.
        blame: Regular expressions for the arguments that a message may name, one of
            which it must; none where no argument is at fault.
        words: Regular expression for what a message of the right kind says.
    """

    rule: str
    mutator: str
    target: str
    fun: Callable[..., Any]
    fwd: Callable[..., Any]
    bwd: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    blame: frozenset[str] = frozenset()
    words: str = ""


MUTATORS: dict[str, Callable[[RightRule], list[Mutant]]] = {}


def mutator(name, words):
    """Enter a generator of mutants, given as dicts of what differs, into the table."""

    def enter(changes):
        def mutate(rule):
            return [_mutant(rule, name, words, **change) for change in changes(rule)]

        MUTATORS[name] = mutate
        return changes

    return enter


def _mutant(rule, name, words, *, paths=(), target=None, words_here=None, **parts):
    return Mutant(
        rule=rule.name,
        mutator=name,
        target=", ".join(paths) if target is None else target,
        blame=frozenset(re.escape(path) + r"(?!\w)" for path in paths),
        words=words_here or words,
        **{"fun": rule.fun, "fwd": rule.fwd, "bwd": rule.bwd, **parts},
    )


def identity(rule: RightRule) -> Mutant:
    """Return the rule itself, as a mutant."""
    return _mutant(rule, "identity", "")


# Trees: argument i, and what is below it by keys.


def get(tree, keys):
    for key in keys:
        tree = tree[key]
    return tree


def put(tree, keys, value):
    """Return the tree with another value at one place."""
    if not keys:
        return value
    below = put(tree[keys[0]], keys[1:], value)
    if isinstance(tree, dict):
        return {**tree, keys[0]: below}
    return (*tree[: keys[0]], below, *tree[keys[0] + 1 :])


def map_tensors(function, tree):
    """Map floating and complex tensors."""
    return pytree.tree_map(
        lambda leaf: function(leaf) if differentiable(leaf) else leaf, tree
    )


def tensors(tree):
    return [leaf for leaf in pytree.tree_leaves(tree) if differentiable(leaf)]


def edited(rule: RightRule, place: Place, edit):
    """Return a bwd whose cotangent at one place is edited."""

    def bwd(residuals, g):
        cotangents = rule.bwd(residuals, g)
        return put(cotangents, place.keys, edit(get(cotangents, place.keys)))

    return {"paths": [place.path], "bwd": bwd}


def edited_with_argument(rule: RightRule, place: Place, edit):
    """Return a fwd and a bwd whose cotangent is edited by way of the argument."""

    def fwd(*args):
        out, residuals = rule.fwd(*args)
        return out, (args, residuals)

    def bwd(carried, g):
        args, residuals = carried
        cotangents = rule.bwd(residuals, g)
        change = edit(get(cotangents, place.keys), get(args, place.keys))
        return put(cotangents, place.keys, change)

    return {"paths": [place.path], "fwd": fwd, "bwd": bwd}


def largest(rule):
    return max(rule.places(), key=lambda place: place.sample.numel())


def per_argument(name, words, applies=lambda sample: True):
    """Make an edit of a cotangent a mutator, for each argument to which it applies."""

    def enter(edit):
        @mutator(name, words)
        def changes(rule):
            for place in rule.places():
                if applies(place.sample):
                    yield edited(rule, place, edit)

        return edit

    return enter


def per_real_argument(name, words):
    """Make an edit by way of the argument a mutator, for each real argument."""

    def enter(edit):
        @mutator(name, words)
        def changes(rule):
            for place in rule.places():
                if place.sample.is_complex():
                    continue
                change = edited_with_argument(rule, place, edit)
                if not place.sample.dim():  # one number shows no region, but a factor
                    change["words_here"] = f"{words}|times"
                yield change

        return edit

    return enter


def ones_but(like, index, value, size=None):
    """Return factors: ones, and another value at one index of the first dimension."""
    factors = torch.ones(size or like.shape, dtype=like.dtype)
    factors[index] = value
    return factors


def is_square(tensor):
    return tensor.dim() >= 2 and tensor.shape[-1] == tensor.shape[-2] > 1


DIFFERS = "term|differs|element|conj"


# Factors.


@per_argument("sign", "sign")
def sign(c):
    return -c


@per_argument("times 2", "times|mean")
def times_2(c):
    return 2 * c


@per_argument("times 1.01", "times|mean")
def times_101(c):
    return 1.01 * c


@mutator("mean for sum", "times|mean")
def mean_for_sum(rule):
    outputs = tensors(rule.fun(*rule.args(torch.float64, 0)))
    for place in rule.places():
        dims = rule.summed.get(place.path) or rule.contracted.get(place.path) or ()
        size = rule.sizes.get(place.path, 1)
        for dim in dims:
            size *= outputs[0].shape[dim]
        if size > 1:
            yield edited(rule, place, lambda c, size=size: c / size)


# Nothing at all.


@per_argument("zeros", "zero")
def zeros(c):
    return torch.zeros_like(c)


@per_argument("None", "zero")
def none(c):
    return None


# Terms, sums, layouts.


@mutator("dropped term", DIFFERS)
def dropped_term(rule):
    for term, variant in rule.dropped.items():
        yield {
            "paths": [variant.path],
            "target": f"{variant.path} without {term}",
            "bwd": variant.bwd,
        }


@mutator("missing sum", "sum")
def missing_sum(rule):
    sums = [(rule.summed, None), (rule.contracted, f"sum|{DIFFERS}")]
    for table, words in sums:
        for place in rule.places():
            if place.path in table:
                slice_of = functools.partial(_first_slice, dims=table[place.path])
                yield _of_part(rule, place, slice_of) | {"words_here": words}


def _first_slice(g, dims):
    for dim in dims:
        first = torch.zeros(g.shape[dim], dtype=g.dtype)
        first[0] = 1
        g = g * first.reshape(-1, *[1] * (g.dim() - dim - 1))
    return g


def _of_part(rule, place, part):
    """Return a bwd whose cotangent at one place is that of a part of ``g``."""

    def bwd(residuals, g):
        whole, partial = rule.bwd(residuals, g), rule.bwd(residuals, part(g))
        return put(whole, place.keys, get(partial, place.keys))

    return {"paths": [place.path], "bwd": bwd}


@per_argument("transpose", "transpos", is_square)
def transpose(c):
    return c.mT


@mutator("transposed g", f"transpos|{DIFFERS}")
def transposed_g(rule):
    out = rule.fun(*rule.args(torch.float64, 0))
    if isinstance(out, torch.Tensor) and is_square(out):
        for place in rule.places():
            yield _of_part(rule, place, lambda g: g.mT)


@mutator("swapped", "swapped|belongs to|what args")
def swapped(rule):
    for one, other in itertools.combinations(rule.places(), 2):
        same_dtype = one.sample.dtype == other.sample.dtype
        if same_dtype and one.sample.shape == other.sample.shape:

            def bwd(residuals, g, one=one, other=other):
                right = rule.bwd(residuals, g)
                half = put(right, one.keys, get(right, other.keys))
                return put(half, other.keys, get(right, one.keys))

            yield {"paths": [one.path, other.path], "bwd": bwd}


@per_argument("roll", DIFFERS, lambda x: x.dim() > 0 and x.shape[-1] > 1)
def roll(c):
    return c.roll(1, -1)


@per_argument("no conj", DIFFERS, lambda x: x.is_complex())
def no_conj(c):
    return c.conj().resolve_conj()


@per_argument("unsummed shape", "sum|shape")
def unsummed_shape(c):
    # Three times the right sum, for whoever sums it.
    return c.expand(3, *c.shape)


@per_argument("wrong dtype", "dtype|float")
def wrong_dtype(c):
    return c.to(OTHER_DTYPE[c.dtype])


# Here and there.


@mutator("one element", "element")
def one_element(rule):
    place = largest(rule)
    size = place.sample.numel()
    if size >= 4:

        def edit(c):
            return c * ones_but(c, 7 * size // 11, 1.1, (size,)).reshape(c.shape)

        yield edited(rule, place, edit)


@mutator("nan", "nan|finite|element")
def nan(rule):
    place = largest(rule)
    size = place.sample.numel()

    def edit(c):
        factors = ones_but(c, 7 * size // 11, float("nan"), (size,))
        return c * factors.reshape(c.shape)

    yield edited(rule, place, edit)


@per_argument("last row", f"zero|row|slice|only where|{DIFFERS}", lambda x: x.dim() > 0)
def last_row(c):
    return c * ones_but(c, -1, 0)


@per_real_argument("negative", r"only where .*<")
def negative(c, x):
    return c * torch.where(x < 0, 1.5, 1.0).to(c.dtype)


@per_real_argument("large", "large|only where")
def large(c, x):
    return c * torch.where(x.abs() > 5, 1.5, 1.0).to(c.dtype)


# Not linear in the cotangent.


@functools.cache
def _bounds(rule_name):
    """Return twice the largest cotangent of normal ``g``, per place of a rule."""
    from tests.benchmarks.right_rules import RULES

    rule = RULES[rule_name]
    generator = torch.Generator().manual_seed(1)
    places = rule.places()
    most = [0.0] * len(places)
    for seed in range(40):
        out, residuals = rule.fwd(*rule.args(torch.float64, seed))
        g = map_tensors(
            lambda o: torch.randn(o.shape, generator=generator, dtype=o.dtype), out
        )
        cotangents = rule.bwd(residuals, g)
        for i, place in enumerate(places):
            most[i] = max(most[i], get(cotangents, place.keys).abs().max().item())
    return [2 * m for m in most]


@mutator("clip", "linear|clip")
def clip(rule):
    for place, bound in zip(rule.places(), _bounds(rule.name), strict=True):
        yield edited(rule, place, functools.partial(_clipped, bound=bound))


def _clipped(c, bound):
    if c.is_complex():
        return c * (bound / c.abs()).clamp(max=1)
    return c.clamp(-bound, bound)


# Neither of these two is a clip, and a message should not say so.
NO_CLIP = r"(?s)\A(?!.*clipped).*"


@per_argument("offset", f"{NO_CLIP}(linear|zero|{DIFFERS})")
def offset(c):
    return c + 0.01


@per_argument("low precision", f"{NO_CLIP}(precision|round|linear|times|{DIFFERS})")
def low_precision(c):
    if c.is_complex():
        return torch.view_as_complex(low_precision(torch.view_as_real(c)))
    return c.to(torch.bfloat16).to(c.dtype)


# Second order: right values, and a dependence lost.

SECOND = "second derivative|detach"


@mutator("detached residuals", SECOND)
def detached_residuals(rule):
    yield {"bwd": lambda residuals, g: rule.bwd(map_tensors(_detach, residuals), g)}


@mutator("detached in fwd", SECOND)
def detached_in_fwd(rule):
    def fwd(*args):
        out, residuals = rule.fwd(*args)
        return out, map_tensors(_detach, residuals)

    yield {"fwd": fwd}


@mutator("detached g", SECOND)
def detached_g(rule):
    yield {"bwd": lambda residuals, g: rule.bwd(residuals, map_tensors(_detach, g))}


def _detach(tensor):
    return tensor.detach()


# Impure.


@mutator("edits input", "in place")
def edits_input(rule):
    for place in rule.places():

        def fwd(*args, keys=place.keys):
            result = rule.fwd(*args)
            get(args, keys).mul_(1.0 + 1e-3)
            return result

        yield {"paths": [place.path], "fwd": fwd}


@mutator("edits residual", "in place")
def edits_residual(rule):
    if not tensors(rule.fwd(*rule.args(torch.float64, 0))[1]):
        return

    def bwd(residuals, g):
        cotangents = rule.bwd(residuals, g)
        tensors(residuals)[-1].mul_(1.001)
        return cotangents

    yield {"bwd": bwd}


@mutator("edits cotangent", "in place")
def edits_cotangent(rule):
    def bwd(residuals, g):
        cotangents = rule.bwd(residuals, g)
        tensors(g)[0].mul_(0.5)
        return cotangents

    yield {"bwd": bwd}


RANDOM = "twice|random|same answer"


@mutator("random", RANDOM)
def random(rule):
    place = rule.places()[-1]
    yield edited(rule, place, lambda c: c * (1 + 0.1 * torch.randn_like(c)))


@mutator("private random", RANDOM)
def private_random(rule):
    generator = torch.Generator().manual_seed(0)

    def edit(c):
        noise = torch.randn(c.shape, generator=generator, dtype=torch.float32)
        return c * (1 + 0.1 * noise).to(c.dtype)

    yield edited(rule, rule.places()[0], edit)


# fwd, and what is no argument.


@mutator("fwd is off", "fwd")
def fwd_is_off(rule):
    def fwd(*args):
        out, residuals = rule.fwd(*args)
        return map_tensors(lambda o: o * (1 + 1e-3), out), residuals

    yield {"fwd": fwd}


@mutator("captured", "captured|without getting it")
def captured(rule):
    scale = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    @functools.wraps(rule.fun)
    def fun(*args):
        return map_tensors(lambda o: o * scale, rule.fun(*args))

    def fwd(*args):
        out, residuals = rule.fwd(*args)
        return map_tensors(lambda o: o * scale, out), residuals

    def bwd(residuals, g):
        return rule.bwd(residuals, map_tensors(lambda o: o * scale, g))

    yield {"fun": fun, "fwd": fwd, "bwd": bwd}


# Batched by hand.


def batched(rule: RightRule, mix: float) -> dict[str, Any] | None:
    """Return fwd and bwd that take leading dimensions; ``mix`` is the mistake.

    None for rules with anything but tensors among arguments or residuals.
    """
    args = rule.args(torch.float64, 0)
    out, residuals = rule.fwd(*args)
    if not all(map(differentiable, pytree.tree_leaves((args, residuals)))):
        return None
    out_dim = tensors(out)[0].dim()
    arg_dim = tensors(args)[0].dim()

    def fwd(*args):
        if tensors(args)[0].dim() > arg_dim:
            return torch.func.vmap(fwd)(*args)
        return rule.fwd(*args)

    def bwd(residuals, g):
        if tensors(g)[0].dim() == out_dim:
            return rule.bwd(residuals, g)
        cotangents = torch.func.vmap(bwd)(residuals, g)
        return map_tensors(lambda c: c + mix * c.mean(0, keepdim=True), cotangents)

    return {"fwd": fwd, "bwd": bwd, "options": {"vmap": "broadcast_all"}}


@mutator("mixes batch", "batch|vmap")
def mixes_batch(rule):
    change = batched(rule, 0.1)
    if change is not None:
        yield change


def batched_identity(rule: RightRule) -> Mutant | None:
    """Return the rule itself, batched by hand without a mistake."""
    change = batched(rule, 0.0)
    return change and _mutant(rule, "identity, batched by hand", "", **change)
