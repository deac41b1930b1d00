"""Hessian-vector products beside every other spelling that is right.

Four workloads, four jobs: one product, twenty at a point, a block of sixteen, one of
the Gauss-Newton matrix. A spelling that raises on a workload, or whose product is off,
is left out there and named; of the others gradtools is compared with the fastest.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import gradtools as gt
from tests.benchmarks import ledger, timing
from tests.benchmarks.kept import Storages
from tests.benchmarks.ledger import Part, Row
from tests.benchmarks.rivals.contest import GRADTOOLS
from tests.benchmarks.speed import Effort

VECTORS, BLOCK = 20, 16
BARS = {"hvp": 1.03, "twenty products": 1.05, "a block of 16": 1.0, "ggnvp": 1.0}
COUNTS = {"twenty products": VECTORS, "a block of 16": BLOCK}
MOST_MEMORY = 1.05
FASTEST = "the fastest that is right"
LEANEST = "that one's peak"
GRADIENT = "one gradient"
TOLERANCE = 1e-3
FAR_BEHIND = 1.5
SECTION = "second order"

Tree = dict[str, torch.Tensor]
Run = Callable[[], Any]


class Workload(NamedTuple):
    """A model with data.

    Attributes:
        name: What it is.
        model: From parameters to logits.
        loss: From logits to a scalar.
        params: Where it is differentiated.
        vectors: Directions, with a leading dimension.
        module: The model as a module.
        x: What it is given.
        y: Its targets.
    """

    name: str
    model: Callable[[Tree], torch.Tensor]
    loss: Callable[[torch.Tensor], torch.Tensor]
    params: Tree
    vectors: Tree
    module: nn.Module
    x: torch.Tensor
    y: torch.Tensor

    def energy(self, params: Tree) -> torch.Tensor:
        """Return the loss of parameters."""
        return self.loss(self.model(params))

    def vector(self, number: int = 0) -> Tree:
        """Return one direction."""
        return {key: v[number] for key, v in self.vectors.items()}

    def doubled(self) -> Workload:
        """Return it in double precision."""
        return WORKLOADS[self.name]("cpu", torch.float64)


def of_module(
    name: str, module: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> Workload:
    """Make a workload of a module and cross-entropy."""
    fn, params, buffers = gt.functional(module)
    generator = torch.Generator().manual_seed(1)
    vectors = {
        key: torch.randn(
            VECTORS, *p.shape, generator=generator, dtype=torch.float64
        ).to(p)
        for key, p in params.items()
    }
    loss = lambda logits: F.cross_entropy(logits, y)
    model = lambda params: fn(params, buffers, x)
    return Workload(name, model, loss, params, vectors, module, x, y)


def _seeded(device: str, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    return {"device": device, "dtype": dtype}


def perceptron(device: str, dtype: torch.dtype = torch.float32) -> Workload:
    """A perceptron of a million parameters on a batch of 128."""
    to = _seeded(device, dtype)
    net = nn.Sequential(
        nn.Linear(64, 680), nn.GELU(), nn.Linear(680, 680), nn.GELU(),
        nn.Linear(680, 680), nn.GELU(), nn.Linear(680, 10),
    )  # fmt: skip
    x, y = torch.randn(128, 64), torch.randint(0, 10, (128,))
    return of_module("perceptron", net.to(**to), x.to(**to), y.to(device))


class Encoder(nn.Module):
    """Two layers of a transformer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, F.gelu, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits of the mean."""
        return self.head(self.body(x).mean(1))


def encoder(device: str, dtype: torch.dtype = torch.float32) -> Workload:
    """A transformer encoder on 16 sequences of 32."""
    to = _seeded(device, dtype)
    net = Encoder()
    x, y = torch.randn(16, 32, 64), torch.randint(0, 10, (16,))
    return of_module("transformer", net.to(**to), x.to(**to), y.to(device))


def convolutional(device: str, dtype: torch.dtype = torch.float32) -> Workload:
    """Three convolutions with norms on 32 images."""
    to = _seeded(device, dtype)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.SiLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    x, y = torch.randn(32, 3, 16, 16), torch.randint(0, 10, (32,))
    return of_module("convnet", net.to(**to), x.to(**to), y.to(device))


def logistic(device: str, dtype: torch.dtype = torch.float32) -> Workload:
    """Logistic regression on scikit-learn's digits."""
    from sklearn.datasets import load_digits

    to = _seeded(device, dtype)
    images, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(images).to(**to) / 16
    y = torch.as_tensor(labels, device=device)
    return of_module("logistic regression", nn.Linear(64, 10).to(**to), x, y)


WORKLOADS: Mapping[str, Callable[..., Workload]] = {
    "perceptron": perceptron,
    "transformer": encoder,
    "convnet": convolutional,
    "logistic regression": logistic,
}


@contextlib.contextmanager
def math() -> Iterator[None]:
    """Choose the attention that has a second derivative, for those who do not."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


# Spellings: each takes a workload and returns what is run; that returns trees.


def leaves_of(work: Workload) -> list[torch.Tensor]:
    """Return parameters that require a gradient."""
    return [p.detach().requires_grad_() for p in work.params.values()]


def gradient_by_hand(work: Workload) -> tuple[list[torch.Tensor], Any]:
    """Return leaves and the gradient with its graph."""
    leaves = leaves_of(work)
    value = work.energy(dict(zip(work.params, leaves, strict=True)))
    return leaves, torch.autograd.grad(value, leaves, create_graph=True)


def named(work: Workload, values: Any) -> Tree:
    """Return values under the names of the parameters."""
    return dict(zip(work.params, values, strict=True))


def by_hand(work: Workload) -> Run:
    """Differentiate twice."""
    v = list(work.vector().values())

    def run() -> Tree:
        with math():
            leaves, first = gradient_by_hand(work)
            return named(work, torch.autograd.grad(first, leaves, v))

    return run


def by_autograd_functional(work: Workload, product: Any) -> Run:
    """Call torch.autograd.functional."""
    params, v = tuple(work.params.values()), tuple(work.vector().values())
    f = lambda *values: work.energy(named(work, values))

    def run() -> Tree:
        with math():
            return named(work, product(f, params, v)[1])

    return run


def by_jvp_of_grad(work: Workload) -> Run:
    """Go forward over reverse."""
    v = work.vector()

    def run() -> Tree:
        with math():
            return torch.func.jvp(torch.func.grad(work.energy), (work.params,), (v,))[1]

    return run


def by_vjp_of_grad(work: Workload) -> Run:
    """Go reverse over reverse by torch.func."""
    v = work.vector()

    def run() -> Tree:
        with math():
            return torch.func.vjp(torch.func.grad(work.energy), work.params)[1](v)[0]

    return run


def by_curvlinops(kind: str) -> Callable[[Workload], Run]:
    """Multiply with an operator of curvlinops, which takes a module and batches."""

    def spelling(work: Workload) -> Run:
        import curvlinops

        v = list(work.vector().values())
        module = work.module
        params = list(module.parameters())
        matrix = getattr(curvlinops, kind)(
            module,
            nn.CrossEntropyLoss(),
            params,
            [(work.x, work.y)],
            check_deterministic=False,
        )

        def run() -> Tree:
            with math():
                return named(work, matrix @ v)

        return run

    return spelling


def twenty_by_a_graph(work: Workload) -> Run:
    """Keep the graph, and go back through it."""
    several = [list(work.vector(i).values()) for i in range(VECTORS)]

    def run() -> Any:
        with math():
            leaves, first = gradient_by_hand(work)
            return [
                named(work, torch.autograd.grad(first, leaves, v, retain_graph=True))
                for v in several
            ]

    return run


def twenty_by_linearize(work: Workload) -> Run:
    """Linearize the gradient."""
    several = [work.vector(i) for i in range(VECTORS)]

    def run() -> Any:
        with math():
            _, push = torch.func.linearize(torch.func.grad(work.energy), work.params)
            return [push(v) for v in several]

    return run


def twenty_one_by_one(work: Workload) -> Run:
    """Start anew each time."""
    params = tuple(work.params.values())
    several = [tuple(work.vector(i).values()) for i in range(VECTORS)]
    f = lambda *values: work.energy(named(work, values))

    def run() -> Any:
        with math():
            hvp = torch.autograd.functional.vhp
            return [named(work, hvp(f, params, v)[1]) for v in several]

    return run


def twenty_by_gradtools(work: Workload) -> Run:
    """Call hvp_fn."""
    several = [work.vector(i) for i in range(VECTORS)]

    def run() -> Any:
        with gt.hvp_fn(work.energy, work.params) as op:
            return [op(v) for v in several]

    return run


def block_of(work: Workload) -> Tree:
    """Return sixteen directions."""
    return {key: v[:BLOCK] for key, v in work.vectors.items()}


def block_by_a_loop(work: Workload) -> Run:
    """Go back through a kept graph, vector by vector."""
    with math():
        leaves, first = gradient_by_hand(work)
    vectors = list(block_of(work).values())

    def run() -> Any:
        with math():
            rows = [
                torch.autograd.grad(
                    first, leaves, [v[i] for v in vectors], retain_graph=True
                )
                for i in range(BLOCK)
            ]
            columns = zip(*rows, strict=True)
            return named(work, [torch.stack(column) for column in columns])

    return run


def block_by_batched_gradients(work: Workload) -> Run:
    """Go back through a kept graph once, with all vectors."""
    with math():
        leaves, first = gradient_by_hand(work)
    vectors = list(block_of(work).values())

    def run() -> Any:
        with math():
            return named(
                work,
                torch.autograd.grad(
                    first, leaves, vectors, retain_graph=True, is_grads_batched=True
                ),
            )

    return run


def block_by_vmap(work: Workload) -> Run:
    """Vectorize forward over reverse."""
    block = block_of(work)

    def run() -> Any:
        gradient = torch.func.grad(work.energy)
        with math():
            return torch.func.vmap(
                lambda v: torch.func.jvp(gradient, (work.params,), (v,))[1]
            )(block)

    return run


def block_by_gradtools(work: Workload) -> Run:
    """Call block."""
    op = gt.hvp_fn(work.energy, work.params)
    block = block_of(work)
    return lambda: op.block(block)


def gauss_newton_by_transforms(work: Workload) -> Run:
    """Push forward, and pull back, each with a forward of its own."""
    v = work.vector()

    def run() -> Tree:
        with math():
            out, pushed = torch.func.jvp(work.model, (work.params,), (v,))
            _, weighed = torch.func.jvp(torch.func.grad(work.loss), (out,), (pushed,))
            return torch.func.vjp(work.model, work.params)[1](weighed)[0]

    return run


def weighed_by(work: Workload, out: torch.Tensor, pushed: torch.Tensor) -> torch.Tensor:
    """Multiply with the Hessian of the loss."""
    z = out.detach().requires_grad_()
    (first,) = torch.autograd.grad(work.loss(z), z, create_graph=True)
    return torch.autograd.grad(first, z, pushed)[0]


def gauss_newton_by_duals(work: Workload) -> Run:
    """Push forward by dual numbers in the forward that is pulled back through."""
    from torch.autograd import forward_ad

    v = list(work.vector().values())

    def run() -> Tree:
        with math(), forward_ad.dual_level():
            leaves = leaves_of(work)
            duals = map(forward_ad.make_dual, leaves, v)
            out, pushed = forward_ad.unpack_dual(work.model(named(work, duals)))
            weighed = weighed_by(work, out, pushed.detach())
            return named(work, torch.autograd.grad(out, leaves, weighed))

    return run


def gauss_newton_by_transposition(work: Workload) -> Run:
    """Push forward by two reverse passes."""
    v = list(work.vector().values())

    def run() -> Tree:
        with math():
            leaves = leaves_of(work)
            out = work.model(named(work, leaves))
            u = torch.ones_like(out, requires_grad=True)
            back = torch.autograd.grad(out, leaves, u, create_graph=True)
            (pushed,) = torch.autograd.grad(back, u, v, retain_graph=True)
            weighed = weighed_by(work, out, pushed)
            return named(work, torch.autograd.grad(out, leaves, weighed))

    return run


def hvp_by_gradtools(work: Workload) -> Run:
    """Call hvp."""
    v = work.vector()
    return lambda: gt.hvp(work.energy, (work.params,), (v,))[0]


def ggnvp_by_gradtools(work: Workload) -> Run:
    """Call ggnvp."""
    v = work.vector()
    return lambda: gt.ggnvp(work.model, work.loss, (work.params,), (v,))[0]


Spelling = Callable[[Workload], Run]
SPELLINGS: dict[str, dict[str, Spelling]] = {
    "hvp": {
        GRADTOOLS: hvp_by_gradtools,
        "autograd.grad twice": by_hand,
        "autograd.functional.hvp": lambda work: by_autograd_functional(
            work, torch.autograd.functional.hvp
        ),
        "autograd.functional.vhp": lambda work: by_autograd_functional(
            work, torch.autograd.functional.vhp
        ),
        "jvp(grad)": by_jvp_of_grad,
        "vjp(grad)": by_vjp_of_grad,
    },
    "twenty products": {
        GRADTOOLS: twenty_by_gradtools,
        "a kept graph": twenty_by_a_graph,
        "func.linearize(grad)": twenty_by_linearize,
        "autograd.functional.vhp": twenty_one_by_one,
    },
    "a block of 16": {
        GRADTOOLS: block_by_gradtools,
        "a loop over a kept graph": block_by_a_loop,
        "is_grads_batched": block_by_batched_gradients,
        "vmap(jvp(grad))": block_by_vmap,
    },
    "ggnvp": {
        GRADTOOLS: ggnvp_by_gradtools,
        "jvp and vjp": gauss_newton_by_transforms,
        "dual numbers": gauss_newton_by_duals,
        "double vjp": gauss_newton_by_transposition,
    },
}
if importlib.util.find_spec("curvlinops"):
    SPELLINGS["hvp"]["curvlinops"] = by_curvlinops("HessianLinearOperator")
    SPELLINGS["ggnvp"]["curvlinops"] = by_curvlinops("GGNLinearOperator")


def reference(job: str, work: Workload) -> Any:
    """Return what the job should give, in double precision."""
    double = work.doubled()
    spelling = {
        "hvp": by_hand,
        "twenty products": twenty_by_a_graph,
        "a block of 16": block_by_a_loop,
        "ggnvp": gauss_newton_by_transposition,
    }[job]
    return spelling(double)()


def distance(found: Any, wanted: Any) -> float:
    """Return how far trees are apart, relative to the second."""
    pairs = list(
        zip(
            torch.utils._pytree.tree_leaves(found),
            torch.utils._pytree.tree_leaves(wanted),
            strict=True,
        )
    )
    far = sum(float((a.cpu().double() - b).square().sum()) for a, b in pairs)
    return (far / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


def able(job: str, work: Workload) -> tuple[dict[str, Run], dict[str, str]]:
    """Return the spellings that are right, and why the others are left out."""
    wanted = reference(job, work)
    right, wrong = {}, {}
    for name, spelling in SPELLINGS[job].items():
        try:
            run = spelling(work)
            off = distance(run(), wanted)
        except Exception as error:
            wrong[name] = f"raises {type(error).__name__}"
            continue
        if off < TOLERANCE:
            right[name] = run
        else:
            wrong[name] = f"is off by {off:.1g}"
    return right, wrong


def peak(run: Run) -> int:
    """Return the most bytes that were alive at once."""
    storages = Storages()
    with storages:
        run()
    return storages.peak


def measure(effort: Effort, is_quick: bool = False) -> Part:
    """Measure all jobs on all workloads; on the smallest, if that is to be quick."""
    rows: list[Row] = []
    for job in SPELLINGS:
        for name, make in WORKLOADS.items():
            if is_quick and name != "logistic regression":
                continue
            rows += of_job(job, make(effort.device), effort)
            print(f"   {job}, {name}", flush=True)
    return Part(rows)


def hopeless(runs: Mapping[str, Run], effort: Effort) -> dict[str, float]:
    """Return the seconds of those that are far behind: no race needs to show it."""
    clock = effort.race_of_processors(1).clock
    seconds = {name: min(clock(run, 1) for _ in range(2)) for name, run in runs.items()}
    best = min(seconds.values())
    return {
        name: taken
        for name, taken in seconds.items()
        if taken > FAR_BEHIND * best and name != GRADTOOLS
    }


def of_job(job: str, work: Workload, effort: Effort) -> list[Row]:
    """Compare the spellings of a job on a workload."""
    right, wrong = able(job, work)
    most = effort.rounds // 5 if job in {"hvp", "ggnvp"} else effort.rounds // 14
    gradient = gt.grad(work.energy)
    once = {GRADIENT: lambda: gradient(work.params)}
    slow = hopeless(right, effort)
    racing = {name: run for name, run in right.items() if name not in slow}
    race = effort.race_of_processors(max(3, most))._replace(warm_up=2)
    found = race.run({**racing, **once})
    peers = [name for name in racing if name != GRADTOOLS]
    fastest = min(peers, key=lambda name: found.time(name).value)
    left_out = "; ".join(f"{name} {why}" for name, why in wrong.items())
    note = f"{fastest}" + (f" ({left_out})" if left_out else "")
    ratio = found.ratio(GRADTOOLS, fastest)
    names = (SECTION, job, work.name, GRADTOOLS)
    rows = [ledger.row(*names, FASTEST, "ratio", ratio, BARS[job], note)]
    rows += [
        ledger.row(SECTION, job, work.name, name, "", "us", found.time(name))
        for name in (*racing, GRADIENT)
    ]
    rows += [
        ledger.exact(SECTION, job, work.name, name, "", "us", seconds * 1e6)
        for name, seconds in slow.items()
    ]
    each = found.ratios(GRADTOOLS, GRADIENT) / COUNTS.get(job, 1)
    rows.append(
        ledger.row(*names, GRADIENT, "ratio", timing.median(each), None, "of a product")
    )
    mine, theirs = peak(right[GRADTOOLS]), peak(right[fastest])
    rows.append(
        ledger.exact(
            *names,
            LEANEST,
            "ratio",
            mine / theirs,
            MOST_MEMORY,
            f"{mine:,} against {theirs:,} bytes ({fastest})",
        )
    )
    return rows
