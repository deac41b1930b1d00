"""Under torch.compile and torch.export a kernel is an operator, and its rule holds.

The rules here are markers: ten times the derivative, which only they can give.
"""

import ctypes
import ctypes.util
import enum
import functools
import gc
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch.testing import assert_close

import gradtools as gt
from tests.rules.stating import gradients

pytestmark = pytest.mark.usefixtures("unchecked")

X = torch.tensor([0.5, -1.25, 2.0, 3.0], dtype=torch.float64)
W = torch.tensor([1.5, 0.25, -0.5, 1.0], dtype=torch.float64)
BACKENDS = ["eager", "aot_eager", "inductor"]
FAST = ["eager", "aot_eager"]


def like(x, *rest, **named):
    return torch.empty_like(x)


@gt.external(out=like, numpy=True)
def product(x, w):
    return x * w


@product.def_bwd
def _(residuals, g):
    (x, w), _ = residuals
    return product(g, w), product(g, x)


@gt.external(out=like, numpy=True)
def scaled(x, w, power=2.0):
    return w * x**power


@scaled.def_bwd
def _(residuals, g):
    (x, w, power), _ = residuals
    slope = 10 * power * x ** (power - 1)
    return {"x": product(g * slope, w), "w": 10 * product(g, x**power)}


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_training_step_runs_the_rule(backend):
    optimizer_step = 0.1

    def step(x, w):
        loss = (scaled(x, w) + x).sum()
        g, h = torch.autograd.grad(loss, (x, w))
        return x - optimizer_step * g, w - optimizer_step * h

    def loss(x, w):
        return (scaled(x, w) + x).sum()

    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    compiled(loss, backend)(x, w).backward()
    assert_close((x.grad, w.grad), (20 * W * X + 1, 10 * X**2))
    by_func = compiled(torch.func.grad(loss, (0, 1)), backend)
    assert_close(by_func(X, W), (20 * W * X + 1, 10 * X**2))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dynamic", [False, True])
def test_transforms(backend, dynamic):
    loss = lambda x, w: scaled(x, w).sum()
    each = compiled(torch.func.vmap(torch.func.grad(loss)), backend, dynamic=dynamic)
    rows = torch.stack([X, 2 * X])
    assert_close(each(rows, rows), 20 * rows**2)
    assert_close(each(rows[:, :3], rows[:, :3]), 20 * rows[:, :3] ** 2)
    tangent = compiled(
        lambda x, w, t: torch.func.jvp(lambda x: scaled(x, w), (x,), (t,))[1],
        backend,
        dynamic=dynamic,
    )
    assert_close(tangent(X, W, W), 20 * X * W * W)
    hessian = compiled(torch.func.hessian(loss), backend, dynamic=dynamic)
    assert_close(hessian(X, W), (20 * W).diag())


def test_dynamic_shapes_compile_once():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = compiled(lambda x, w: scaled(x, w).sum(), counter, dynamic=True)
    counts = []
    for size in (4, 7, 30, 5):
        x = torch.linspace(0, 1, size).requires_grad_()
        w = torch.ones(size)
        assert_close(gradients(step(x, w), x)[0], 20 * x.detach())
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


@pytest.mark.parametrize("backend", FAST)
def test_numbers_cross(backend):
    step = compiled(lambda x, w, p: scaled(x, w, p).sum(), backend)
    x = X.abs().requires_grad_()
    for power in (1.0, 2.0, 3.0, 2.5, 3):
        expected = 10 * power * W * x.detach() ** (power - 1)
        assert_close(gradients(step(x, W, power), x)[0], expected)


def test_the_graph_has_one_operator_with_names():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    step = torch.compile(
        lambda x, w: scaled(x, w) + 1,
        fullgraph=True,
        backend=torch._dynamo.backends.common.aot_autograd(fw_compiler=backend),
    )
    assert_close(step(X, W), W * X**2 + 1)
    calls = [str(n.target) for n in graphs[0].graph.nodes if n.op == "call_function"]
    assert sum(call.startswith("gradtools.scaled") for call in calls) == 1
    schema = next(
        n.target._schema
        for n in graphs[0].graph.nodes
        if str(n.target).startswith("gradtools.scaled")
    )
    assert "(Tensor x, Tensor w, float power) -> Tensor" in str(schema)


def test_trees_texts_dtypes_and_several_outputs():
    @gt.external(out=lambda p, **how: {"s": p["x"], "rest": (p["i"], p["x"][0])})
    def tree(p, *, n=1, how="plus", kind=None):
        assert (how, kind) == ("times", torch.float32)
        return {"s": p["x"] * n, "rest": (p["i"] + n, p["x"][0] * n)}

    tree.def_bwd(lambda r, g: {"p": {"x": 10 * r[0][1] * g["s"], "i": None}})
    i = torch.arange(3)
    call = lambda x, n: tree({"x": x, "i": i}, n=n, how="times", kind=torch.float32)
    assert_close(compiled(call)(X, 2), {"s": 2 * X, "rest": (i + 2, 2 * X[0])})
    x = X.clone().requires_grad_()
    loss = compiled(lambda x: call(x, 3)["s"].sum())
    assert_close(gradients(loss(x), x)[0], torch.full_like(X, 30))
    by_func = compiled(torch.func.grad(lambda x: call(x, 3)["s"].sum()))
    assert_close(by_func(X), torch.full_like(X, 30))


def test_methods_and_other_objects():
    class Scale:
        def __init__(self, factor):
            self.factor = factor

        @gt.external(out=lambda self, x: torch.empty_like(x), numpy=True)
        def times(self, x):
            return self.factor * x

        @times.def_bwd
        def _(self, residuals, g):
            return None, 10 * self.factor * g

    scales = [Scale(3.0), Scale(5.0)]
    for scale in scales:
        loss = compiled(torch.func.grad(lambda x, scale=scale: scale.times(x).sum()))
        assert_close(loss(X), torch.full_like(X, 10 * scale.factor))
        scale.factor += 1
        assert_close(loss(X), torch.full_like(X, 10 * scale.factor))


def test_names_that_a_schema_cannot_have():
    scope = {}
    exec("def été(x, à): return à * x", scope)
    kernel = gt.external(scope["été"], out=like)
    assert_close(compiled(lambda x: kernel(x, 3.0))(X), 3 * X)


class Mode(enum.IntEnum):
    DOUBLE = 1
    TRIPLE = 2


@pytest.mark.parametrize("backend", FAST)
def test_a_number_with_a_name_keeps_it(backend):
    def factor_of(mode):
        return 2 if mode is Mode.DOUBLE else 3 if mode is Mode.TRIPLE else 1000

    times = gt.external(lambda x, mode: x * factor_of(mode), out=like)
    times.def_bwd(lambda residuals, g: (g * factor_of(residuals[0][1]), None))

    def loss(x, mode):
        return times(x, mode).sum()

    step, by_func = (compiled(f, backend) for f in (loss, torch.func.grad(loss)))
    for mode, factor in [(Mode.DOUBLE, 2.0), (Mode.TRIPLE, 3.0)]:
        x = X.clone().requires_grad_()
        assert_close(gradients(step(x, mode), x), (X * 0 + factor,))
        assert_close(by_func(X, mode), X * 0 + factor)


def test_kernels_of_one_name_do_not_collide():
    def made(factor):
        kernel = gt.external(lambda x: factor * x, out=like)
        kernel.def_bwd(lambda residuals, g: 10 * factor * g)
        return kernel

    kernels = [made(factor) for factor in (2, 3, 4)]
    steps = [compiled(lambda x, k=k: k(x)) for k in kernels]
    for _ in range(2):
        for factor, step in zip((2, 3, 4), steps, strict=True):
            assert_close(step(X), factor * X)


def test_an_output_with_strides_of_its_own():
    @gt.external(out=lambda x: x.new_empty(x.shape[::-1]))
    def transposed(x):
        return (x + 0).T

    matrix = torch.arange(6.0).reshape(2, 3)
    step = compiled(lambda x: transposed(x).contiguous() * 2, "inductor")
    assert_close(step(matrix), 2 * matrix.T)


def test_a_wrong_kernel_is_an_error_in_a_graph_too():
    wrong = gt.external(lambda x: x[:2].clone(), out=like)
    with pytest.raises(gt.ForwardContractError, match="something else than out= says"):
        compiled(lambda x: wrong(x) + 1)(X)


def test_a_kernel_is_checked_while_it_is_traced():
    wrong = gt.external(np.sin, out=like, numpy=True)
    wrong.def_bwd(lambda residuals, g: -g * residuals[0][0].cos())
    with (
        gt.gradcheck_policy("first"),
        pytest.raises(gt.GradientMismatchError, match="has the wrong sign"),
    ):
        compiled(lambda x: wrong(x).sum())(X.clone().requires_grad_())


class Model(torch.nn.Module):
    def forward(self, x, w):
        return scaled(x, w) + x


def exported(*args, **options):
    return torch.export.export(Model(), args, **options)


def test_an_exported_program_keeps_kernel_and_rule():
    n = torch.export.Dim("n")
    program = exported(X, W, dynamic_shapes={"x": {0: n}, "w": {0: n}})
    targets = {str(node.target) for node in program.graph.nodes}
    assert any(target.startswith("gradtools.scaled") for target in targets)
    x, w = torch.ones(7).requires_grad_(), torch.full((7,), 2.0)
    out = program.module()(x, w)
    assert_close(out, torch.full((7,), 3.0))
    (first,) = gradients(out, x, create_graph=True)
    assert_close(first, torch.full((7,), 41.0))
    assert_close(gradients(first, x)[0], torch.full((7,), 40.0))


def test_forward_mode_of_an_exported_program_is_an_error_and_no_zero():
    module = exported(X, W).module()
    with pytest.raises(gt.TransformError, match="forward mode reached the operator"):
        torch.func.jvp(module, (X, W), (X, W))


LIBM = ctypes.CDLL(ctypes.util.find_library("m"))
LIBM.sin.restype, LIBM.sin.argtypes = ctypes.c_double, [ctypes.c_double]


def test_a_global_library_of_ctypes_is_no_obstacle_under_a_transform():
    @gt.external(out=like)
    def sine(x):
        return torch.tensor([LIBM.sin(v) for v in x.tolist()], dtype=x.dtype)

    sine.def_bwd(lambda residuals, g: 10 * g * torch.cos(residuals[0][0]))
    step = compiled(torch.func.grad(lambda x: sine(x).sum()))
    assert_close(step(X), 10 * torch.cos(X))


def test_strict_export_is_an_error_with_a_name():
    with pytest.raises(gt.TransformError, match=r"scaled: torch.export\(strict=True\)"):
        exported(X, W, strict=True)


def raises(x):
    raise KeyError("no such size")


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("out", "options", "error", "message"),
    [
        (like, {"dtypes": torch.float32}, gt.DefinitionError, "does not take this dty"),
        (lambda x: x.shape, {}, gt.DefinitionError, "out= must return tensors"),
        (lambda x: x[: int(x[0])], {}, gt.DefinitionError, "out= needs the values"),
        (raises, {}, gt.TransformError, "cannot trace it: KeyError: 'no such size'"),
    ],
)
def test_what_is_wrong_is_said_under_fullgraph(backend, out, options, error, message):
    """Dynamo calls all of it an unsupported type of output."""
    kernel = gt.external(lambda x: 2 * x, out=out, **options)
    with pytest.raises(error, match=message):
        compiled(lambda x: kernel(x) + 1, backend)(X)


def test_without_fullgraph_a_call_that_cannot_be_traced_is_left_to_python():
    kernel = gt.external(lambda x: 2 * x[: int(x[3])], out=lambda x: x[: int(x[3])])
    step = torch.compile(lambda x: kernel(x + 0) + 1, backend="aot_eager")
    assert_close(step(X), 2 * X[:3] + 1)


def test_a_constant_that_cannot_cross():
    kernel = gt.external(lambda x, dtype: 2 * x, out=like)
    assert_close(compiled(lambda x: kernel(x, torch.strided))(X), 2 * X)
    assert_close(compiled(lambda x: kernel(x, torch.contiguous_format))(X), 2 * X)
    of_numpy = np.dtype("f4")
    with pytest.raises(gt.TransformError, match="a constant that cannot be handed"):
        compiled(lambda x: kernel(x, of_numpy))(X)


def test_out_that_needs_values():
    @gt.external(out=lambda x: x.new_empty(int(x[0])))
    def counted(x):
        return torch.ones(int(x[0]), dtype=x.dtype)

    assert_close(counted(3 + 0 * X), torch.ones(3))
    with pytest.raises(gt.DefinitionError, match="counted: out= needs the values"):
        torch.export.export(torch.nn.Sequential(Called(counted)), (3 + 0 * X,))


class Called(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_a_graph_that_has_outlived_its_kernel_says_so():
    kernel = gt.external(lambda x: x + 1, out=like)
    program = torch.export.export(Called(kernel), (X,))
    gone = weakref.ref(kernel.kernel)
    module = program.module()
    assert_close(module(X), X + 1)
    del kernel, program
    module.function = None
    gc.collect()
    if gone() is None:
        with pytest.raises(gt.TransformError, match="an external that a graph calls"):
            module(X)


def test_a_graph_that_has_outlived_an_object_says_so():
    class Options:
        pass

    kernel = gt.external(lambda x, options: x + 1, out=like)
    called = Called(None)
    called.function = functools.partial(kernel, options=Options())
    gone = weakref.ref(called.function.keywords["options"])
    module = torch.export.export(called, (X,)).module()
    assert_close(module(X), X + 1)
    module.function = called.function = None
    gc.collect()
    assert gone() is None
    with pytest.raises(gt.TransformError, match="an object that a graph hands to an e"):
        module(X)


def test_modes_that_look_on_see_the_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = X.clone().requires_grad_()
    with Look():
        out = scaled(x, W)
    assert any(name.startswith("gradtools.scaled") for name in seen)
    assert_close(gradients(out, x)[0], 20 * W * X)


def test_nothing_is_registered_before_a_trace():
    code = """
import sys, torch
import gradtools as gt

@gt.external(out=lambda x: torch.empty_like(x))
def lazily(x):
    return 2 * x

lazily.def_bwd(lambda residuals, g: 2 * g)
x = torch.ones(2, requires_grad=True)
lazily(x).sum().backward()
torch.func.vmap(lazily)(x.detach())
print("torch._dynamo" in sys.modules, hasattr(torch.ops.gradtools, "lazily"))
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout == "False False\n"
