"""What a lifted class is told of its inputs, and what it may write into them."""

import numpy
import pytest
import torch
from torch.testing import assert_close

import gradtools as gt

Function = torch.autograd.Function
X = torch.tensor([0.5, -1.2, 2.0], dtype=torch.float64)
W = X.cos()


class InForward(Function):
    """w sin(x), whose gradient forward computes, where one is wanted."""

    @staticmethod
    def forward(ctx, x, w):
        assert (x.requires_grad, w.requires_grad) == ctx.needs_input_grad
        if x.requires_grad:
            ctx.slope = w * x.cos()
        if w.requires_grad:
            ctx.save_for_backward(x.sin())
        return w * x.sin()

    @staticmethod
    def backward(ctx, g):
        wanted = ctx.needs_input_grad
        return (
            g * ctx.slope if wanted[0] else None,
            g * ctx.saved_tensors[0] if wanted[1] else None,
        )


def reference(x, w):
    return w * x.sin()


def squares(f, w=W):
    return lambda x: f(x, w).square().sum()


def gradients(f, *, of, twice=False):
    leaves = [
        t.clone().requires_grad_(want) for t, want in zip((X, W), of, strict=True)
    ]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    loss = f(*leaves).square().sum()
    first = torch.autograd.grad(loss, wanted, create_graph=twice)
    if not twice:
        return first
    return torch.autograd.grad(sum(g.sum() for g in first), wanted)


grad, jvp, vmap = torch.func.grad, torch.func.jvp, torch.func.vmap
BOTH, FIRST, SECOND = (True, True), (True, False), (False, True)
USES = {
    "backward": lambda f: gradients(f, of=BOTH),
    "backward, of one": lambda f: gradients(f, of=FIRST),
    "backward, of the other": lambda f: gradients(f, of=SECOND),
    "backward twice": lambda f: gradients(f, of=BOTH, twice=True),
    "backward twice, of one": lambda f: gradients(f, of=FIRST, twice=True),
    "backward twice, of the other": lambda f: gradients(f, of=SECOND, twice=True),
    "grad": lambda f: grad(squares(f))(X),
    "grad of grad": lambda f: grad(lambda x: grad(squares(f))(x).sum())(X),
    "grad of grad, of the other": lambda f: grad(
        lambda w: grad(squares(f, w))(X).sum()
    )(W),
    "jvp": lambda f: jvp(f, (X, W), (W, X)),
    "jvp of grad": lambda f: jvp(grad(squares(f)), (X,), (W,)),
    "grad of jvp": lambda f: grad(lambda x: jvp(squares(f), (x,), (W,))[1])(X),
    "jvp of jvp": lambda f: jvp(lambda x: jvp(squares(f), (x,), (W,))[1], (X,), (W,)),
    "hessian": lambda f: torch.func.hessian(squares(f))(X),
    "vmap": lambda f: vmap(f)(X, W),
    "vmap of grad": lambda f: vmap(grad(f, (0, 1)))(X, W),
    "vmap of grad of grad": lambda f: vmap(grad(grad(f)))(X, W),
    "grad of vmap": lambda f: grad(lambda x: vmap(f)(x, W).sum())(X),
    "no_grad": lambda f: torch.no_grad()(f)(X.clone().requires_grad_(), W),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize(
    "options",
    [{}, {"edits_in_place": True}, {"vmap": "sequential"}],
    ids=["auto", "copies", "sequential"],
)
def test_inputs_require_grad_where_a_gradient_is_wanted(use, options):
    lifted = gt.lift(InForward, **options)
    assert_close(use(lifted), use(reference))


@pytest.mark.parametrize("of", [BOTH, FIRST, SECOND])
def test_so_they_do_under_compile(of):
    compiled = torch.compile(gt.lift(InForward), backend="aot_eager", fullgraph=True)
    assert_close(gradients(compiled, of=of), gradients(reference, of=of))


class TenTimesInForward(InForward):
    """The same, with ten times the gradient."""

    @staticmethod
    def backward(ctx, g):
        return tuple(None if v is None else 10 * v for v in InForward.backward(ctx, g))


def test_it_is_the_gradient_of_the_class(unchecked):
    lifted = gt.lift(TenTimesInForward)
    marked = tuple(10 * g for g in gradients(reference, of=BOTH))
    assert_close(gradients(lifted, of=BOTH), marked)
    assert_close(grad(squares(lifted))(X), marked[0])


class Keeps(Function):
    """x sin(x), which keeps its input in every way there is."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.all = {"x": [x], "shape": x.shape}
        return x * x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        assert x is ctx.all["x"][0]
        assert isinstance(ctx.all["shape"], torch.Size)
        return g * (x.sin() + x * x.cos())


def test_an_input_that_is_kept_stays_one():
    lifted = gt.lift(Keeps)
    hessian = torch.func.hessian(lambda x: lifted(x).sum())(X)
    assert_close(hessian, torch.diag(2 * X.cos() - X * X.sin()))
    _, pullback = torch.func.vjp(lifted, X)
    assert_close(pullback(X)[0], X * (X.sin() + X * X.cos()))


class OverItsInput(Function):
    """The sum of sin(x); the gradient goes where x was, behind torch's back."""

    @staticmethod
    def forward(ctx, x):
        memory = x.detach().numpy()
        total = torch.from_numpy(memory).sin().sum().clone()
        if x.requires_grad:
            memory[...] = torch.from_numpy(memory).cos().numpy()
            ctx.save_for_backward(x.detach())
        return total

    @staticmethod
    def backward(ctx, g):
        (gradient,) = ctx.saved_tensors
        gradient.numpy()[...] *= g.item()
        return gradient


def test_a_gradient_written_over_an_input_is_refused_by_name():
    leaf = X.clone().requires_grad_()
    with pytest.raises(gt.GradientMismatchError, match=r"fwd changes args\.x") as info:
        gt.lift(OverItsInput)(leaf)
    assert "lift(OverItsInput, edits_in_place=True)" in info.value.fix
    assert_close(leaf.detach(), X)


def test_with_copies_it_is_right():
    lifted = gt.lift(OverItsInput, edits_in_place=True)
    leaf = X.clone().requires_grad_()
    for scale in (1.0, 3.0):
        loss = scale * lifted(leaf)
        for _ in range(2):
            (found,) = torch.autograd.grad(loss, leaf, retain_graph=True)
            assert_close(found, scale * X.cos())
    assert_close(grad(lambda x: 2 * lifted(x))(X), 2 * X.cos())
    assert_close(leaf.detach(), X)


def test_without_a_gradient_nothing_is_written():
    leaf = X.clone().requires_grad_()
    with torch.no_grad():
        gt.lift(OverItsInput)(leaf)
    assert_close(leaf.detach(), X)


class OverWhatItSaved(Function):
    """silu(a) b; the gradients go where a and b were, behind torch's back."""

    @staticmethod
    def forward(ctx, a, b):
        a, b = a.contiguous(), b.contiguous()
        ctx.save_for_backward(a, b)
        return torch.nn.functional.silu(a) * b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        g = g.contiguous().numpy()
        first, second = a.detach().numpy(), b.detach().numpy()
        part = 1 / (1 + numpy.exp(-first))
        silu = first * part
        slope = silu * (1 - part) + part
        first[...], second[...] = g * slope * second, g * silu
        return a, b


SHAPES = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT,
    "strided": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(5, 7),
    "empty": lambda x: x[:0],
    "one number": lambda x: x[0, 0],
}


@pytest.mark.parametrize("how", SHAPES.values(), ids=SHAPES)
def test_gradients_written_over_saved_tensors(how):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 5, 7, dtype=torch.float64, generator=generator)
    lifted = gt.lift(OverWhatItSaved, edits_in_place=True)
    a, b = (how(value).detach().requires_grad_() for value in values)
    before = a.detach().clone(), b.detach().clone()
    weight = how(values[0].sin())

    def found(f):
        loss = (weight * f(a, b)).sum()
        first = torch.autograd.grad(loss, (a, b), retain_graph=True)
        kept = [g.clone() for g in first]
        again = torch.autograd.grad(loss, (a, b))
        assert_close(list(first), kept)  # the second did not write over the first
        assert_close(again, first)
        return first

    wanted = found(lambda a, b: torch.nn.functional.silu(a) * b)
    for _ in range(3):
        assert_close(found(lifted), wanted)
    assert_close((a.detach(), b.detach()), before)


def test_one_tensor_in_two_places():
    lifted = gt.lift(OverWhatItSaved, edits_in_place=True)
    leaf = X.clone().requires_grad_()
    (found,) = torch.autograd.grad(lifted(leaf, leaf).sum(), leaf)
    (wanted,) = torch.autograd.grad((torch.nn.functional.silu(leaf) * leaf).sum(), leaf)
    assert_close(found, wanted)
    assert_close(leaf.detach(), X)


def test_an_output_that_was_edited_in_place_has_its_gradient_in_a_trace(unchecked):
    @gt.custom_vjp
    def ten_times(x):
        return x.exp()

    @ten_times.def_fwd
    def _(x):
        out = x.clone().exp_()
        return out, out

    @ten_times.def_bwd
    def _(out, g):
        return 10 * g * out

    leaf = X.clone().requires_grad_()
    compiled = torch.compile(ten_times, backend="aot_eager", fullgraph=True)
    (found,) = torch.autograd.grad(compiled(leaf).sum(), leaf)
    assert_close(found, 10 * X.exp())
