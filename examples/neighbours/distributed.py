"""DDP and FSDP2: rules in modules whose parameters are replicated, or sharded.

Run it on two CPU processes: ``torchrun --nproc-per-node 2 distributed.py``. It prints
how far the gradients are, on any of them, from those of one process with all the data.
"""

import copy
import os

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradtools as gt


@gt.custom_vjp
def swish(x, beta):
    """Return ``x * sigmoid(beta * x)``."""
    return x * torch.sigmoid(beta * x)


@swish.def_bwd
def _(residuals, g):
    ((x, beta), _) = residuals
    s = torch.sigmoid(beta * x)
    ds = s * (1 - s)
    return g * (s + x * beta * ds), (g * x * x * ds).sum(0)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.beta = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return swish(self.linear(x), self.beta)


def gradients(module, x):
    """Return the gradients by name; whole, where a parameter is a shard."""
    module.zero_grad()
    module(x).square().mean().backward()
    found = {}
    for name, parameter in module.named_parameters():
        whole = getattr(parameter.grad, "full_tensor", lambda g=parameter.grad: g)()
        found[name.removeprefix("module.")] = whole.clone()
    return found


def main():
    """Compare both with one process."""
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    model, x = nn.Sequential(Layer(), Layer()), torch.randn(8 * size, 4)
    expected = gradients(copy.deepcopy(model), x)
    mine = x.chunk(size)[rank]
    replicated = DistributedDataParallel(copy.deepcopy(model))
    sharded = copy.deepcopy(model)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (size,)))
    for name, module in {"ddp": replicated, "fsdp2": sharded}.items():
        found = gradients(module, mine)
        errors = [(found[key] - expected[key]).abs().max() for key in expected]
        off = torch.stack(errors).max()
        distributed.all_reduce(off, distributed.ReduceOp.MAX)
        if rank == 0:  # one process speaks: two would write into each other's line
            print(f"{name}: off by {off:.1e} on {size} processes", flush=True)
    distributed.destroy_process_group()
    os._exit(0)  # gloo's threads can abort an interpreter that ends: pytorch#190489


if __name__ == "__main__":
    main()
