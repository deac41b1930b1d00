"""Curvature of a loss that is summed over processes, against one process."""

import functools
import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import gradtools as gt

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo"
)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def data():
    generator = torch.Generator().manual_seed(1)
    return (
        here(torch.randn(12, 4, generator=generator, device="cpu")),
        here(torch.randint(0, 3, (12,), generator=generator, device="cpu")),
    )


def here(tensor):
    """Return a tensor on the device where tensors are made by default."""
    return tensor.to(torch.empty(()).device)


def loss_of(fn, buffers):
    def loss(params, batch):
        x, y = batch
        return nn.functional.cross_entropy(fn(params, buffers, x), y, reduction="sum")

    return loss


def shard(rank, world):
    return tuple(tensor[rank::world] for tensor in data())


def directions(params, count):
    generator = torch.Generator().manual_seed(2)
    return {
        key: here(torch.randn(count, *p.shape, generator=generator, device="cpu"))
        for key, p in params.items()
    }


def products_over_ranks(rank, world):
    calls = []
    reduce = dist.all_reduce

    def counted(*args, **kwargs):
        calls.append(None)
        return reduce(*args, **kwargs)

    dist.all_reduce = counted
    fn, params, buffers = gt.functional(network())
    loss = loss_of(fn, buffers)
    mine, group = shard(rank, world), dist.group.WORLD
    whole = gt.hvp_fn(lambda p: loss(p, data()), params)
    batches = list(zip(*(tensor.split(2) for tensor in mine), strict=True))
    ops = {
        "the graph": gt.hvp_fn(lambda p: loss(p, mine), params, group=group),
        "batches": gt.hvp_fn(loss, params, batches=batches, group=group),
    }
    several = directions(params, 3)
    one = {key: v[0] for key, v in several.items()}
    for op in ops.values():
        assert_close(op.value, whole.value)
        assert_close(op.grad, whole.grad)
        calls.clear()
        assert_close(op(one), whole(one))
        assert len(calls) == 1
        calls.clear()
        assert_close(op.block(several, chunk=3), whole.block(several))
        assert len(calls) == 1
        flat = op.flatten(one)
        assert_close(op @ flat, whole @ flat)
    model = lambda p: fn(p, buffers, mine[0])
    entropy = functools.partial(nn.functional.cross_entropy, reduction="sum")
    matrix = gt.ggnvp_fn(model, lambda out: entropy(out, mine[1]), params, group=group)
    x, y = data()
    expected = gt.ggnvp_fn(lambda p: fn(p, buffers, x), lambda o: entropy(o, y), params)
    assert_close(matrix(one), expected(one))
    assert_close(matrix.grad, expected.grad)
    x, _ = gt.cg(ops["the graph"], one, damping=10.0, maxiter=5)
    again, _ = gt.cg(whole, one, damping=10.0, maxiter=5)
    assert_close(x, again)


def blocks_over_ranks(rank, world):
    torch.manual_seed(0)
    x, V = torch.randn(30), torch.randn(60, 30)
    f = lambda x: (torch.tanh(x) ** 3).sum()
    group = dist.group.WORLD
    op = gt.hvp_fn(lambda x: (rank + 1) * f(x), x, group=group)
    product = op._products._products.product

    def slower(tangents, **options):  # what takes long on one does not on the other
        is_block = options.get("is_block", False)
        end = time.thread_time() + 0.005 * (len(tangents[0]) if is_block else 1)
        while (rank == 0) == is_block and time.thread_time() < end:
            pass
        return product(tangents, **options)

    op._products._products.product = slower
    for _ in range(6):
        found = op.block(V)
    assert_close(found, gt.hvp_fn(lambda x: 3 * f(x), x).block(V))
    alone = dist.new_group([0])
    if rank == 1:
        with pytest.raises(gt.DefinitionError, match="rank 1 is not in the group"):
            gt.hvp_fn(f, x, group=alone)


def wrapped_by_ddp(rank, world):
    fn, params, buffers = gt.functional(DistributedDataParallel(network()))
    loss = loss_of(fn, buffers)
    plain_fn, plain, _ = gt.functional(network())
    assert params.keys() == plain.keys()
    mine = shard(rank, world)
    op = gt.hvp_fn(lambda p: loss(p, mine), params, group=dist.group.WORLD)
    whole = gt.hvp_fn(lambda p: loss_of(plain_fn, buffers)(p, data()), plain)
    one = {key: v[0] for key, v in directions(plain, 1).items()}
    assert_close(op(one), whole(one))


def sharded_by_fsdp(rank, world):
    fn, _, buffers = gt.functional(network())
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (world,)))
    with pytest.raises(gt.DefinitionError, match=r"are sharded(.|\n)*full_tensor"):
        gt.functional(model)
    gathered = {key: p.full_tensor().detach() for key, p in model.named_parameters()}
    loss, mine = loss_of(fn, buffers), shard(rank, world)
    op = gt.hvp_fn(lambda p: loss(p, mine), gathered, group=dist.group.WORLD)
    whole = gt.hvp_fn(lambda p: loss(p, data()), gathered)
    one = {key: v[0] for key, v in directions(gathered, 1).items()}
    assert_close(op(one), whole(one))


def child(rank, world, path, work, backend="gloo"):
    if backend == "nccl":  # a process of its own: a deprecation stops nothing here
        torch.set_default_tensor_type(torch.cuda.DoubleTensor)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    dist.init_process_group(
        backend,
        init_method=f"file://{path}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    try:
        work(rank, world)
    finally:
        dist.destroy_process_group()
    os._exit(0)  # gloo's threads can abort an interpreter that ends: pytorch#190489


@pytest.mark.parametrize(
    ("work", "world"),
    [
        (products_over_ranks, 2),
        (products_over_ranks, 4),
        (blocks_over_ranks, 2),
        (wrapped_by_ddp, 2),
        (sharded_by_fsdp, 2),
    ],
)
def test_over_processes(tmp_path, work, world):
    mp.spawn(child, (world, tmp_path / "rendezvous", work), nprocs=world)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_over_devices(tmp_path):
    world = torch.cuda.device_count()
    args = (world, tmp_path / "rendezvous", products_over_ranks, "nccl")
    mp.spawn(child, args, nprocs=world)
