"""torch.compile around a rule: graph breaks, guards, modules, forward mode, export."""

import contextlib

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing import assert_close

import gradtools as gt
from tests.runtime.rules import Scaled, native

pytestmark = pytest.mark.usefixtures("unchecked")


@gt.custom_vjp
def cube(x):
    return x**3


@cube.def_bwd
def _(residuals, g):
    ((x,), _) = residuals
    return 30 * g * x**2


def x():
    return torch.linspace(0.1, 1.0, 4)


class Counting:
    """A backend that counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module.forward


# Dynamo looks at .grad of what it resumes with, and torch warns of that.
resumed = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@resumed
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_graph_break_beside_the_rule(backend):
    @torch.compile(backend=backend)
    def step(x):
        x = x + 0
        torch._dynamo.graph_break()
        y = cube(x).sum()
        torch._dynamo.graph_break()
        return y

    arg = x().requires_grad_()
    (grad,) = torch.autograd.grad(step(arg), arg)
    assert_close(grad, 30 * arg**2)


@resumed
def test_backward_inside_a_broken_graph():
    @torch.compile(backend="aot_eager")
    def step(x):
        y = cube(x).sum()
        torch._dynamo.graph_break()
        y.backward()
        return x + 1

    arg = x().requires_grad_()
    step(arg)
    assert_close(arg.grad, 30 * arg**2)


def test_a_wrong_rule_is_found_where_the_graph_is_broken():
    with gt.gradcheck_policy("first"):

        @gt.custom_vjp
        def double(x):
            return 2 * x

        double.def_bwd(lambda residuals, g: 3 * g)
        hidden = torch._dynamo.disable(lambda x: double(x).sum())
        step = torch.compile(lambda x: hidden(x) + 1, backend="aot_eager")
        with pytest.raises(gt.GradientMismatchError, match="not the derivative"):
            step(x().requires_grad_())


def test_a_module_that_holds_rules():
    module = Scaled()
    whole = torch.compile(module, fullgraph=True, backend="aot_eager")
    whole(x()).sum().backward()
    (expected,) = torch.autograd.grad(native(3 * x(), module.beta).sum(), module.beta)
    assert_close(module.beta.grad, expected)


@pytest.mark.parametrize("transform", [lambda f: f, torch.func.grad])
def test_a_second_call_compiles_nothing(transform):
    backend = Counting()
    f = transform(lambda x: cube(x).sum())
    step = torch.compile(f, fullgraph=True, backend=backend)
    for _ in range(5):
        step(x())
    assert backend.graphs == 1


def test_numbers_that_the_rule_does_not_read_compile_nothing():
    settings = {"seen": 2.0, "unseen": 0}

    @gt.custom_vjp
    def scaled(x):
        return settings["seen"] * x

    scaled.def_bwd(lambda residuals, g: settings["seen"] * g)
    backend = Counting()
    step = torch.compile(
        torch.func.grad(lambda x: scaled(x).sum()), fullgraph=True, backend=backend
    )
    for _ in range(3):
        step(x())
    assert backend.graphs == 1
    settings["seen"] = 3.0
    assert_close(step(x()), torch.full((4,), 3.0))
    assert backend.graphs == 2


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad])
@pytest.mark.parametrize("first", [True, False], ids=["compiled before", "fresh"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_forward_mode_level_around_a_compiled_function(backend, first, mode):
    step = torch.compile(lambda x: 2 * cube(x), backend=backend)
    if first:
        step(x())
    with mode(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x(), torch.ones(4))
        tangent = forward_ad.unpack_dual(step(dual)).tangent
    assert_close(tangent, 60 * x() ** 2)


@pytest.mark.parametrize("first", [True, False], ids=["compiled before", "fresh"])
def test_forward_mode_around_one_whole_graph_is_refused(first):
    step = torch.compile(lambda x: 2 * cube(x), backend="aot_eager", fullgraph=True)
    if first:
        step(x())
    with (
        forward_ad.dual_level(),
        pytest.raises(torch._dynamo.exc.Unsupported, match=r"[Ff]orward.mode|disable"),
    ):
        step(forward_ad.make_dual(x(), torch.ones(4)))


def test_export_of_a_derivative_is_refused_by_name():
    class Gradient(torch.nn.Module):
        def forward(self, x):
            return torch.func.grad(lambda x: cube(x).sum())(x)

    with pytest.raises(gt.TransformError, match="cannot trace a derivative") as error:
        torch.export.export(Gradient(), (x(),), strict=False)
    error.match("take its derivative outside")


def test_export_of_a_vmap_keeps_the_forward():
    class Batched(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return torch.vmap(cube)(self.scale * x)

    with pytest.warns(UserWarning, match="export keeps the forward of the rule cube"):
        program = torch.export.export(Batched(), (x(),), strict=False)
    assert_close(program.module()(x()), (2 * x()) ** 3)


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_export_keeps_the_forward_and_says_so(strict, is_known):
    class Model(torch.nn.Module):
        def forward(self, x):
            return cube(x)

    arg = x().requires_grad_()
    for _ in range(4 * is_known):  # until there is code for such calls
        cube(arg).sum().backward()
    with pytest.warns(UserWarning, match="export keeps the forward of the rule cube"):
        program = torch.export.export(Model(), (arg,), strict=strict)
    assert_close(program.module()(x()), x() ** 3)


@gt.custom_vjp(contract=gt.Surrogate())
def multiplied(a, b):
    return a @ b


@multiplied.def_bwd
def _(residuals, g):
    (a, b), _ = residuals
    narrow = (a @ b).dtype == torch.bfloat16  # the autocast state of the forward
    return (10 if narrow else 20) * (g.to(b.dtype) @ b.mT), None


@pytest.mark.parametrize("is_inside", [False, True], ids=["around", "inside"])
@pytest.mark.parametrize("transform", [lambda f: f, torch.func.grad])
def test_bwd_runs_under_the_autocast_state_of_fwd(transform, is_inside):
    def loss(a, b):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_inside):
            return multiplied(a, b).float().sum()

    step = torch.compile(
        transform(loss if is_inside else lambda a, b: multiplied(a, b).float().sum()),
        fullgraph=True,
        backend="aot_eager",
    )
    for enabled in (True, False, True):
        eye = torch.eye(3, dtype=torch.float32)  # autocast leaves doubles alone
        a = eye.clone().requires_grad_(transform is not torch.func.grad)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled and not is_inside):
            found = step(a, eye)
        if a.requires_grad:
            (found,) = torch.autograd.grad(found, a)
        factor = 10.0 if enabled or is_inside else 20.0
        assert_close(found, torch.full_like(eye, factor))
