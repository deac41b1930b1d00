"""Ten transformer layers with dropout, each run again in the backward.

The parameters are an argument, so they get gradients. The state of the random numbers
is a residual, so the second run has the dropout of the first.
"""

import weakref
from timeit import timeit

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gradtools as gt

torch.manual_seed(0)
layer = lambda: torch.nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True)
layers = torch.nn.ModuleList(layer() for _ in range(10))
call, *_ = gt.functional(layers[0])  # all ten are made alike


@gt.custom_vjp(once_differentiable=True)
def rerun(params, x):
    return call(params, {}, x)


@rerun.def_fwd
def _(params, x):
    state = torch.get_rng_state()
    return call(params, {}, x), (params, x, state)


@rerun.def_bwd
def _(residuals, g):
    params, x, state = residuals
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.set_rng_state(state)
        inputs = [p.detach().requires_grad_() for p in (*params.values(), x)]
        out = call(dict(zip(params, inputs, strict=False)), {}, inputs[-1])
    *found, of_x = torch.autograd.grad(out, inputs, g)
    return dict(zip(params, found, strict=True)), of_x


class Peak(TorchDispatchMode):  # the most bytes at one time
    alive = most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, out if type(out) is tuple else (out,)):
            memory = tensor.untyped_storage()
            if not hasattr(memory, "end"):
                memory.end = weakref.finalize(memory, self.add, -memory.nbytes())
                self.add(memory.nbytes())
        return out

    def add(self, size):
        self.alive += size
        self.most = max(self.most, self.alive)


def step(run, x):
    torch.manual_seed(1)  # the same dropout for all
    for layer in layers:
        x = run(layer, x)
    return torch.autograd.grad(x.square().mean(), [*layers.parameters()])


x, memory, seconds, gradients = torch.randn(8, 64, 32), {}, {}, {}
for name, run in {
    "nothing": lambda layer, x: layer(x),
    "torch": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
    "a rule": lambda layer, x: rerun(dict(layer.named_parameters()), x),
}.items():
    gradients[name] = step(run, x)  # and the check
    with Peak() as peak:
        step(run, x)
    memory[name] = peak.most / 2**20
    seconds[name] = timeit("step(run, x)", globals=globals(), number=2) / 2
    print(f"checkpointed by {name}: {memory[name]:.1f} MiB, {seconds[name]:.2f} s")
