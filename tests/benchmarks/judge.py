"""The judge: whether a mutant is wrong at all, found without gradtools.

It calls the mutant's fwd and bwd directly, in float64, with unit cotangents, normal
ones, large ones and small ones, at the arguments of the case and at ten times those,
and compares with autograd of the function; then a second derivative through fwd and
bwd; then whether anything was edited, drawn at random or captured, and whether
batches are what a loop gives. A mutant with none of these differences is equivalent.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from tests.benchmarks.mutators import Mutant, get, map_tensors, tensors
from tests.benchmarks.right_rules import RULES, RightRule

TOLERANCE = 1e-6
UNITS = 256  # beyond so many outputs, normal cotangents alone show linear differences
FAR = 10.0
SCALES = (1e4, 1e-4)


class Verdict(NamedTuple):
    """Whether a mutant counts, and by what it was found."""

    counts: bool
    why: str


class Point(NamedTuple):
    """Arguments, cotangents, and what autograd returns for each of these."""

    args: tuple[Any, ...]
    gs: list[Any]
    right: list[list[torch.Tensor]]


def judge(mutant: Mutant, seed: int) -> Verdict:
    """Return whether a mutant differs from its function, on the arguments of a seed."""
    rule = RULES[mutant.rule]
    for why, wrong in _QUESTIONS.items():
        if wrong(mutant, rule, seed):
            return Verdict(True, why)
    return Verdict(False, "equivalent")


def differs(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether two tensors differ, relative to the largest entry of ``right``."""
    scale = right.abs().max().item() or 1.0
    # Not "greater than": NaN differs.
    return not (left - right).abs().max().item() <= TOLERANCE * scale


def copied(tree):
    return map_tensors(lambda leaf: leaf.detach().clone(), tree)


def _generator(seed):
    # Of no seed that arguments are drawn with.
    return torch.Generator().manual_seed(10**6 + seed)


def normal_like(tree, generator):
    return map_tensors(
        lambda leaf: torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype),
        tree,
    )


def _units(out):
    """Return cotangents with a single one (and a single i) in them."""
    leaves, spec = pytree.tree_flatten(out)
    for number, leaf in enumerate(leaves):
        for index in range(leaf.numel()):
            for one in (1, 1j) if leaf.is_complex() else (1,):
                unit = [torch.zeros(o.shape, dtype=o.dtype) for o in leaves]
                unit[number].view(-1)[index] = one
                yield pytree.tree_unflatten(unit, spec)


def autograd(fun, args, g, create_graph=False):
    """Return autograd's cotangents of the differentiable arguments, flat."""
    outs = tensors(fun(*args))
    given = [
        (out, c) for out, c in zip(outs, tensors(g), strict=True) if out.requires_grad
    ]
    leaves = tensors(args)
    found = torch.autograd.grad(
        [out for out, _ in given],
        leaves,
        [c for _, c in given],
        allow_unused=True,
        create_graph=create_graph,
    )
    return [
        torch.zeros_like(leaf) if c is None else c
        for leaf, c in zip(leaves, found, strict=True)
    ]


@functools.cache
def rule_keys(rule_name: str) -> list[tuple[Any, ...]]:
    """Return where the differentiable arguments of a rule are."""
    return [place.keys for place in RULES[rule_name].places()]


@functools.lru_cache(maxsize=8)
def point(rule_name: str, seed: int, factor: float) -> Point:
    """Return arguments of a rule, times ``factor`` where real, and right answers."""
    rule = RULES[rule_name]
    args = map_tensors(
        lambda leaf: leaf if leaf.is_complex() else leaf * factor,
        rule.args(torch.float64, seed),
    )
    out = rule.fun(*args)
    generator = _generator(seed)
    gs = [normal_like(out, generator) for _ in range(3)]
    if sum(leaf.numel() for leaf in tensors(out)) <= UNITS:
        gs += _units(out)
    active = map_tensors(lambda leaf: leaf.clone().requires_grad_(), args)
    return Point(args, gs, [autograd(rule.fun, active, g) for g in gs])


def cotangents(mutant: Mutant, rule: RightRule, args, g):
    """Return what fwd and then bwd give for each differentiable argument; or None."""
    _, residuals = mutant.fwd(*args)
    returned = mutant.bwd(residuals, g)
    return [get(returned, keys) for keys in rule_keys(rule.name)]


def filled(found, args):
    return [
        torch.zeros_like(arg) if c is None else c
        for c, arg in zip(found, tensors(args), strict=True)
    ]


# Questions: each is a way to be wrong. Their order matters: what is impure or has
# another shape is not to be compared.


def _edits(mutant, rule, seed):
    args, (g, *_), _ = point(rule.name, seed, 1.0)
    args, g = copied(args), copied(g)
    kept_args, kept_g = copied(args), copied(g)
    _, residuals = mutant.fwd(*args)
    kept = copied(residuals)
    mutant.bwd(residuals, g)
    before = tensors((kept_args, kept, kept_g))
    after = tensors((args, residuals, g))
    return not all(map(torch.equal, before, after))


def _captures(mutant, rule, seed):
    args, _, _ = point(rule.name, seed, 1.0)
    outs = tensors(mutant.fwd(*copied(args))[0]) + tensors(mutant.fun(*copied(args)))
    return any(out.requires_grad for out in outs)


def _fwd_differs(mutant, rule, seed):
    args, _, _ = point(rule.name, seed, 1.0)
    given, expected = mutant.fwd(*copied(args))[0], mutant.fun(*copied(args))
    return any(map(differs, tensors(given), tensors(expected)))


def _misfits(mutant, rule, seed):
    args, (g, *_), _ = point(rule.name, seed, 1.0)
    found = cotangents(mutant, rule, copied(args), copied(g))
    return any(
        c is not None and (c.shape != arg.shape or c.dtype != arg.dtype)
        for c, arg in zip(found, tensors(args), strict=True)
    )


def _is_random(mutant, rule, seed):
    args, (g, *_), _ = point(rule.name, seed, 1.0)
    one, other = (
        filled(cotangents(mutant, rule, copied(args), copied(g)), args)
        for _ in range(2)
    )
    return not all(torch.equal(*pair) for pair in zip(one, other, strict=True)) and (
        not any(c.isnan().any() for c in one)
    )


def _first_order(mutant, rule, seed, factor):
    args, gs, right = point(rule.name, seed, factor)
    _, residuals = mutant.fwd(*copied(args))
    for g, expected in zip(gs, right, strict=True):
        if _any_differs(_answer(mutant, rule, residuals, args, g), expected):
            return True
    g, expected = gs[0], right[0]
    for scale in SCALES:
        scaled = map_tensors(lambda c, scale=scale: c * scale, g)
        found = _answer(mutant, rule, residuals, args, scaled)
        if _any_differs([c / scale for c in found], expected):
            return True
    return False


def _answer(mutant, rule, residuals, args, g):
    returned = mutant.bwd(residuals, g)
    return filled([get(returned, keys) for keys in rule_keys(rule.name)], args)


def _any_differs(found, expected):
    return any(differs(*pair) for pair in zip(found, expected, strict=True))


def _second_order(mutant, rule, seed):
    """Compare derivatives of <bwd, w>, in the arguments and in g, with autograd's."""
    args, (g, *_), _ = point(rule.name, seed, 1.0)
    weights = normal_like(tensors(args), _generator(seed + 1))
    found, expected = (
        _derivative(first, copied(args), copied(g), weights)
        for first in (
            lambda args, g: filled(cotangents(mutant, rule, args, g), args),
            lambda args, g: autograd(rule.fun, args, g, create_graph=True),
        )
    )
    return _any_differs(found, expected)


def _derivative(first, args, g, weights):
    leaves = [leaf.requires_grad_() for leaf in tensors((args, g))]
    # An argument that enters nowhere would be another error than the one sought.
    products = [
        (c * w.conj()).real.sum()
        for c, w in zip(first(args, g), weights, strict=True)
        if c.requires_grad
    ]
    if not products:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(sum(products), leaves, allow_unused=True)
    return [
        torch.zeros_like(leaf) if c is None else c
        for leaf, c in zip(leaves, found, strict=True)
    ]


def _batch_differs(mutant, rule, seed):
    """Compare a batch of three with a loop, where bwd is batched by hand."""
    if mutant.options.get("vmap") != "broadcast_all":
        return False
    points = [point(rule.name, seed + i, 1.0) for i in range(3)]
    args = _stacked([p.args for p in points])
    g = _stacked([p.gs[0] for p in points])
    found = cotangents(mutant, rule, args, g)
    looped = [cotangents(mutant, rule, copied(p.args), p.gs[0]) for p in points]
    return _any_differs(found, [torch.stack(c) for c in zip(*looped, strict=True)])


def _stacked(trees):
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)


_QUESTIONS = {
    "captures a parameter": _captures,
    "edits in place": _edits,
    "fwd is not the function": _fwd_differs,
    "shape or dtype": _misfits,
    "random": _is_random,
    "first order": functools.partial(_first_order, factor=1.0),
    "first order, far away": functools.partial(_first_order, factor=FAR),
    "batch": _batch_differs,
    "second order": _second_order,
}
