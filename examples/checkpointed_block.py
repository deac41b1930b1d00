"""Ten transformer layers with dropout, each run again in the backward.

What is kept is the arguments alone. The parameters are an argument, so they get
gradients; the state of the random numbers is a residual, so that the dropout of the
second run is that of the first.
"""

import time
import weakref

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gradtools as gt

torch.manual_seed(0)
layers = nn.ModuleList(
    nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    for _ in range(10)
)
call, *_ = gt.functional(layers[0])  # all ten are made alike


@gt.custom_vjp(once_differentiable=True)
def rematerialized(params, x):
    return call(params, {}, x)


@rematerialized.def_fwd
def _(params, x):
    state = torch.get_rng_state()
    return call(params, {}, x), (params, x, state)


@rematerialized.def_bwd
def _(residuals, g):
    params, x, state = residuals
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state)
        _, pullback = gt.vjp(lambda params, x: call(params, {}, x), params, x)
        return pullback(g)


by_gradtools = lambda layer, x: rematerialized(dict(layer.named_parameters()), x)
by_torch = lambda layer, x: checkpoint(layer, x, use_reentrant=False)
plain = lambda layer, x: layer(x)


class Peak(TorchDispatchMode):
    """The most bytes that were alive at one time, of those made under it."""

    def __init__(self):
        super().__init__()
        self.alive = self.most = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            memory = tensor.untyped_storage() if torch.is_tensor(tensor) else None
            if memory is not None and memory not in self.known:
                self.known.add(memory)
                self.alive += memory.nbytes()
                weakref.finalize(memory, self.free, memory.nbytes())
        self.most = max(self.most, self.alive)
        return out

    def free(self, size):
        self.alive -= size


def step(run, x):
    layers.zero_grad()
    torch.manual_seed(1)  # the same dropout for all
    for layer in layers:
        x = run(layer, x)
    x.square().mean().backward()
    return [p.grad.clone() for p in layers.parameters()]
