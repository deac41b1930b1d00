"""What a kernel is handed, and what its users get: values, no derivative wanted."""

import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import gradtools as gt

X = torch.tensor([[0.5, -1.0, 2.0], [3.0, 0.25, -0.75]])


def like(x, *rest, **named):
    return torch.empty_like(x)


@gt.external(out=like, numpy=True)
def square(x):
    return np.square(x)


def seen_by(numpy=False, **options):
    """Return an external that doubles, and a list of what it was handed."""
    seen = []

    def double(x):
        seen.append(x)
        return 2 * x

    return gt.external(double, out=like, numpy=numpy, **options), seen


def test_bare_and_called_forms():
    def triple(x):
        return 3 * x

    assert_close(gt.external(out=like)(triple)(X), 3 * X)
    assert_close(gt.external(triple, out=like)(X), 3 * X)
    assert gt.external(triple, out=like).__name__ == "triple"


def test_a_kernel_gets_tensors_without_a_graph():
    double, seen = seen_by()
    double.def_bwd(lambda residuals, g: 2 * g)
    with gt.gradcheck_policy("off"):
        double(X.clone().requires_grad_())
        torch.func.grad(lambda x: double(x).sum())(X)
        torch.func.vmap(torch.func.grad(lambda x: double(x).sum()))(X)
        torch.func.jvp(double, (X,), (X,))
    assert len(seen) == 5
    assert not any(x.requires_grad for x in seen)
    assert {type(x) for x in seen} == {torch.Tensor}
    for x in seen:
        x.numpy()  # a tensor of a transform has no memory of its own


def test_a_parameter_is_handed_over_as_a_plain_tensor():
    double, seen = seen_by()
    with torch.no_grad():
        double(torch.nn.Parameter(X))
    assert type(seen[0]) is torch.Tensor


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[:, ::2],
        lambda x: x[0].expand(4, 3),
        lambda x: x.flip(0),
        lambda x: torch.complex(x, x).conj(),
        lambda x: torch.complex(x, x).conj().imag,
        lambda x: torch.complex(x, x)[0, :1].conj().imag,
        lambda x: x[:0],
        lambda x: x[0, 0],
    ],
)
@pytest.mark.parametrize("numpy", [False, True])
def test_numbers_come_in_a_row(view, numpy):
    double, seen = seen_by(numpy)
    for _ in range(3):  # the first call, the next, and one like the one before
        x = view(X)
        assert_close(double(x), 2 * x)
    for x in seen:
        row = x.flags.c_contiguous if numpy else x.is_contiguous()
        assert row
    if not numpy:
        assert not any(x.is_conj() or x.is_neg() for x in seen)


def test_arrays_share_the_tensors_memory_and_cannot_be_written_to():
    double, seen = seen_by(numpy=True)
    x = X.clone()
    double(x)
    assert np.shares_memory(seen[0], x.numpy())
    assert not seen[0].flags.writeable
    assert x.numpy().flags.writeable


@pytest.mark.parametrize(
    "returned",
    [
        lambda x: x.sum(),  # a number of numpy's
        lambda x: np.asarray(x.sum()),
        lambda x: np.broadcast_to(x.sum(), ()),  # read-only
    ],
)
def test_numbers_of_numpy_are_tensors(returned):
    total = gt.external(returned, out=lambda x: x.new_empty(()), numpy=True)
    assert_close(total(X), X.sum())


def test_arrays_that_torch_does_not_know_are_copied():
    flipped = gt.external(lambda x: (2 * x)[::-1], out=like, numpy=True)
    assert_close(flipped(X), 2 * X.flip(0))


def test_pytrees_numbers_texts_and_several_outputs():
    @gt.external(out=lambda p, **how: {"s": p["x"], "rest": (p["i"], p["x"][0])})
    def tree(p, *, n=1, how="plus", kind=None):
        assert (how, kind) == ("times", torch.float32)
        return {"s": p["x"] * n, "rest": (p["i"] + n, p["x"][0] * n)}

    i = torch.arange(3)
    found = tree({"x": X, "i": i}, n=2, how="times", kind=torch.float32)
    assert_close(found, {"s": 2 * X, "rest": (i + 2, 2 * X[0])})


def test_defaults_keywords_and_any_number_of_arguments():
    @gt.external(out=lambda x, *more, scale=1.0: torch.empty_like(x))
    def total(x, *more, scale=1.0):
        return scale * (x + sum(more))

    assert_close(total(X, X, X, scale=2.0), 6 * X)
    assert_close(total(X, scale=0.5), 0.5 * X)


def test_a_repeated_call_notices_what_is_different():
    """The short way serves calls like the one before, and no other."""

    @gt.external(out=lambda x, n: x.new_empty(len(x), n))
    def rows(x, n):
        return x[:, None].repeat(1, n) + n

    x = torch.arange(3.0)
    for argument, n in [(x, 2), (x, 2), (x, 3), (x[:2], 3), (x.float(), 3), (x, 2)]:
        out = rows(argument, n)
        assert_close(out, argument[:, None].expand(-1, n) + n)
    assert_close(rows(x, True), x[:, None] + 1)  # 1 and True are not the same


def test_a_repeated_call_with_an_array_or_an_object_that_changes():
    class Size:
        number = 2

    scaled = gt.external(lambda x, by: x * float(by.sum()), out=like)
    by = np.array([1.0, 2.0])
    for factor in (3.0, 3.0, 7.0):
        by[1] = factor - 1
        assert_close(scaled(X, by), factor * X)

    def start(x, size):
        return x.reshape(-1)[: size.number].clone()

    cut = gt.external(start, out=lambda x, size: x.new_empty(size.number))
    size = Size()
    for size.number in (2, 2, 3, 1):
        assert_close(cut(X, size), X.reshape(-1)[: size.number])


def test_a_kernel_lets_go_of_its_arguments():
    twice = gt.external(lambda x: 2 * x, out=like)
    twice.def_bwd(lambda residuals, g: (2 * g,))
    for leaf in (torch.ones(5), torch.ones(5, requires_grad=True)):
        x = leaf * 1
        twice(x), twice(x)
        gone = weakref.ref(x)
        del x
        gc.collect()  # the check leaves cycles behind
        assert gone() is None


def test_a_builtin_without_a_signature_may_be_the_kernel():
    assert_close(gt.external(torch.sin, out=like)(X), X.sin())
    assert_close(gt.external(torch.ops.aten.cos, out=like)(X), X.cos())


def test_methods():
    class Scale:
        def __init__(self, factor):
            self.factor = factor

        @gt.external(out=lambda self, x: torch.empty_like(x), numpy=True)
        def times(self, x):
            return self.factor * x

        @times.def_bwd
        def _(self, residuals, g):
            return None, self.factor * g

    scale = Scale(3.0)
    assert_close(scale.times(X), 3 * X)
    x = X.clone().requires_grad_()
    scale.times(x).sum().backward()
    assert_close(x.grad, torch.full_like(X, 3.0))
    scale.factor = 4.0
    assert_close(scale.times(X), 4 * X)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_wanted_of_a_kernel_without_a_rule(mode):
    with mode():
        for _ in range(3):
            x = X.clone().requires_grad_(mode is torch.no_grad)
            assert_close(square(x), X**2)


def test_integers_and_a_tensor_without_values():
    i = torch.arange(4)
    assert_close(square(i), i**2)
    out = square(torch.empty(2, 5, device="meta", dtype=torch.float32))
    assert (out.shape, out.dtype, out.device.type) == ((2, 5), torch.float32, "meta")


@pytest.mark.parametrize("in_dims", [0, 1, -1])
def test_vmap_of_a_kernel_without_a_rule(in_dims):
    batched = torch.func.vmap(square, in_dims, in_dims)
    assert_close(batched(X), X**2)


def test_copies_and_pickles_are_the_external_itself():
    assert copy.deepcopy(square) is square
    assert pickle.loads(pickle.dumps(square)) is square


def test_what_the_kernel_holds_goes_with_the_external():
    class Held:
        pass

    held = Held()
    gone = weakref.ref(held)

    def make(held):
        @gt.external(out=like)
        def holding(x):
            assert held is not None
            return 2 * x

        holding(X), holding(X)
        torch.func.vmap(holding)(X)

    make(held)
    del held
    gc.collect()
    assert gone() is None


def test_threads_may_call_a_kernel_at_once():
    errors, start = [], threading.Barrier(8)

    def work(number):
        try:
            start.wait()
            for size in (3, 4, number + 1):
                for _ in range(20):
                    x = torch.full((size,), float(number))
                    assert_close(square(x), x**2)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_an_identity_is_no_kernel_but_its_out_may_be_one():
    copied = gt.external(lambda x: x.clone(), out=lambda x: x)
    assert_close(copied(X), X)
