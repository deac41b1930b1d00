"""The same rules in JAX, on a CPU in float32: another framework, for orientation.

Both get one thread. JAX's dispatch, its arrays and its compiler are others, so there is
no bar: what is compared is what a user of each waits for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy
import torch

from tests.benchmarks import compiled, ledger
from tests.benchmarks.ledger import Part, Row
from tests.benchmarks.rivals import CONTESTS, TINY, Contest
from tests.benchmarks.rivals.contest import GRADTOOLS
from tests.benchmarks.speed import Effort

EAGER, JIT, COMPILED = "jax", "jax.jit", "gradtools, torch.compile"


class Twin(NamedTuple):
    """A rule as JAX has it, and how it is called."""

    fun: Callable[..., Any]
    fwd: Callable[..., Any]
    bwd: Callable[..., Any]


def imported() -> Any:
    """Return jax with one thread, or None where it is not installed."""
    one_thread = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ.setdefault("XLA_FLAGS", one_thread)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        import jax
    except ImportError:
        return None
    return jax


def twins(jax: Any) -> dict[str, Twin]:
    """Return the rules, with the arithmetic of the others."""
    np = jax.numpy

    def swish_fwd(x, beta):
        s = jax.nn.sigmoid(beta * x)
        return x * s, (x, beta, s)

    def swish_bwd(residuals, g):
        x, beta, s = residuals
        ds = s * (1 - s)
        return g * (s + x * beta * ds), (g * x * x * ds).sum()

    def linear(x, w, b):
        return x @ w.T + b

    def linear_bwd(residuals, g):
        x, w = residuals
        # custom_vjp of jax is not told what is needed; jit removes what is not.
        return g @ w, g.T @ x, g.sum(0)

    def affine(x, params):
        y = x * params["scale"] + params["shift"]
        return y, y * y

    def affine_fwd(x, params):
        y, square = affine(x, params)
        return (y, square), (x, params["scale"], y)

    def affine_bwd(residuals, g):
        x, scale, y = residuals
        g_y, g_square = g
        total = g_y + 2 * y * g_square
        return total * scale, {"scale": total * x, "shift": total}

    return {
        "exp": Twin(np.exp, lambda x: (np.exp(x),) * 2, lambda y, g: (g * y,)),
        "swish": Twin(lambda x, beta: swish_fwd(x, beta)[0], swish_fwd, swish_bwd),
        "linear": Twin(linear, lambda x, w, b: (linear(x, w, b), (x, w)), linear_bwd),
        "affine": Twin(affine, affine_fwd, affine_bwd),
    }


def steps(
    jax: Any, twin: Twin, args: Any, argnums: Sequence[int]
) -> dict[str, Callable[[], Any]]:
    """Return forward and backward, eager and under jit."""
    rule = jax.custom_vjp(twin.fun)
    rule.defvjp(twin.fwd, twin.bwd)
    args = jax.tree.map(lambda x: jax.numpy.asarray(x.numpy()), args)
    g = jax.tree.map(jax.numpy.ones_like, rule(*args))

    def step(args, g):
        out, pull = jax.vjp(rule, *args)
        gradients = pull(g)
        return out, [gradients[position] for position in argnums]

    fast = jax.jit(step)
    return {
        EAGER: lambda: jax.block_until_ready(step(args, g)),
        JIT: lambda: jax.block_until_ready(fast(args, g)),
    }


def measure(effort: Effort, is_quick: bool = False) -> Part | str:
    """Measure, or return why not."""
    jax = imported()
    if jax is None:
        return "jax is not installed"
    if effort.device != "cpu":
        return "the twins in jax run on a CPU"
    rows: list[Row] = []
    for size_name, size, rounds in (
        ("tiny", TINY, effort.rounds // 2),
        ("a million", 10**6, effort.rounds_large // 3),
    ):
        for rule, twin in twins(jax).items():
            if is_quick and (rule != "swish" or size != TINY):
                continue
            contest = CONTESTS[rule]
            args = contest.arguments(size)
            in_jax = steps(jax, twin, args, contest.argnums)
            agree(jax, contest, in_jax[JIT], args)
            spelling = contest.spellings[GRADTOOLS]
            torch._dynamo.reset()
            backend = "inductor" if compiled.has_compiler("cpu") else "aot_eager"
            fast = torch.compile(
                compiled.separate(spelling), fullgraph=True, backend=backend
            )
            runs = {
                GRADTOOLS: contest.step(spelling, args),
                COMPILED: contest.step(fast, args),
                **in_jax,
            }
            found = effort.race(max(3, rounds)).run(runs)
            rows += [
                ledger.row(
                    "jax",
                    f"forward + backward, {size_name}",
                    rule,
                    name,
                    "",
                    "us",
                    found.time(name),
                    note=f"jax {jax.__version__}",
                )
                for name in runs
            ]
    return Part(rows)


def agree(jax: Any, contest: Contest, run: Callable[[], Any], args: Any) -> None:
    """Make sure that both compute the same."""
    _, gradients = run()
    found = contest.step(contest.spellings[GRADTOOLS], args)()
    for mine, other in zip(found, jax.tree.leaves(gradients), strict=True):
        theirs = torch.from_numpy(numpy.array(other))
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
