"""hvp, vhp, ggnvp and what they share: primals, tangents, graphs, errors."""

import threading
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional
from torch.testing import assert_close

import gradtools as gt


@pytest.fixture(name="A")
def not_symmetric():
    torch.manual_seed(0)
    return torch.randn(3, 3)


def cubic(x, y):
    """Return a scalar whose second derivatives all depend on the primals."""
    return (x**3 * y["w"]).sum() + (y["w"] ** 2 * y["b"]).sum()


X = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
Y = {"w": X.flip(0), "b": X + 1}
V = (X.cos(), {"w": X.sin(), "b": X.exp()})


def by_hand(f, primals, tangents):
    leaves, spec = torch.utils._pytree.tree_flatten(primals)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    value = f(*torch.utils._pytree.tree_unflatten(leaves, spec))
    first = torch.autograd.grad(value, leaves, create_graph=True)
    moves = torch.utils._pytree.tree_leaves(tangents)
    return torch.utils._pytree.tree_unflatten(
        torch.autograd.grad(first, leaves, moves), spec
    )


def test_a_quadratic_form_that_is_not_symmetric(A):
    x, v = torch.randn(3), torch.randn(3)
    f = lambda x: x @ A @ x
    for product in (gt.hvp, gt.vhp):
        assert_close(product(f, (x,), (v,)), ((A + A.T) @ v,))
    batch, moves = torch.randn(5, 3), torch.randn(5, 3)
    each = torch.func.vmap(lambda x, v: gt.hvp(f, (x,), (v,))[0])(batch, moves)
    assert_close(each, moves @ (A + A.T))


def test_trees_whose_keys_come_in_another_order():
    found = gt.hvp(cubic, (X, Y), (V[0], {"b": V[1]["b"], "w": V[1]["w"]}))
    assert_close(found, by_hand(cubic, (X, Y), V))
    assert list(found[1]) == ["w", "b"]


@pytest.mark.parametrize("mode", ["reverse-over-reverse", "forward-over-reverse"])
def test_every_mode(mode):
    assert_close(gt.hvp(cubic, (X, Y), V, mode=mode), by_hand(cubic, (X, Y), V))


def test_none_stands_for_zeros_of_a_whole_tree():
    zeros = {"w": 0 * X, "b": 0 * X}
    expected = by_hand(cubic, (X, Y), (V[0], zeros))
    assert_close(gt.hvp(cubic, (X, Y), (V[0], None)), expected)


def test_argnums():
    whole = by_hand(cubic, (X, Y), (0 * X, V[1]))
    assert_close(gt.hvp(cubic, (X, Y), V[1], argnums=1), whole[1])
    assert_close(gt.hvp(cubic, (X, Y), V[1], argnums=-1), whole[1])
    assert_close(gt.hvp(cubic, (X, Y), (V[1],), argnums=(1,)), (whole[1],))


class Point(NamedTuple):
    x: torch.Tensor
    label: str
    count: torch.Tensor


def test_what_is_no_floating_tensor_has_none():
    point = Point(X, "a", torch.tensor([2, 3, 4]))
    (found,) = gt.hvp(lambda p: (p.x**p.count).sum(), (point,), (Point(X, None, None),))
    assert_close(found.x, point.count * (point.count - 1) * X ** (point.count - 2) * X)
    assert found.label is None
    assert found.count is None


def test_aux_is_handed_through_without_a_graph():
    def f(x):
        return (x**3).sum(), {"twice": 2 * x, "name": "f"}

    found, aux = gt.hvp(f, (X,), (V[0],), has_aux=True)
    assert_close(found, (6 * X * V[0],))
    assert_close(aux["twice"], 2 * X)
    assert aux["name"] == "f"
    assert not aux["twice"].requires_grad


def test_there_is_no_graph_where_nothing_asks_for_one():
    (found,) = gt.hvp(lambda x: (x**3).sum(), (X,), (V[0],))
    assert not found.requires_grad
    x = X.clone().requires_grad_()
    with torch.no_grad():
        (found,) = gt.hvp(lambda x: (x**3).sum(), (x,), (V[0],))
    assert not found.requires_grad
    assert_close(found, 6 * X * V[0])


def test_products_are_differentiated_in_primals_tangents_and_what_is_captured():
    x, v, w = (t.clone().requires_grad_() for t in (X, V[0], X + 2))
    (found,) = gt.hvp(lambda x: (x**3 * w).sum(), (x,), (v,))
    third = torch.autograd.grad(found.sum(), (x, v, w))
    assert_close(third, tuple(t.detach() for t in (6 * v * w, 6 * x * w, 6 * x * v)))


def test_a_captured_parameter_behind_a_layer_norm():
    w = (X + 2).requires_grad_()
    f = lambda x: (functional.layer_norm(x * w, (3,)) ** 3).sum()
    (found,) = gt.hvp(f, (X,), (V[0],))
    (third,) = torch.autograd.grad(found.sum(), w)
    step = 1e-4

    def product(w):
        g = lambda x: (functional.layer_norm(x * w, (3,)) ** 3).sum()
        return by_hand(g, (X,), (V[0],))[0].sum()

    w = w.detach()
    eye = torch.eye(3) * step
    expected = torch.stack(
        [(product(w + e) - product(w - e)) / (2 * step) for e in eye]
    )
    assert_close(third, expected, rtol=1e-5, atol=1e-6)


def test_linear_constant_and_ignoring_functions():
    assert_close(gt.hvp(lambda x: (2 * x).sum(), (X,), (X,)), (0 * X,))
    assert_close(gt.hvp(lambda x: torch.tensor(1.0), (X,), (X,)), (0 * X,))
    found = gt.hvp(lambda x, y: (y**2).sum(), (X, X), (X, X))
    assert_close(found, (0 * X, 2 * X))


def test_inference_tensors_and_mixed_dtypes():
    with torch.inference_mode():
        x = X * 1
    assert_close(gt.hvp(lambda x: (x**3).sum(), (x,), (X,)), (6 * X * X,))
    with torch.inference_mode():
        assert_close(gt.hvp(lambda x: (x**3).sum(), (x,), (X,)), (6 * X * X,))
        for compute in (gt.grad, gt.jacfwd):
            assert_close(compute(lambda x: (x**3).sum())(X), 3 * X**2)
            assert_close(compute(lambda x: (x**3).sum())(x), 3 * X**2)
        for y in (x, X):
            assert_close(gt.jvp(lambda x: x**3, (y,), (X,))[1], 3 * X**3)
    a, b = X, X.float()
    found = gt.hvp(lambda a, b: (a**2 * b**2).sum(), (a, b), (a, b))
    assert [t.dtype for t in found] == [torch.float64, torch.float32]


def test_third_derivatives_through_transforms():
    f = lambda x: (x**4).sum()
    outer = lambda x: gt.hvp(f, (x,), (V[0],))[0].sum()
    expected = 24 * X * V[0]
    for grad in (gt.grad, torch.func.grad):
        assert_close(grad(outer)(X), expected)
    assert_close(torch.func.jvp(outer, (X,), (X,))[1], (expected * X).sum())
    assert_close(gt.hvp(outer, (X,), (X,)), (24 * V[0] * X,))


def test_in_a_compiled_function():
    compiled = torch.compile(
        lambda x, v: gt.hvp(cubic, (x, Y), (v, V[1])),
        fullgraph=True,
        backend="aot_eager",
    )
    assert_close(compiled(X, V[0]), by_hand(cubic, (X, Y), V))


def test_batch_norm_in_training_and_saved_tensor_hooks():
    norm = torch.nn.BatchNorm1d(3)
    data = torch.randn(6, 3)
    f = lambda w: (torch.tanh(norm(data * w)) ** 2).sum()
    with torch.autograd.graph.save_on_cpu(), torch.no_grad():
        (found,) = gt.hvp(f, (X,), (V[0],))
    assert_close(found, by_hand(f, (X,), (V[0],))[0])


@pytest.fixture
def marker(unchecked):
    """A rule whose derivative is ten times that of the cube."""
    rule = gt.custom_vjp(lambda x: x**3)
    rule.def_bwd(lambda residuals, g: 10 * g * 3 * residuals[0][0] ** 2)
    return rule


def test_the_rules_of_gradtools_are_used(marker):
    f = lambda x: marker(x).sum()
    expected = 60 * X * V[0]
    assert_close(gt.hvp(f, (X,), (V[0],)), (expected,))
    assert_close(gt.hvp_fn(f, X)(V[0]), expected)
    assert_close(gt.jvp(gt.grad(f), (X,), (V[0],))[1], expected)
    assert_close(gt.hessian(f)(X), torch.diag(60 * X))
    each = torch.func.vmap(lambda x, v: gt.hvp(marker, (x,), (v,))[0])(X, V[0])
    assert_close(each, expected)
    square = lambda out: (out**2).sum()
    assert_close(
        gt.ggnvp(marker, square, (X,), (V[0],)), (2 * (30 * X**2) ** 2 * V[0],)
    )
    compiled = torch.compile(
        lambda x: gt.hvp(f, (x,), (V[0],)), fullgraph=True, backend="aot_eager"
    )
    assert_close(compiled(X), (expected,))


def test_gauss_newton_is_the_product_of_its_factors():
    W = torch.randn(4, 3)
    target = torch.randn(4)
    model = lambda x: torch.tanh(W @ x)
    loss = lambda out: ((out - target) ** 4).sum()
    J = torch.func.jacrev(model)(X)
    H = torch.func.jacrev(torch.func.jacrev(loss))(model(X))
    assert_close(gt.ggnvp(model, loss, (X,), (V[0],)), (J.T @ H @ J @ V[0],))
    found, aux = gt.ggnvp(lambda x: (model(x), x), loss, (X,), (V[0],), has_aux=True)
    assert_close(found, (J.T @ H @ J @ V[0],))
    assert_close(aux, X)


@pytest.mark.on_cpu
def test_attention_is_fused_again_afterwards():
    q = torch.randn(1, 2, 4, 8)
    f = lambda q: (functional.scaled_dot_product_attention(q, q, q) ** 2).sum()
    gt.hvp(f, (q,), (q,))
    gt.hessian(lambda s: f(q * s))(torch.tensor(1.0))
    out = f(q.requires_grad_())
    names = out.grad_fn.next_functions[0][0].next_functions[0][0].name()
    assert "FlashAttention" in names


def test_threads_get_their_own_right_products():
    q = torch.randn(1, 2, 4, 8)
    f = lambda q: (functional.scaled_dot_product_attention(q, q, q) ** 2).sum()
    expected = gt.hvp(f, (q,), (q,))[0], gt.jvp(f, (q,), (q,))[1]
    wrong = []

    def work():
        for _ in range(5):
            found = gt.hvp(f, (q,), (q,))[0], gt.jvp(f, (q,), (q,))[1]
            if not all(map(torch.allclose, found, expected)):
                wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize(
    "call", [gt.hvp, gt.vhp, gt.jvp, lambda f, x, v: gt.hessian(f)(*x)]
)
def test_an_error_in_the_function_leaves_nothing_behind(call):
    def f(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        call(f, (X,), (X,))
    assert torch.is_grad_enabled()
    assert torch._C._len_torch_function_stack() == 0
    assert forward_ad._current_level == -1
    assert torch._C._functorch.maybe_current_level() is None
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gt.hvp(torch.sum, X, X), r"hvp: primals must be a tuple"),
        (lambda: gt.hvp(torch.sin, (X,), (X,)), "sin must return one real scalar"),
        (lambda: gt.grad(torch.sin)(X), "sin must return one real scalar"),
        (lambda: gt.grad(torch.sum, has_aux=True)(X), "True sum must return a pair"),
        (lambda: gt.hvp(lambda x: (x.sum(), x), (X,), (X,)), "must return one real"),
        (lambda: gt.hvp(torch.sum, (X,), (X[:2],)), "the tangents do not fit"),
        (lambda: gt.hvp(torch.sum, (X,), (X.float(),)), "float32"),
        (lambda: gt.hvp(torch.sum, (X,), (1.0,)), "a value of type float"),
        (lambda: gt.hvp(torch.sum, (X,), (X, X)), "another structure"),
        (lambda: gt.hvp(cubic, (X, Y), (X, {"w": X})), "another structure"),
        (lambda: gt.vhp(torch.sum, (X,), (X[:2],)), "the cotangents do not fit"),
        (lambda: gt.hvp(torch.sum, (X,), (X,), argnums=2), "argnums names argument 2"),
        (lambda: gt.grad(torch.sum, 0.0)(X), "argnums names argument 0.0"),
        (lambda: gt.grad(cubic, (0, -2))(X, Y), r"an argument twice: \(0, -2\)"),
        (lambda: gt.hvp(torch.sum, (3,), (3,)), "no floating or complex tensor"),
        (
            lambda: gt.ggnvp(torch.argmax, torch.sum, (X,), (X,)),
            "to differentiate in among a tensor of shape \\(\\), int64",
        ),
        (
            lambda: gt.hvp(torch.sum, (X,), (X,), has_aux=True),
            r"a pair \(output, aux\)",
        ),
        (lambda: gt.hvp(torch.sum, (X,), (X,), mode="fast"), "mode 'fast' is none of"),
        (
            lambda: gt.ggnvp(torch.sin, torch.cos, (X,), (X,)),
            "cos must return one real",
        ),
    ],
)
def test_what_means_nothing_is_refused(call, words):
    with pytest.raises(gt.DefinitionError, match=words):
        call()


def test_all_tangents_that_do_not_fit_are_named():
    with pytest.raises(gt.DefinitionError) as error:
        gt.hvp(cubic, (X, Y), (X[:1], {"w": X, "b": X.int()}))
    assert [v.where for v in error.value.violations] == [
        "tangents[0]",
        "tangents[1]['b']",
    ]


def test_an_operator_that_torch_cannot_differentiate_twice_is_named():
    scores = torch.randn(4, 3)
    labels = torch.tensor([0, 1, 2, 0])
    with pytest.raises(RuntimeError, match="multi_margin_loss_backward"):
        gt.hvp(lambda s: functional.multi_margin_loss(s, labels), (scores,), (scores,))


def test_primals_and_tangents_may_both_be_lists():
    x, v = torch.randn(3), torch.randn(3)
    f = lambda x, y: (x**3 * y).sum()
    as_lists = gt.hvp(f, [x, x], [v, v])
    torch.testing.assert_close(as_lists, gt.hvp(f, (x, x), (v, v)))
    torch.testing.assert_close(as_lists[0], 6 * x * x * v + 3 * x * x * v)


def test_batch_statistics_are_updated_once_though_the_function_runs_twice():
    def counted(go):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh())
        loss = lambda x: model(x).square().sum()
        go(model, loss)
        return model[1].num_batches_tracked, model[1].running_mean, model[1].running_var

    x, v = torch.randn(6, 3), torch.randn(6, 3)

    def in_parameters(model, loss):
        params = dict(model.named_parameters())
        f = lambda params: functional_call(model, params, (x,)).square().sum()
        gt.hvp(f, (params,), (params,))

    once = counted(lambda model, loss: loss(x))
    for go in (
        lambda model, loss: gt.hvp(loss, (x,), (v,)),
        lambda model, loss: gt.hvp_fn(loss, x)(v),
        lambda model, loss: gt.jvp(model, (x,), (v,)),
        lambda model, loss: gt.linearize(model, x)[1](v),
        lambda model, loss: gt.ggnvp(model, loss_of, (x,), (v,)),
        lambda model, loss: gt.ggnvp_fn(model, loss_of, x)(v),
        in_parameters,
    ):
        assert_close(counted(go), once)


def loss_of(out):
    return out.square().sum()


def test_without_gradients_forward_mode_runs_once_and_keeps_no_graph():
    calls = []
    layer = nn.Linear(3, 3)

    def model(x):
        calls.append(torch.is_grad_enabled())
        return layer(x)

    x, v = torch.randn(2, 3), torch.randn(2, 3)
    with torch.no_grad():
        _, moved = gt.jvp(model, (x,), (v,))
    assert_close(moved, v @ layer.weight.detach().T)
    assert calls == [False]


@gt.custom_vjp
def square(x):
    return x**2


square.defvjp(  # no derivative at all: that shows who has been asked
    lambda x: (x**2, (x, x**2)), lambda kept, g: (g * kept[0] * kept[1],)
)


def pulled(f):
    """Return the gradient by a pullback, which is called when its vjp is over."""

    def gradient(x):
        value, pull = torch.func.vjp(f, x)
        return pull(torch.ones_like(value))[0]

    return gradient


@pytest.mark.parametrize("outer", [pulled, torch.func.grad, gt.grad])
@pytest.mark.parametrize("inner", [pulled, torch.func.grad, gt.grad])
def test_a_rule_is_pulled_back_after_its_transform_in_vmap(inner, outer, unchecked):
    x = torch.randn(4, 3)
    f = lambda x: square(x).sum()
    found = torch.func.vmap(outer(lambda x: inner(f)(x).sum()))(x)
    assert_close(found, 3 * x**2)


def test_forward_over_reverse_in_a_compiled_function():
    product = lambda x, v: gt.hvp(
        lambda x: (x**4).sum(), (x,), (v,), mode="forward-over-reverse"
    )
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    assert_close(compiled(X, X), (12 * X**3,))
