"""grad, value_and_grad, Jacobians, the Hessian, functional, check_second_order."""

import inspect
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

import gradtools as gt

X = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
W = torch.tensor([[1.0, 2.0, 0.5], [-1.0, 0.0, 1.0]], dtype=torch.float64)


def f(x, w, *, power=2):
    return torch.tanh(w @ x).pow(power).sum()


def test_which_names_are_those_of_torch_func():
    assert inspect.unwrap(gt.vmap) is torch.func.vmap  # within: it knows its names
    for name in ("grad", "jacrev", "jacfwd", "hessian", "jvp", "vjp", "linearize"):
        assert getattr(gt, name) is not getattr(torch.func, name)


@pytest.mark.parametrize("name", ["grad", "jacrev", "jacfwd", "hessian"])
@pytest.mark.parametrize("argnums", [0, 1, (0, 1)])
def test_they_give_what_torch_func_gives_where_that_is_right(name, argnums):
    mine = getattr(gt, name)(f, argnums)(X, W, power=3)
    other = getattr(torch.func, name)(lambda x, w: f(x, w, power=3), argnums)(X, W)
    assert_close(mine, other)


def test_the_value_comes_first():
    value, gradient = gt.value_and_grad(f)(X, W)
    assert_close(value, f(X, W))
    assert_close(gradient, torch.func.grad(f)(X, W))
    with_aux = lambda x: ((x**2).sum(), {"x": x, "name": "f"})
    (value, aux), gradient = gt.value_and_grad(with_aux, has_aux=True)(X)
    assert_close((value, aux["x"], gradient), ((X**2).sum(), X, 2 * X))
    assert aux["name"] == "f"
    gradient, aux = gt.grad(with_aux, has_aux=True)(X)
    assert_close(gradient, 2 * X)


def test_names_tell_what_they_are_made_of():
    assert gt.grad(f).__name__ == "f"
    assert gt.grad(f).__qualname__ == "gradient of f"


def test_derivatives_of_derivatives():
    g = lambda x: torch.sin(x).sum()
    assert_close(
        gt.grad(lambda x: gt.grad(lambda x: gt.grad(g)(x).sum())(x).sum())(X),
        -torch.cos(X),
    )
    expected = torch.func.hessian(f)(X, W)
    assert_close(gt.jacfwd(gt.jacrev(f))(X, W), expected)
    assert_close(gt.jacrev(gt.jacfwd(f))(X, W), expected)
    assert_close(gt.jacfwd(gt.jacfwd(f))(X, W), expected)
    assert_close(torch.func.jacrev(gt.grad(f))(X, W), expected)


def normed(x, w):
    return (functional.layer_norm(x, (3,), w) ** 3).sum()


def by_differences(x, w, step=1e-4):
    def gradient(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(normed(x, w), x)[0]

    return torch.stack(
        [(gradient(x + e) - gradient(x - e)) / (2 * step) for e in step * torch.eye(3)]
    )


@pytest.mark.parametrize(
    "hessian",
    [
        gt.hessian,
        lambda f: gt.jacfwd(gt.jacrev(f)),
        lambda f: gt.jacrev(gt.jacfwd(f)),
        lambda f: gt.jacrev(gt.grad(f)),
        lambda f: gt.jacfwd(gt.grad(f)),
        lambda f: lambda x, w: gt.hvp_fn(f, x, w, argnums=0) @ torch.eye(3),
    ],
)
def test_hessians_through_a_layer_norm(hessian):
    w = X.flip(0)
    expected = by_differences(X, w)
    assert_close(hessian(normed)(X, w), expected, rtol=1e-5, atol=1e-6)


def test_what_torch_func_makes_of_it_is_wrong():
    """When this fails torch has been mended, and the stand-ins can go."""
    x, w = torch.randn(4, 3), X.flip(0)
    found = torch.func.hessian(normed, (0, 1))(x, w)
    right = gt.hessian(normed, (0, 1))(x, w)
    gaps = [
        (a - b).abs().max()
        for row, other in zip(found, right, strict=True)
        for a, b in zip(row, other, strict=True)
    ]
    assert max(gaps) > 1e-2


def test_attention_and_weight_norm_to_second_order():
    q = torch.randn(1, 1, 3, 2)
    attend = lambda q: (functional.scaled_dot_product_attention(q, q, q) ** 2).sum()
    H = gt.hessian(attend)(q)
    assert_close(gt.jacrev(gt.grad(attend))(q), H)
    assert_close(gt.grad(lambda q: gt.grad(attend)(q).sum())(q), H.sum((0, 1, 2, 3)))
    v, g = torch.randn(2, 3), torch.rand(2, 1)
    fused = lambda v: (torch._weight_norm(v, g, 0) ** 3).sum()
    plain = lambda v: ((v * (g / v.norm(dim=1, keepdim=True))) ** 3).sum()
    assert_close(gt.hessian(fused)(v), torch.func.hessian(plain)(v))
    twice = lambda f: gt.grad(lambda v: (gt.grad(f)(v) ** 2).sum())(v)
    assert_close(twice(fused), twice(plain))


def test_chunks_and_vector_valued_hessians():
    g = lambda x: torch.sin(W @ x)
    assert_close(gt.jacrev(g, chunk_size=1)(X), torch.func.jacrev(g)(X))
    assert_close(gt.hessian(g)(X), torch.func.hessian(g)(X))


def test_functions_that_torch_func_refuses():
    norm = nn.BatchNorm1d(3)
    data = torch.randn(5, 3)
    g = lambda w: (norm(data * w) ** 3).sum()
    w = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(g(w), w)
    assert_close(gt.grad(g)(X), expected)


# functional


def test_a_module_is_a_function_of_its_parameters():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    fn, params, buffers = gt.functional(model)
    x = torch.randn(6, 3)
    before = model[1].running_mean.clone()
    loss = lambda params: fn(params, buffers, x).square().sum()
    gradient = gt.grad(loss)(params)
    loss_of_model = model(x).square().sum()
    loss_of_model.backward()
    assert_close(gradient, {key: p.grad for key, p in model.named_parameters()})
    assert not any(p.requires_grad for p in params.values())
    assert params["0.weight"].data_ptr() == model[0].weight.data_ptr()
    assert_close(buffers["1.running_mean"], model[1].running_mean)
    model[1].running_mean.copy_(before)
    fn(params, buffers, x)
    assert_close(model[1].running_mean, before)


def test_tied_weights_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3, bias=False)
            self.outer = nn.Linear(3, 3, bias=False)
            self.outer.weight = self.inner.weight

        def forward(self, x):
            return self.outer(torch.tanh(self.inner(x)))

    model = Tied()
    fn, params, buffers = gt.functional(model)
    assert list(params) == ["inner.weight"]
    loss = lambda params: fn(params, buffers, X).square().sum()
    model(X).square().sum().backward()
    assert_close(gt.grad(loss)(params)["inner.weight"], model.inner.weight.grad)


def test_what_is_no_module_is_refused():
    with pytest.raises(gt.DefinitionError, match=r"takes an nn\.Module, not function"):
        gt.functional(f)


# check_second_order


def test_the_check_passes_and_tells_of_torchs_own_mistake():
    report = gt.check_second_order(normed, X, X.flip(0))
    assert report.outcome == "passed"
    (other,) = (e for e in report.evidence if "torch.func" in e.question)
    assert other.outcome == "not given"
    assert "to blame: layer_norm" in other.detail
    smooth = gt.check_second_order(f, X.float(), W.float())
    assert {e.outcome for e in smooth.evidence} == {"passed"}


def test_the_check_tells_where_jvp_takes_two_reverse_passes():
    index = torch.tensor([0, 0, 1])
    g = lambda x: (x.scatter_reduce(0, index, x + 3, "prod") ** 2).sum()
    report = gt.check_second_order(g, X)
    (item,) = (e for e in report.evidence if e.question == "forward mode")
    assert item.outcome == "not given"
    assert "scatter_reduce is wrong; jvp goes by two reverse passes" in item.detail


class Detached(torch.autograd.Function):
    """Its second derivative is wrong: it saved a tensor that has no graph."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.exp())
        return x.exp()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


def test_the_check_names_what_is_to_blame():
    with pytest.raises(gt.GradientMismatchError, match="To blame: Detached") as error:
        gt.check_second_order(lambda x: (Detached.apply(x) * x).sum(), X)
    assert error.value.violations[0].where == "hvp"


def test_threads_call_one_module_with_parameters_of_their_own():
    layer = nn.Sequential(nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 3))
    fn, params, buffers = gt.functional(layer)
    x, wrong = torch.randn(4, 3), []

    def work(number):
        mine = {name: number * value for name, value in params.items()}
        hidden = torch.tanh(x @ mine["0.weight"].T + mine["0.bias"])
        right = hidden @ mine["2.weight"].T + mine["2.bias"]
        found = [fn(mine, buffers, x) for _ in range(200)]
        wrong.extend(out for out in found if not torch.allclose(out, right))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong


@pytest.mark.parametrize("name", ["hessian", "jacrev", "jacfwd"])
def test_matrices_in_a_compiled_function(name):
    matrix = getattr(gt, name)(lambda x: f(x, W))
    compiled = torch.compile(matrix, fullgraph=True, backend="aot_eager")
    assert_close(compiled(X), matrix(X))
