"""Python source for one pattern of a rule's calls: what an expert would have written.

The general way (:mod:`.flat`) asks every call anew how its arguments, outputs and
residuals are made up. Where they are made up as last time, the code written here does
the same work with all of that spelled out. It takes nothing for granted: where a call
turns out to be different, the general way goes on from there, with what fwd or bwd has
returned.

Names in the code: ``a0`` are the leaves of the arguments, ``o0`` the output tensors,
``r0`` the leaves of the residuals, ``g0`` the cotangents of the outputs, ``n0`` whether
the gradient of a leaf is needed, ``c0`` its cotangent.
"""

from __future__ import annotations

from typing import NamedTuple

from gradtools.lowering.residuals import Source
from gradtools.lowering.text import (
    Lines,
    indented,
    names,
    numbered,
    put,
    row,
    same,
    taken,
    unless,
)
from gradtools.trees import Outline

__all__ = ["Pattern", "arguments", "fitted", "returned_names", "write"]


class Pattern(NamedTuple):
    """What the calls that share one source have in common.

    Attributes:
        names: The names of the entries.
        by_name: Whether bwd may return its cotangents by these names.
        keywords: How many of them, at the end, are passed by name.
        arguments: Outline of the entries.
        constants: By number of a leaf that is no tensor: its type.
        on_cpu: Whether all tensors among the arguments are on the CPU.
        needs: Per leaf: whether its gradient is wanted.
        metas: Per leaf: whether it is differentiable.
        outputs: Outline of the output.
        floating: Per output tensor: whether it is differentiable.
        residuals: Outline of the residuals, the arguments that bwd gets first included.
        places: Per residual leaf: where the tensor lives; of one that is no tensor, the
            test for it.
        kept: Where the saved tensors come from.
        nondiff: The arguments that bwd gets before the residuals.
        has_fwd: fwd is stated.
        fwd_takes_needs: fwd asks for ``needs``.
        bwd_takes_needs: bwd asks for ``needs``.
        materialize_grads: bwd gets zeros for cotangents that are none.
        inputs: What a second derivative runs fwd on: "none" is needed; "kept": it is
            saved for bwd anyway; "apart"; "ends": there can be no second derivative.
        has_free: fwd or bwd reads variables that may come to hold tensors.
        policy: The gradient check's policy, in force while bwd runs.
    """

    names: tuple[str, ...]
    by_name: bool
    keywords: int
    arguments: Outline
    constants: tuple[tuple[int, type], ...]
    on_cpu: bool
    needs: tuple[bool, ...]
    metas: tuple[bool, ...]
    outputs: Outline
    floating: tuple[bool, ...]
    residuals: Outline
    places: tuple[Source | str, ...]
    kept: tuple[Source, ...]
    nondiff: tuple[int, ...]
    has_fwd: bool
    fwd_takes_needs: bool
    bwd_takes_needs: bool
    materialize_grads: bool
    inputs: str
    has_free: bool
    policy: str = "first"


def write(pattern: Pattern) -> str:
    """Write ``key``, ``call``, and ``make``, which gives a forward and a backward."""
    return "\n".join(
        [
            *_find(pattern),
            *_call(pattern),
            f"def make(express, {', '.join(_metas(pattern))}):",
            *indented(_forward(pattern)),
            *indented(_backward(pattern)),
            "    return forward, backward",
        ]
    )


_DISTURBED = (
    "transformed() or dual._current_level >= 0 or autocast() or watched() "
    "or exports._is_exporting_flag"
)
_BY_TYPE = (float, complex)  # the value may differ from call to call


def _tensors(pattern: Pattern) -> list[int]:
    constants = dict(pattern.constants)
    return [
        leaf.number
        for leaf in pattern.arguments.leaves()
        if leaf.number not in constants
    ]


def _leaves(pattern: Pattern) -> str:
    return row(f"a{leaf.number}" for leaf in pattern.arguments.leaves())


def _metas(pattern: Pattern) -> list[str]:
    """Return the names of shape, dtype and device of the differentiable leaves."""
    able = [index for index, is_able in enumerate(pattern.metas) if is_able]
    fields = ("s", "d") if pattern.on_cpu else ("s", "d", "v")
    return [f"{field}{index}" for index in able for field in fields]


def _key(pattern: Pattern) -> list[tuple[str, str, str]]:
    """Return what calls of one pattern still differ in: a name, a value, a test."""
    parts = [("chosen", "policy()", "policy() is chosen")]
    for n in _tensors(pattern):
        parts.append((f"s{n}", f"a{n}.shape", f"a{n}.shape == s{n}"))
        parts.append((f"d{n}", f"a{n}.dtype", f"a{n}.dtype is d{n}"))
        if not pattern.on_cpu:
            parts.append((f"v{n}", f"a{n}.device", f"a{n}.device == v{n}"))
    for n, kind in pattern.constants:
        if kind in _BY_TYPE:
            told = f"telling_little.get(a{n})"
            parts.append((f"k{n}", told, f"{told} == k{n}"))
        elif kind is not type(None):
            parts.append((f"k{n}", f"a{n}", f"a{n} == k{n}"))
    return parts


def _find(pattern: Pattern) -> Lines:
    leaves = _leaves(pattern)
    yield f"def key{leaves}:"
    yield f"    return {row(value for _, value, _ in _key(pattern))}"
    yield ""
    yield f"def find{leaves}:"
    yield "    global last"
    yield f"    found = key{leaves}"
    yield "    apply = known.get(found)"
    yield "    if apply is not None:"
    yield "        last = (apply, *found)"
    yield "    return apply"
    yield ""


def _call(pattern: Pattern) -> Lines:
    constants = dict(pattern.constants)
    key = _key(pattern)
    yield "def call(entries):"
    yield f"    if not grad_enabled() or moment.is_plain or {_DISTURBED}:"
    yield "        return astray"
    yield f"    if len(entries) != {len(pattern.arguments.children)}:"
    yield "        return astray"
    inside = list(taken(pattern.arguments, "entries", "a", "return astray"))
    yield from indented(line for line in inside[2:])  # a tuple it is
    yield f"    {row(['apply', *(name for name, _, _ in key)])} = last"
    yield "    try:"
    tests: list[str] = []
    for number, (need, able) in enumerate(
        zip(pattern.needs, pattern.metas, strict=True)
    ):
        kind = constants.get(number)
        if kind is type(None):
            tests.append(f"a{number} is None")
        elif kind is not None:
            tests.append(f"type(a{number}) is {kind.__name__}")
        else:
            tests += [f"a{number}.is_cpu"] if pattern.on_cpu else []
            tests += (
                [f"{'' if need else 'not '}a{number}.requires_grad"] if able else []
            )
    yield from indented(unless(tests, "return astray"))
    found = unless([test for _, _, test in key], f"apply = find{_leaves(pattern)}")
    yield from indented(found)
    given = [
        f"a{number}" if number in constants else f"alive(a{number})"
        for number in range(len(pattern.needs))
    ]
    yield f"        leaves = {row(given)}"
    yield "    except (AttributeError, TypeError):  # no tensor; symbolic sizes"
    yield "        return astray"
    yield "    if apply is None:"
    yield "        return astray"
    if pattern.has_free:
        yield f"    if owes({_leaves(pattern)}):"
        yield "        return astray"
    yield "    out = apply(*leaves)"
    outputs = pattern.outputs
    if outputs.kind is None:
        yield "    return out if isinstance(out, Tensor) else unpacked(out)"
    else:
        yield "    if isinstance(out, Tensor) or type(out[-1]) is Layout:"
        yield "        return unpacked(out)"
        if outputs.kind is tuple and not any(child.kind for child in outputs.children):
            yield "    return out"
        else:
            yield f"    {row(names('o', outputs))} = out"
            yield f"    return {put(outputs, numbered('o'))}"
    yield ""


def arguments(pattern: Pattern) -> str:
    """Return the text of the arguments with which fun or fwd is called."""
    given = [put(child, numbered("a")) for child in pattern.arguments.children]
    if pattern.keywords:
        split = len(given) - pattern.keywords
        named = zip(pattern.names[split:], given[split:], strict=True)
        given = [*given[:split], *(f"{name}={value}" for name, value in named)]
    if pattern.fwd_takes_needs:
        needs = put(pattern.arguments, lambda number: str(pattern.needs[number]))
        given.append(f"needs={needs}")
    return ", ".join(given)


def _forward(pattern: Pattern) -> Lines:
    leaves = _leaves(pattern)
    stray = f"return general_forward(express, ctx, {leaves}, returned)"
    role = "fwd" if pattern.has_fwd else "fun"
    yield f"def forward(ctx, {leaves[1:-1]}):"
    yield "    try:"
    yield f"        returned = {role}({arguments(pattern)})"
    yield "    except Exception as error:"
    yield f"        note(error, rule, {role!r})"
    yield "        raise"
    *first, own = pattern.residuals.children if pattern.nondiff else [pattern.residuals]
    if pattern.has_fwd:
        yield "    if type(returned) is not tuple or len(returned) != 2:"
        yield f"        {stray}"
        yield "    out, residuals = returned"
        yield from indented(taken(pattern.outputs, "out", "o", stray))
        yield from indented(taken(own, "residuals", "r", stray))
    else:
        yield from indented(taken(pattern.outputs, "returned", "o", stray))
        first = [*first, *own.children]  # (arguments, output), by construction
    sources = [pattern.arguments.children[index] for index in pattern.nondiff]
    if not pattern.has_fwd:
        sources += [pattern.arguments]
        yield from indented(same(own.children[1], "r", pattern.outputs, "o"))
    for to, source in zip(first, sources, strict=False):
        yield from indented(same(to, "r", source, "a"))
    yield from unless(_identities(pattern), stray)
    saved = [_kept(pattern)[source] for source in pattern.kept]
    yield f"    ctx.to_save = {row(saved)}"
    constants = [
        f"r{n}" for n, place in enumerate(pattern.places) if isinstance(place, str)
    ]
    if constants:
        yield f"    ctx.constants = {row(constants)}"
    if pattern.inputs == "apart":
        yield f"    ctx.inputs = Inputs({leaves}, express.layout)"
    elif pattern.inputs == "ends":
        yield f"    ctx.inputs = Ends({leaves})"
    if not pattern.materialize_grads:
        yield "    ctx.set_materialize_grads(False)"
    outputs = names("o", pattern.outputs)
    yield f"    return {outputs[0] if pattern.outputs.kind is None else row(outputs)}"
    yield ""


def _identities(pattern: Pattern) -> list[str]:
    """Return the tests that every tensor is where it was when the code was written."""
    arguments = [f"a{number}" for number in _tensors(pattern)]
    tests: list[str] = []
    known = list(arguments)
    for out in names("o", pattern.outputs):
        tests.append(f"isinstance({out}, Tensor)")
        tests += [f"{out} is not {other}" for other in known]
        known.append(out)
    kept = _kept(pattern)
    given = {f"r{number}" for number in _given(pattern)}
    for number, place in enumerate(pattern.places):
        name = f"r{number}"
        if name in given:
            continue
        if isinstance(place, str):
            tests.append(place.format(name))
        elif kept[place] != name:
            tests.append(f"{name} is {kept[place]}")
        else:
            tests.append(f"isinstance({name}, Tensor)")
            tests += [f"{name} is not {other}" for other in known]
            tests.append(f"not {name}.requires_grad")
            known.append(name)
    return tests


def _given(pattern: Pattern) -> list[int]:
    """Return the residual leaves that need no test: they were not fwd's to choose."""
    if not pattern.has_fwd:
        return [leaf.number for leaf in pattern.residuals.leaves()]
    count = len(pattern.nondiff)
    front = pattern.residuals.children[:count] if count else ()
    return [leaf.number for child in front for leaf in child.leaves()]


def _kept(pattern: Pattern) -> dict[Source, str]:
    """Return the name by which the code knows each tensor that is saved."""
    known: dict[Source, str] = {}
    for number, place in enumerate(pattern.places):
        if isinstance(place, Source):
            prefix = {"input": "a", "output": "o"}.get(place.kind)
            name = f"{prefix}{place.number}" if prefix else f"r{number}"
            known.setdefault(place, name)
    return known


def _backward(pattern: Pattern) -> Lines:
    count = len(pattern.floating)
    given = ", ".join(f"g{index}" for index in range(count))
    yield f"def backward(ctx, {given}, *_):"
    yield f"    if ctx.astray or grad_enabled() or {_DISTURBED}:"
    yield f"        return general_backward(express, ctx, ({given},))"
    kept = _kept(pattern)
    if pattern.kept:
        saved = row(kept[source] for source in pattern.kept)
        yield f"    {saved} = ctx.saved_tensors"
    where = {
        number: kept[place] if isinstance(place, Source) else f"r{number}"
        for number, place in enumerate(pattern.places)
    }
    constants = [f"r{n}" for n, p in enumerate(pattern.places) if isinstance(p, str)]
    if constants:
        yield f"    {row(constants)} = ctx.constants"
    residuals = pattern.residuals
    parts = residuals.children if pattern.nondiff else [residuals]
    passed = [put(part, where.__getitem__) for part in parts]
    cotangents = [
        f"g{i}" if able else "None" for i, able in enumerate(pattern.floating)
    ]
    passed.append(put(pattern.outputs, cotangents.__getitem__))
    if pattern.bwd_takes_needs:
        needs = [f"n{index}" for index in range(len(pattern.needs))]
        yield f"    {row(needs)} = ctx.needs_input_grad"
        passed.append("needs=" + put(pattern.arguments, numbered("n")))
    yield "    try:"
    yield f"        returned = bwd({', '.join(passed)})"
    yield "    except Exception as error:"
    yield "        note(error, rule, 'bwd')"
    yield "        raise"
    if pattern.inputs in ("apart", "ends"):
        yield "    if not graph_is_kept():"
        yield "        ctx.inputs = None"
    yield from indented(fitted(pattern, "return refitted(express, returned)"))
    yield ""


def returned_names(pattern: Pattern) -> frozenset[str]:
    """Return the names under which bwd may return cotangents."""
    names = enumerate(pattern.names)
    return frozenset(name for index, name in names if index not in pattern.nondiff)


def fitted(pattern: Pattern, wrong: str) -> Lines:
    """Verify what bwd returned, and return it flat.

    Args:
        pattern: What the call looks like.
        wrong: What to do where the return is put in another way.
    """
    children = {
        f"t{index}": child
        for index, child in enumerate(pattern.arguments.children)
        if index not in pattern.nondiff
    }
    able = [
        part
        for part, child in children.items()
        if any(pattern.metas[leaf.number] for leaf in child.leaves())
    ]
    yield f"if type(returned) is tuple and len(returned) == {len(children)}:"
    yield f"    {row(children)} = returned"
    if pattern.by_name:
        yield "elif type(returned) is dict and returned.keys() <= names:"
        for part in children:
            name = pattern.names[int(part[1:])]
            yield f"    {part} = returned.get({name!r})"
    yield "else:"
    if len(able) == 1 and not children[able[0]].kind:
        for part in children:
            yield f"    {part} = {'returned' if part in able else 'None'}"
    else:
        yield f"    {wrong}"
    for part, child in children.items():
        yield from taken(child, part, "c", wrong, optional=True)
    for index in pattern.nondiff:
        for name in names("c", pattern.arguments.children[index]):
            yield f"{name} = None"
    tests: list[str] = []
    for index, is_able in enumerate(pattern.metas):
        c = f"c{index}"
        if not is_able:
            tests.append(f"{c} is None")
            continue
        device = f"{c}.is_cpu" if pattern.on_cpu else f"{c}.device == v{index}"
        tests.append(
            f"({c} is None or ({c}.shape == s{index} and {c}.dtype is d{index} "
            f"and {device}))"
        )
    yield "try:"
    yield from unless(tests, wrong)
    yield "except AttributeError:  # no tensor"
    yield f"    {wrong}"
    cotangents = [f"c{index}" for index in range(len(pattern.metas))]
    yield f"return {cotangents[0] if len(cotangents) == 1 else row(cotangents)}"
