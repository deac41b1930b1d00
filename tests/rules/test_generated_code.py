"""Calls that are made up like one before are served by code written for them."""

import gc
import linecache
import traceback
import weakref

import pytest
import torch
from torch.testing import assert_close

import gradtools as gt
from tests.transforms.conftest import tread

X = torch.linspace(-1, 1, 6)
M = 10.0


def code_of(rule):
    """Return the text of the code that serves the rule's last kind of call."""
    codes = list(rule._lowered.codes.values())
    return codes[-1].text if codes else None


def is_served(rule, *args):
    """Whether generated code takes a call."""
    from gradtools.lowering.express import ASTRAY

    return rule._lowered.express(args) is not ASTRAY


@pytest.fixture(autouse=True)
def _marker_rules_are_wrong_on_purpose(unchecked):
    pass


def marker(fun, fwd=None, bwd=None, **options):
    """Return a rule whose derivative is ten times that of ``x * w``."""
    rule = gt.custom_vjp(fun, **options)
    if fwd is not None:
        rule.def_fwd(fwd)
    rule.def_bwd(bwd)
    return rule


@pytest.fixture
def product():
    return marker(
        lambda x, w: x * w,
        lambda x, w: (x * w, (x, w)),
        lambda r, g: (M * g * r[1], M * g * r[0]),
    )


def both():
    return X.clone().requires_grad_(), (X + 2).requires_grad_()


def assert_is_ten_times_the_product(rule, x, w):
    out = rule(x, w)
    assert_close(out, x * w)
    grads = torch.autograd.grad(out.sum(), (x, w))
    assert_close(grads, (M * w.detach(), M * x.detach()))


def test_a_rule_is_served_after_a_few_calls(product):
    x, w = both()
    assert not product.reports
    for _ in range(4):
        assert_is_ten_times_the_product(product, x, w)
    assert is_served(product, x, w)
    assert_is_ten_times_the_product(product, x, w)


def test_new_shapes_share_the_code(product):
    for size in (3, 4, 5, 3):
        tread(product, (torch.ones(size), torch.ones(size)))
    assert len(product._lowered.codes) == 1
    assert all(
        is_served(product, *[torch.ones(s, requires_grad=True)] * 2) for s in (3, 5)
    )


@pytest.mark.parametrize(
    "change",
    {
        "dtype": lambda x, w: (x.double(), w.double()),
        "shape": lambda x, w: (x[:3], w[:3]),
        "needs": lambda x, w: (x, w.detach()),
        "order of the batch": lambda x, w: (x[None], w[None]),
        "empty": lambda x, w: (x[:0], w[:0]),
        "twice the same": lambda x, w: (w, w),
        "not contiguous": lambda x, w: (x.reshape(2, 3).T, w.reshape(2, 3).T),
        "a parameter": lambda x, w: (x, torch.nn.Parameter(w.detach())),
    }.items(),
    ids=lambda item: item[0],
)
def test_other_calls_between_are_right(product, change):
    tread(product, both())
    x, w = both()
    for _ in range(3):
        others = change[1](x, w)
        out = product(*others)
        assert_close(out, others[0] * others[1])
        wanted = [t for t in (x, w, *others) if t.requires_grad]
        given = torch.autograd.grad(out.sum(), wanted, allow_unused=True)
        plain = torch.autograd.grad(
            (others[0] * others[1]).sum(), wanted, allow_unused=True
        )
        expected = [None if p is None else M * p for p in plain]
        assert_close(given, tuple(expected))
        assert_is_ten_times_the_product(product, x, w)


def test_keywords_and_defaults_are_served():
    rule = marker(
        lambda x, *, slope=2.0, flag=True: x * slope,
        lambda x, *, slope=2.0, flag=True: (x * slope, (x, slope)),
        lambda r, g: {"x": M * g * r[1]},
    )
    x, _ = both()
    for slope in (2.0, 3.0, 4.0) * 3:
        out = rule(x, slope=slope)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert_close(grad, torch.full_like(x, M * slope))
    assert len(rule._lowered.codes) == 1
    assert "slope=a1" in code_of(rule)


def test_containers_keep_their_order():
    seen = []

    def fwd(params):
        seen.append(list(params))
        return params["a"] * params["b"], params

    rule = marker(
        lambda params: params["a"] * params["b"],
        fwd,
        lambda r, g: ({"b": M * g * r["a"], "a": M * g * r["b"]},),
    )
    x, w = both()
    for order in ("ab", "ba") * 5:
        tensors = {"a": x, "b": w}
        params = {key: tensors[key] for key in order}
        out = rule(params)
        assert seen[-1] == list(order)
        assert_close(torch.autograd.grad(out.sum(), (x, w)), (M * w, M * x))
    assert code_of(rule)


def test_the_users_containers_are_not_handed_over():
    rule = marker(
        lambda params: params["a"] * 1,
        lambda params: (params.pop("a") * 1, ()),
        lambda r, g: ({"a": M * g},),
    )
    x, _ = both()
    for _ in range(6):
        params = {"a": x}
        rule(params).sum().backward()
        assert params == {"a": x}


def test_kinds_of_residuals():
    """Sizes, numbers, text, None, nested containers, and the same tensor twice."""

    def fwd(x, dim):
        y = x.exp()
        return y, {"y": [y, y], "x": (x, x * 2), "rest": (x.shape, dim, 3, "t", None)}

    def bwd(r, g):
        assert r["y"][0] is r["y"][1]
        assert r["rest"] == (torch.Size([2, 3]), 0, 3, "t", None)
        assert type(r["rest"][0]) is torch.Size
        return M * g * r["y"][0] + 0 * r["x"][1], None

    rule = marker(lambda x, dim: x.exp(), fwd, bwd)
    x = X.reshape(2, 3).requires_grad_()
    for _ in range(6):
        (grad,) = torch.autograd.grad(rule(x, 0).sum(), x, create_graph=True)
        assert_close(grad, M * x.exp())
        (second,) = torch.autograd.grad(grad.sum(), x)
        assert_close(second, M * M * x.exp())
        rule(x, 0).sum().backward()
    assert "Size" in code_of(rule)


@pytest.mark.parametrize(
    "kind", ["output is input", "residual moves", "number of outputs"]
)
def test_a_fwd_that_does_otherwise_goes_the_general_way(kind):
    calls = iter(range(100))

    def fwd(x, w):
        odd = next(calls) % 5 == 4
        y = x * w
        if odd and kind == "output is input":
            return x, (x, w)
        if odd and kind == "residual moves":
            return y, [w * 1.0, x]
        return y, (x, w)

    def bwd(r, g):
        if isinstance(r, list):
            return M * g * r[0], M * g * r[1]
        return M * g * r[1], M * g * r[0]

    rule = marker(lambda x, w: x * w, fwd, bwd)
    x, w = both()
    for _ in range(40):
        out = rule(x, w)
        grads = torch.autograd.grad(out.sum(), (x, w))
        assert_close(grads, (M * w.detach(), M * x.detach()))
        assert out is not x


@pytest.mark.parametrize(
    ("bwd", "words"),
    [
        (lambda r, g: (g, g, g), "a tuple of 3"),
        (lambda r, g: (g[:2], g), "shape (2,)"),
        (lambda r, g: (g.double(), g), "float64"),
        (lambda r, g: (1.0, g), "a value of type float"),
        (lambda r, g: {"x": g, "v": g}, "unknown names 'v'"),
        (lambda r, g: g, "a tensor of shape (6,)"),
    ],
)
def test_a_malformed_return_is_refused_also_late(bwd, words):
    calls = iter(range(100))

    def right_at_first(r, g):
        return bwd(r, g) if next(calls) > 5 else (M * g * r[1], M * g * r[0])

    rule = marker(lambda x, w: x * w, lambda x, w: (x * w, (x, w)), right_at_first)
    tread(rule, both(), times=5)
    x, w = both()
    with pytest.raises(gt.GradtoolsError) as error:
        tread(rule, (x, w))
    assert words in str(error.value)
    assert is_served(rule, x, w)


def test_the_code_shows_in_tracebacks():
    calls = iter(range(100))

    def bwd(r, g):
        if next(calls) > 5:
            raise ValueError("of the user's")
        return M * g

    rule = marker(lambda x: x * 1, lambda x: (x * 1, ()), bwd)
    tread(rule, (X,), times=5)
    with pytest.raises(ValueError, match="of the user's") as error:
        tread(rule, (X,))
    lines = "".join(traceback.format_exception(error.value))
    assert "returned = bwd((), g0)" in lines
    assert "raised in bwd" in lines
    assert any(name.startswith("<gradtools") for name in linecache.cache)


def test_a_free_variable_that_comes_to_need_a_gradient_is_found(product):
    scale = [torch.tensor(2.0)]
    rule = marker(
        lambda x: x * scale[0],
        lambda x: (x * scale[0], ()),
        lambda r, g: M * g * scale[0],
    )
    tread(rule, (X,))
    assert is_served(rule, X.clone().requires_grad_())
    scale[0].requires_grad_()
    with pytest.raises(gt.CapturedTensorError, match="scale"):
        rule(X.clone().requires_grad_())


def test_under_every_policy(product):
    x, w = both()
    tread(product, (x, w))
    with gt.gradcheck_policy("always"):
        assert not is_served(product, x, w)
    assert is_served(product, x, w)


def test_stating_another_bwd_takes_effect(product):
    x, w = both()
    tread(product, (x, w))
    product.def_bwd(lambda r, g: (0 * g, 0 * g))
    assert_close(torch.autograd.grad(product(x, w).sum(), x), (torch.zeros_like(x),))


def test_nothing_outlives_a_call(product):
    tread(product, both())
    x, w = both()
    out = product(x, w)
    dead = [weakref.ref(t) for t in (x, w, out)]
    torch.autograd.grad(out.sum(), (x, w))
    del x, w, out
    gc.collect()
    assert [ref() for ref in dead] == [None] * 3


def test_a_rule_that_is_dropped_takes_its_code_along():
    rule = marker(lambda x: x * 1, lambda x: (x * 1, ()), lambda r, g: M * g)
    tread(rule, (X,))
    gone = weakref.ref(rule)
    del rule
    gc.collect()
    assert gone() is None


def test_tensors_of_a_transform_that_is_over(product):
    tread(product, both())
    leaked = []

    def f(x):
        leaked.append(x)
        return x.sum()

    torch.func.grad(f)(X.clone())
    _, w = both()
    out = product(leaked[0], w)
    kept = next(t for t in out.grad_fn.saved_tensors if t is not w)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(kept)
    assert_close(out, X * w)
    (grad,) = torch.autograd.grad(out.sum(), w)
    assert_close(grad, M * X)


def test_nondiff_arguments_are_left_out_of_the_return():
    rule = gt.custom_vjp(lambda n, x: x**n, nondiff_argnums=0)
    rule.def_fwd(lambda n, x: (x**n, x))
    rule.def_bwd(lambda n, x, g: (M * n * g * x ** (n - 1),))
    x, _ = both()
    for n in (2, 3) * 4:
        (grad,) = torch.autograd.grad(rule(n, x).sum(), x)
        assert_close(grad, M * n * x.detach() ** (n - 1))
    assert code_of(rule)


def test_a_dict_that_names_a_nondiff_argument_is_refused_also_late():
    calls = iter(range(100))

    def bwd(n, x, g):
        gradient = M * n * g * x ** (n - 1)
        return {"x": gradient} if next(calls) < 6 else {"n": None, "x": gradient}

    rule = gt.custom_vjp(lambda n, x: x**n, nondiff_argnames="n")
    rule.def_fwd(lambda n, x: (x**n, x))
    rule.def_bwd(bwd)
    x, _ = both()
    for _ in range(6):
        (grad,) = torch.autograd.grad(rule(2, x).sum(), x)
        assert_close(grad, 2 * M * x.detach())
    assert is_served(rule, 2, x)
    with pytest.raises(gt.BackwardContractError, match="unknown names 'n'"):
        torch.autograd.grad(rule(2, x).sum(), x)


def test_more_shapes_than_are_remembered(product, monkeypatch):
    monkeypatch.setattr("gradtools.lowering.express._MOST_SHAPES", 3)
    for _ in range(2):
        for size in range(1, 7):
            tread(product, (torch.ones(size), torch.ones(size)))
            assert is_served(product, *[torch.ones(size, requires_grad=True)] * 2)
    (code,) = product._lowered.codes.values()
    assert len(code.known) <= 3


def test_kinds_of_calls_that_take_turns_are_all_served():
    rule = marker(
        lambda xs: sum(xs) * 1,
        lambda xs: (sum(xs) * 1, len(xs)),
        lambda n, g: ([M * g] * n,),
    )
    kinds = [[X.clone().requires_grad_() for _ in range(n)] for n in (1, 2, 3)]
    for _ in range(5):
        for xs in kinds:
            (grad,) = torch.autograd.grad(rule(xs).sum(), xs[-1])
            assert_close(grad, torch.full_like(X, M))
    assert len(rule._lowered.codes) == 3
