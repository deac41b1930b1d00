"""A step of MAML beside TorchOpt, higher, torch.func, autograd by hand, and compiled.

The gradient of the loss after five steps of gradient descent, in the weights before
them, for one task and a small perceptron: all of them compute it, and are checked to.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import gradtools as gt
from tests.benchmarks import ledger
from tests.benchmarks.compiled import has_compiler
from tests.benchmarks.curvature import SECTION, distance
from tests.benchmarks.ledger import Part, Row
from tests.benchmarks.rivals.contest import GRADTOOLS
from tests.benchmarks.speed import Effort

WORK = "a step of MAML"
STEPS, RATE = 5, 0.1
FUNC, BY_HAND = "torch.func.grad", "autograd.grad by hand"
COMPILED, HIGHER, TORCHOPT = "gradtools, compiled", "higher", "TorchOpt"

Tree = dict[str, torch.Tensor]


def module() -> nn.Module:
    """Return the network."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5))


class Task:
    """A network, images to adapt to, and images to be judged by."""

    def __init__(self, device: str) -> None:
        self.module = module().to(device)
        self.fn, self.params, self.buffers = gt.functional(self.module)
        self.x, self.z = (torch.randn(25, 64, device=device) for _ in range(2))
        self.y = torch.arange(5, device=device).repeat_interleave(5)

    def loss(self, params: Tree, x: torch.Tensor) -> torch.Tensor:
        """Return the loss of parameters."""
        return F.cross_entropy(self.fn(params, self.buffers, x), self.y)

    def after(self, params: Tree, grad: Callable[..., Any]) -> torch.Tensor:
        """Return the loss after adaptation."""
        for _ in range(STEPS):
            slope = grad(self.loss)(params, self.x)
            params = {key: p - RATE * slope[key] for key, p in params.items()}
        return self.loss(params, self.z)


def by_transforms(task: Task, grad: Callable[..., Any]) -> Callable[[], Tree]:
    """Differentiate through gradients."""
    meta = grad(lambda params: task.after(params, grad))
    return lambda: meta(task.params)


def compiled(task: Task) -> Callable[[], Tree]:
    """Compile that."""
    meta = gt.grad(lambda params: task.after(params, gt.grad))
    step = torch.compile(meta, fullgraph=True)
    return lambda: step(task.params)


def by_hand(task: Task) -> Callable[[], Tree]:
    """Keep the graph of every gradient."""

    def run() -> Tree:
        start = {k: p.detach().requires_grad_() for k, p in task.params.items()}
        params = start
        for _ in range(STEPS):
            value = task.loss(params, task.x)
            slope = torch.autograd.grad(value, params.values(), create_graph=True)
            pairs = zip(params.items(), slope, strict=True)
            params = {key: p - RATE * g for (key, p), g in pairs}
        found = torch.autograd.grad(task.loss(params, task.z), start.values())
        return dict(zip(start, found, strict=True))

    return run


def by_higher(task: Task) -> Callable[[], Tree]:
    """Let higher patch the module."""
    import higher

    network = task.module
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)

    def run() -> Tree:
        with higher.innerloop_ctx(network, optimizer) as (patched, inner):
            for _ in range(STEPS):
                inner.step(F.cross_entropy(patched(task.x), task.y))
            value = F.cross_entropy(patched(task.z), task.y)
            found = torch.autograd.grad(value, list(patched.parameters(time=0)))
        return dict(zip(task.params, found, strict=True))

    return run


def by_torchopt(task: Task) -> Callable[[], Tree]:
    """Let TorchOpt update a module and put it back."""
    import torchopt

    network = task.module
    inner = torchopt.MetaSGD(network, lr=RATE)
    start = torchopt.extract_state_dict(network, by="reference")
    begin = torchopt.extract_state_dict(inner, by="reference")
    leaves = list(network.parameters())

    def run() -> Tree:
        for _ in range(STEPS):
            inner.step(F.cross_entropy(network(task.x), task.y))
        value = F.cross_entropy(network(task.z), task.y)
        found = torch.autograd.grad(value, leaves)
        torchopt.recover_state_dict(network, start)
        torchopt.recover_state_dict(inner, begin)
        return dict(zip(task.params, found, strict=True))

    return run


def contenders(device: str) -> dict[str, Callable[[], Tree]]:
    """Return who is here, each with a task of its own, all the same."""

    def task() -> Task:
        return Task(device)

    found: dict[str, Callable[[], Tree]] = {
        GRADTOOLS: by_transforms(task(), gt.grad),
        FUNC: by_transforms(task(), torch.func.grad),
        BY_HAND: by_hand(task()),
    }
    if importlib.util.find_spec("higher"):
        found[HIGHER] = by_higher(task())
    if importlib.util.find_spec("torchopt"):
        found[TORCHOPT] = by_torchopt(task())
    if has_compiler(device):
        found[COMPILED] = compiled(task())
    return found


def measure(effort: Effort) -> Part:
    """Compare them."""
    runs = contenders(effort.device)
    wanted = {key: p.double().cpu() for key, p in runs[BY_HAND]().items()}
    right = {n: run for n, run in runs.items() if distance(run(), wanted) < 1e-4}
    found = effort.race_of_processors(max(3, effort.rounds // 4)).run(right)
    names = SECTION, WORK, "perceptron"
    rows: list[Row] = [
        ledger.row(*names, GRADTOOLS, name, "ratio", found.ratio(GRADTOOLS, name))
        for name in right
        if name != GRADTOOLS
    ]
    rows += [ledger.row(*names, name, "", "us", found.time(name)) for name in right]
    torch._dynamo.reset()
    return Part(rows)
