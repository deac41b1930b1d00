"""Two processes train with a rule inside, to the same numbers as without."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import gradtools as gt
from tests.runtime.rules import native, swish

WORLD = 2

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo"
)


class Network(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.activation = activation
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 2)
        self.beta = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x):
        beta = self.beta.squeeze()
        return self.outer(self.activation(self.inner(x), beta))


def ddp(model, mesh):
    return DistributedDataParallel(model)


def fsdp(model, mesh):
    return fully_shard(model, mesh=mesh)


def train(activation, wrap, mesh, rank):
    """Return the parameters after three steps, each rank on half of the data."""
    torch.manual_seed(0)
    model = wrap(Network(activation), mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = torch.randn(3, 8, 6)
    for batch in data:
        optimizer.zero_grad()
        model(batch[rank::WORLD]).square().mean().backward()
        optimizer.step()
    return [whole(p.detach()) for p in model.parameters()]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained_alike(rank, mesh, wrap):
    found = train(swish, wrap, mesh, rank)
    expected = train(native, wrap, mesh, rank)
    torch.testing.assert_close(found, expected)
    assert {report.outcome for report in swish.reports} == {"passed"}


def elementwise_on_dtensors(rank, mesh):
    torch.manual_seed(0)
    values = torch.randn(4, 3)
    for placement in (Shard(0), Shard(1), Replicate()):
        x = distribute_tensor(values, mesh, [placement]).requires_grad_()
        beta = distribute_tensor(torch.tensor(1.5), mesh, [Replicate()])
        beta.requires_grad_()
        with pytest.warns(UserWarning, match="did not check .* DTensor") as warned:
            out = _fresh()(x, beta)
        assert len(warned) == 1
        assert isinstance(out, DTensor)
        first = torch.autograd.grad(out.sum(), (x, beta))
        local_x = values.clone().requires_grad_()
        local_beta = torch.tensor(1.5, requires_grad=True)
        expected = native(local_x, local_beta)
        torch.testing.assert_close(whole(out.detach()), expected.detach())
        second = torch.autograd.grad(expected.sum(), (local_x, local_beta))
        torch.testing.assert_close([whole(g) for g in first], list(second))


def _fresh():
    rule = gt.custom_vjp(native)
    rule.defvjp(swish.rule.fwd, swish.rule.bwd)
    return rule


def _process(rank, path, work, args):
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    mesh = init_device_mesh("cpu", (WORLD,))
    try:
        work(rank, mesh, *args)
    finally:
        dist.destroy_process_group()
    os._exit(0)  # gloo's threads can abort an interpreter that ends: pytorch#190489


@pytest.mark.parametrize(
    ("work", "args"),
    [
        (trained_alike, (ddp,)),
        (trained_alike, (fsdp,)),
        (elementwise_on_dtensors, ()),
    ],
    ids=["DDP", "FSDP2", "DTensor"],
)
def test_in_two_processes(tmp_path, work, args):
    mp.spawn(_process, (tmp_path / "rendezvous", work, args), nprocs=WORLD)
