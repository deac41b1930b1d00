"""What a lifted class may do with its ctx, its arguments and its outputs."""

import pickle

import pytest
import torch
from torch.autograd.function import once_differentiable
from torch.testing import assert_close

import gradtools as gt
from tests.rules.stating import derivative, gradients, leaf, twice_backward

Function = torch.autograd.Function
X = torch.tensor([0.5, -1.2, 2.0], dtype=torch.float64)


class Saves(Function):
    """x sin(x), with an intermediate result saved."""

    @staticmethod
    def forward(ctx, x):
        sine = x.sin()
        ctx.save_for_backward(x, sine)
        return x * sine

    @staticmethod
    def backward(ctx, g):
        x, sine = ctx.saved_tensors
        return g * (sine + x * x.cos())


class Attributes(Function):
    """The same, with everything on ctx, in containers."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = {"sine": [x.sin()], "shape": x.shape, "power": 1}
        ctx.x = x
        return x * ctx.kept["sine"][0]

    @staticmethod
    def backward(ctx, g):
        assert isinstance(ctx.kept["shape"], torch.Size)
        (sine,) = ctx.kept["sine"]
        return g * (sine + ctx.x * ctx.x.cos()) ** ctx.kept["power"]


class InTwoSteps(Function):
    """The same, with setup_context."""

    @staticmethod
    def forward(x):
        return x * x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x.sin() + x * x.cos())


class OfTheOutput(Function):
    """exp, which saves its output."""

    @staticmethod
    def forward(ctx, x):
        out = x.exp()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, g):
        (out,) = ctx.saved_tensors
        return g * out


class Heir(Saves):
    """A subclass, which states nothing."""


def xsinx(x):
    return x * x.sin()


EXACT = [
    (Saves, xsinx),
    (Attributes, xsinx),
    (InTwoSteps, xsinx),
    (Heir, xsinx),
    (OfTheOutput, torch.exp),
]


def jvp(function, x):
    return torch.func.jvp(function, (x,), (torch.cos(x),))


USES = {
    "backward": lambda f: gradients(f(x := X.clone().requires_grad_()), x),
    "backward twice": lambda f: twice_backward(f, X),
    "grad": lambda f: derivative(f)(X),
    "grad of grad": lambda f: derivative(derivative(f))(X),
    "grad of grad of grad": lambda f: derivative(derivative(derivative(f)))(X),
    "jvp": lambda f: jvp(f, X),
    "jvp of grad": lambda f: jvp(derivative(f), X),
    "grad of jvp": lambda f: derivative(lambda x: jvp(f, x)[1])(X),
    "jvp of jvp": lambda f: jvp(lambda x: jvp(f, x)[1], X),
    "vmap": lambda f: torch.func.vmap(f)(X),
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(f))(X),
    "vmap of jvp": lambda f: torch.func.vmap(lambda x: jvp(f, x))(X),
    "hessian": lambda f: torch.func.hessian(lambda x: f(x).sum())(X),
    "compiled": lambda f: gradients(
        torch.compile(f, backend="aot_eager", fullgraph=True)(
            x := X.clone().requires_grad_()
        ),
        x,
    ),
    "compiled grad": lambda f: torch.compile(
        derivative(f), backend="aot_eager", fullgraph=True
    )(X),
    "compiled vmap": lambda f: torch.compile(
        torch.func.vmap(f), backend="aot_eager", fullgraph=True
    )(X),
}
every_use = pytest.mark.parametrize("use", USES.values(), ids=USES)


@every_use
@pytest.mark.parametrize(("function", "reference"), EXACT)
def test_a_lifted_class_is_a_function_like_any_other(function, reference, use):
    assert_close(use(gt.lift(function)), use(reference))


class TenTimes(Function):
    """sin, with ten times its derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 10 * g * x.cos()


MARKED = {
    "backward": (10 * X.cos(),),
    "backward twice": -10 * X.sin(),
    "grad": 10 * X.cos(),
    "grad of grad": -10 * X.sin(),
    "jvp": (X.sin(), 10 * X.cos() ** 2),
    "jvp of grad": (10 * X.cos(), -10 * X.sin() * X.cos()),
    "vmap": X.sin(),
    "vmap of grad": 10 * X.cos(),
    "vmap of jvp": (X.sin(), 10 * X.cos() ** 2),
    "hessian": torch.diag(-10 * X.sin()),
    "compiled": (10 * X.cos(),),
    "compiled grad": 10 * X.cos(),
}


@pytest.mark.parametrize("name", MARKED)
def test_the_backward_of_the_class_is_what_runs(name):
    lifted = gt.lift(TenTimes, contract=gt.Surrogate())
    assert_close(USES[name](lifted), MARKED[name])


def test_undeclared_it_is_found_and_pointed_to_contract():
    with pytest.raises(gt.GradientMismatchError, match="10 times") as caught:
        gt.lift(TenTimes)(leaf(0.3))
    assert "contract=Surrogate" in caught.value.fix
    assert caught.value.rule.startswith("TenTimes")
    assert __file__ in caught.value.function


def test_where_the_second_derivative_of_the_class_is_silently_wrong():
    """sine was saved without its dependence on x; the README of torch warns of it."""
    wrong = twice_backward(Saves.apply, X)
    right = 2 * X.cos() - X * X.sin()
    assert not torch.allclose(wrong, right)
    assert_close(twice_backward(gt.lift(Saves), X), right)


# needs_input_grad, and gradients that torch mends.


class Linear(Function):
    @staticmethod
    def forward(ctx, x, weight, bias=None):
        ctx.save_for_backward(x, weight, bias)
        ctx.seen = ctx.needs_input_grad
        out = x @ weight
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx, g):
        x, weight, _ = ctx.saved_tensors
        assert ctx.seen == ctx.needs_input_grad
        need = ctx.needs_input_grad
        return (
            g @ weight.mT if need[0] else None,
            x.mT @ g if need[1] else None,
            g if need[2] else None,  # of (3, 2): torch sums it to (2,)
        )


def test_needs_defaults_none_and_a_sum_are_torchs():
    x, w, b = torch.randn(3, 4), torch.randn(4, 2), torch.randn(2)
    lifted = gt.lift(Linear)
    for needy in ([x], [w], [x, w], [x, w, b], [b]):
        args = [t.clone().requires_grad_(any(t is n for n in needy)) for t in (x, w, b)]
        leaves = [t for t in args if t.requires_grad]
        assert_close(
            gradients(lifted(*args), *leaves), gradients(Linear.apply(*args), *leaves)
        )
    leaves = [x.requires_grad_(), w.requires_grad_()]
    want = gradients(x @ w, *leaves)
    assert_close(gradients(lifted(x, w), *leaves), want)
    assert_close(gradients(lifted(x, w, None), *leaves), want)
    assert_close(gradients(lifted(x=x, weight=w), *leaves), want)
    assert_close(lifted(x.detach(), weight=w.detach()), (x @ w).detach())


def test_a_wrong_number_of_arguments_is_pythons_error():
    for args, kwargs in [((), {}), ((X, X, X, X), {}), ((X,), {"no": X})]:
        with pytest.raises(TypeError):
            gt.lift(Linear)(*args, **kwargs)


class Casts(Function):
    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        return (2 * g).double(), index.double(), None, None


def test_a_cast_a_gradient_for_an_integer_and_trailing_none_pass():
    x = torch.ones(3, dtype=torch.float32, requires_grad=True)
    (got,) = gradients(gt.lift(Casts)(x, torch.arange(3)), x)
    assert_close(got, torch.full((3,), 2.0, dtype=torch.float32))


class WrongShape(Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return g[:2]


def test_what_torch_cannot_mend_either_is_an_error(unchecked):
    with pytest.raises(gt.BackwardContractError, match="does not fit"):
        gradients(gt.lift(WrongShape)(x := leaf(1.0, 2.0, 3.0)), x)


# Outputs.


class WithItsSlope(Function):
    """sin and, not differentiable, cos."""

    @staticmethod
    def forward(ctx, x):
        slope = x.cos()
        ctx.mark_non_differentiable(slope)
        ctx.save_for_backward(slope)
        return x.sin(), slope

    @staticmethod
    def backward(ctx, g, unused):
        assert unused is not None
        (slope,) = ctx.saved_tensors
        return g * slope


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_floating_output_that_is_not_differentiable(dtype):
    x = X.clone().to(dtype).requires_grad_()
    out, slope = gt.lift(WithItsSlope, contract=gt.Exact(rtol=1e-2))(x)
    assert_close((out, slope), (x.sin(), x.cos()))
    assert slope.dtype == dtype
    assert not slope.requires_grad
    assert_close(gradients(out, x), (x.cos().detach(),))


@pytest.mark.parametrize("use", ["backward twice", "jvp of grad", "vmap of grad"])
def test_it_is_one_under_transforms_too(use):
    lifted = gt.lift(WithItsSlope)
    assert_close(USES[use](lambda x: lifted(x)[0]), USES[use](torch.sin))
    assert_close(
        USES[use](lambda x: lifted(x)[0] * lifted(x)[1]),
        USES[use](lambda x: x.sin() * x.cos().detach()),
    )


class Identity(Function):
    @staticmethod
    def forward(ctx, x, how):
        return {"same": x, "view": x.view_as(x), "twice": (x, x)}[how]

    @staticmethod
    def backward(ctx, *g):
        return sum(g), None


@pytest.mark.parametrize("how", ["same", "view", "twice"])
def test_an_output_may_be_the_input(how):
    x = X.clone().requires_grad_()
    out = gt.lift(Identity)(x, how)
    out = sum(out) if how == "twice" else out
    assert_close(out, X * (2 if how == "twice" else 1))
    assert_close(gradients(out, x), (torch.full_like(X, 2 if how == "twice" else 1),))


class Mixed(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        return x.sin(), None, x.argmax(), "text", x.exp()

    @staticmethod
    def backward(ctx, sine, nothing, index, text, exp):
        assert nothing is None
        assert text is None
        assert index is None
        assert sine is None or exp is None
        raise KeyError("sine" if exp is None else "exp")


def test_outputs_of_every_kind_and_no_zeros_where_none_are_wanted(unchecked):
    out = gt.lift(Mixed)(x := X.clone().requires_grad_())
    assert_close((out[0], out[4], out[2]), (X.sin(), X.exp(), X.argmax()))
    assert (out[1], out[3]) == (None, "text")
    with pytest.raises(KeyError, match="exp") as caught:
        gradients(out[4], x)
    assert "of the rule Mixed" in caught.value.__notes__[0]


class InAList(Function):
    @staticmethod
    def forward(ctx, x):
        return [x.sin()]

    @staticmethod
    def backward(ctx, g):
        return g


def test_tensors_in_a_list_are_refused_where_torch_forgets_their_gradient():
    with pytest.raises(gt.ForwardContractError, match="inside a list") as caught:
        gt.lift(InAList)(leaf(0.3))
    assert "flat tuple" in caught.value.fix


class TakesAList(Function):
    @staticmethod
    def forward(ctx, xs):
        return sum(xs)

    @staticmethod
    def backward(ctx, g):
        return None


def test_so_are_arguments_in_a_list():
    with pytest.raises(gt.DefinitionError, match="inside a container") as caught:
        gt.lift(TakesAList)([leaf(0.3), torch.ones(1)])
    assert caught.value.violations[0].where == "args.xs"
    assert_close(gt.lift(TakesAList)([X, X]), 2 * X)


# Refusals, and their ways out.


class Once(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()


def test_once_differentiable_is_understood():
    lifted = gt.lift(Once)
    assert lifted.rule.once_differentiable
    assert_close(USES["backward"](lifted), (X.cos(),))
    assert_close(USES["jvp"](lifted), USES["jvp"](torch.sin))
    for use in ("backward twice", "grad of grad"):
        with pytest.raises(gt.TransformError, match="once_differentiable"):
            USES[use](lifted)


class Numpy(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.as_tensor(x.detach().numpy() ** 2)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.as_tensor(2 * x.detach().numpy() * g.detach().numpy())


class NumpyOnCtx(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach().numpy()
        return torch.as_tensor(ctx.x**2)

    @staticmethod
    def backward(ctx, g):
        return torch.as_tensor(2 * ctx.x * g.detach().numpy())


def test_an_array_on_ctx_cannot_be_told_apart_by_element():
    lifted = gt.lift(NumpyOnCtx, vmap="sequential")
    assert_close(USES["grad"](lifted), 2 * X)
    assert_close(USES["vmap"](lifted), X**2)
    with pytest.raises(gt.TransformError, match="differ between the elements"):
        USES["vmap of grad"](lifted)


def test_opaque_code_works_once_and_says_so():
    lifted = gt.lift(Numpy, vmap="sequential")
    assert_close(USES["backward"](lifted), (2 * X,))
    assert_close(USES["grad"](lifted), 2 * X)
    assert_close(USES["vmap of grad"](lifted), 2 * X)
    for use in ("backward twice", "jvp of grad", "jvp"):
        with pytest.raises(gt.TransformError, match=r"cannot be d|opaque"):
            USES[use](lifted)


def test_under_vmap_opaque_code_is_pointed_to_sequential():
    with pytest.raises(gt.TransformError, match=r"torch\.func transform") as caught:
        torch.func.vmap(gt.lift(Numpy))(X)
    assert 'lift(Numpy, vmap="sequential")' in caught.value.fix


class Writes(Function):
    """exp, which writes into its argument."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        x.exp_()
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, g):
        (out,) = ctx.saved_tensors
        return g.mul_(out)  # and into its cotangent


def test_a_class_that_writes_gets_copies_where_it_says_so():
    with pytest.raises(gt.DefinitionError, match="in place") as caught:
        gt.lift(Writes)(X.clone().requires_grad_())
    assert "edits_in_place=True" in caught.value.fix
    before = X.clone()
    lifted = gt.lift(Writes, edits_in_place=True)
    for use in USES.values():
        assert_close(use(lifted), use(torch.exp))
    assert_close(X, before)


class EditsTheCotangent(Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return g.mul_(2)


def test_an_edit_in_place_that_the_check_finds_points_there_too():
    with pytest.raises(gt.GradientMismatchError, match="in place") as caught:
        gt.lift(EditsTheCotangent)(leaf(1.0))
    assert "edits_in_place=True" in caught.value.fix


class OwnGraph(Function):
    """sin, with a graph that forward makes and backward walks."""

    @staticmethod
    def forward(ctx, x):
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.out = ctx.x.sin()
        return ctx.out.detach()

    @staticmethod
    def backward(ctx, g):
        return torch.autograd.grad(ctx.out, ctx.x, g, retain_graph=True)


def test_a_graph_of_its_own_serves_the_first_derivative():
    lifted = gt.lift(OwnGraph)
    assert_close(USES["backward"](lifted), (X.cos(),))
    assert_close(USES["grad"](lifted), X.cos())
    with pytest.raises(gt.TransformError, match="opaque object"):
        USES["backward twice"](lifted)


class Reruns(Function):
    """A checkpoint: the function runs again in backward."""

    @staticmethod
    def forward(ctx, function, x, *parameters):
        ctx.function = function
        ctx.save_for_backward(x, *parameters)
        return function(x)

    @staticmethod
    def backward(ctx, g):
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            out = ctx.function(x)
        return None, *torch.autograd.grad(out, (x, *parameters), g)


def test_parameters_that_are_arguments_get_their_gradient():
    layer = torch.nn.Linear(3, 2)
    x = X.clone().requires_grad_()
    leaves = (x, *layer.parameters())
    want = gradients(layer(x), *leaves)
    assert_close(gradients(gt.lift(Reruns)(layer, *leaves), *leaves), want)


def test_parameters_that_are_none_are_refused():
    with pytest.raises(gt.CapturedTensorError, match="parameters"):
        gt.lift(Reruns)(torch.nn.Linear(3, 2), X.clone().requires_grad_())


class Counts(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.n = 1
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        ctx.n += 1
        assert ctx.n == 2
        assert ctx.saved_tensors[0] is ctx.saved_tensors[0]
        (x,) = ctx.saved_tensors
        return g * x.cos()


def test_what_backward_writes_to_ctx_is_gone_the_next_time():
    out = gt.lift(Counts)(x := X.clone().requires_grad_())
    first = gradients(out, x, retain_graph=True)
    assert_close(gradients(out, x), first)


class Applies(Function):
    """A forward and a backward that apply another class."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return OfTheOutput.apply(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * OfTheOutput.apply(x)


def test_a_class_may_apply_another_one():
    lifted = gt.lift(Applies, vmap="sequential")
    for use in ("backward", "backward twice", "grad", "vmap of grad"):
        assert_close(USES[use](lifted), USES[use](torch.exp))
    with pytest.raises(gt.TransformError, match="be lifted too"):
        USES["grad of grad"](gt.lift(Applies))


# The object.


def test_what_is_no_function_class_is_refused_by_name():
    for value, match in [
        (Saves.apply, r"got Saves.apply"),
        (torch.sin, "takes a torch.autograd.Function class"),
        (int, "takes a torch.autograd.Function class"),
        (Function, "has no forward"),
    ]:
        with pytest.raises(gt.DefinitionError, match=match):
            gt.lift(value)
    for options in [
        {"vmap": "fast"},
        {"contract": "exact"},
        {"once_differentiable": 1},
        {"edits_in_place": 1},
        {"probe": 3},
        {"autocast": torch.int8},
    ]:
        with pytest.raises(gt.DefinitionError, match="the option"):
            gt.lift(Saves, **options)


class NoBackward(Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()


def test_a_class_without_backward_serves_where_no_gradient_is_wanted():
    assert_close(gt.lift(NoBackward)(X), X.sin())
    with pytest.raises(gt.DefinitionError, match="states none") as caught:
        gt.lift(NoBackward)(leaf(0.3))
    assert "a backward, or a jvp" in caught.value.fix


class ForwardModeOnly(Function):
    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return t * x.cos()


def test_a_jvp_alone_is_transposed():
    lifted = gt.lift(ForwardModeOnly)
    for use in ("backward", "jvp", "grad of grad", "vmap of jvp", "backward twice"):
        assert_close(USES[use](lifted), USES[use](torch.sin))


saves = gt.lift(Saves)


def test_repr_pickle_and_copies():
    assert repr(saves).startswith("<Lifted Saves (")
    again = pickle.loads(pickle.dumps(gt.lift(Saves, vmap="sequential")))
    assert again.function is Saves
    assert again.rule.vmap == "sequential"
    assert_close(again(X), xsinx(X))


def test_nondiff_arguments_are_told_apart():
    lifted = gt.lift(Linear, nondiff_argnums=0)
    w = torch.ones(3, 1, requires_grad=True)
    (got,) = gradients(lifted(X[None], w, None), w)
    assert_close(got, X[:, None])
    with pytest.raises(gt.DefinitionError, match="nondiff argument"):
        lifted(X[None].clone().requires_grad_(), w, None)


class UnderAutocast(Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float64)
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.mT, x.mT @ g


@pytest.mark.parametrize("enabled", [False, True])
def test_the_decorators_of_autocast_are_understood(enabled):
    x, w = (torch.randn(3, 3, dtype=torch.float32).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        got, want = gt.lift(UnderAutocast)(x, w), UnderAutocast.apply(x, w)
    assert got.dtype == want.dtype
    assert_close(got, want)
    assert_close(gradients(got, x, w), gradients(want, x, w))


class Box:
    """An object that holds a tensor and something that was computed of it."""

    def __init__(self, x):
        self.x = x
        self.cache = {"cosine": x.cos()}


class KeepsABox(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.box = Box(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.box.cache["cosine"] + 0 * ctx.box.x


class KeepsABoxTenTimes(KeepsABox):
    @staticmethod
    def backward(ctx, g):
        return 10 * g * ctx.box.cache["cosine"]


@pytest.mark.parametrize("name", [name for name in USES if "compiled" not in name])
def test_tensors_inside_an_object_on_ctx_are_residuals(name):
    assert_close(USES[name](gt.lift(KeepsABox)), USES[name](torch.sin))


@pytest.mark.parametrize("name", [name for name in MARKED if "compiled" not in name])
def test_it_is_the_backward_of_the_class_that_reads_them(name):
    lifted = gt.lift(KeepsABoxTenTimes, contract=gt.Surrogate())
    assert_close(USES[name](lifted), MARKED[name])


def test_an_object_on_ctx_under_compile():
    assert_close(USES["compiled grad"](gt.lift(KeepsABox)), X.cos())
    assert_close(USES["compiled"](gt.lift(KeepsABox)), (X.cos(),))


def test_calls_in_threads_agree():
    from concurrent.futures import ThreadPoolExecutor

    lifted = gt.lift(Attributes)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: USES["backward"](lifted), range(16)))
    assert_close(found, [USES["backward"](xsinx)] * 16)


class Counted(torch.autograd.Function):
    """Ten times the derivative; an attribute of the name "names", and two outputs."""

    @staticmethod
    def forward(ctx, x):
        ctx.names, size = ["x"], 2 * x
        ctx.mark_non_differentiable(size)
        ctx.save_for_backward(x)
        return x * x, size

    @staticmethod
    def backward(ctx, g, _):
        (x,) = ctx.saved_tensors
        return 20 * g * x * len(ctx.names)

    @staticmethod
    def vmap(info, in_dims, x):
        return (x * x, 2 * x), (in_dims[0], in_dims[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_a_vmap_of_the_class_may_return_what_is_not_differentiable(dtype):
    counted = gt.lift(Counted, contract=gt.Surrogate())
    x = torch.randn(3, 2, dtype=dtype)
    assert_close(torch.func.vmap(counted)(x), (x * x, 2 * x))


def test_what_is_not_differentiable_and_any_attribute_under_compile():
    counted = gt.lift(Counted, contract=gt.Surrogate())

    def loss(x):
        out, size = counted(x)
        return (out * size).sum()

    def compiled(function):
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    x = torch.tensor([0.5, 2.0], requires_grad=True)
    expected = (20 * x * 2 * x).detach()
    assert_close(compiled(torch.func.grad(loss))(x.detach()), expected)
    assert_close(torch.autograd.grad(compiled(loss)(x), x)[0], expected)


def test_an_output_that_is_no_tensor_is_refused_in_a_compiled_transform():
    rule = gt.custom_vjp(lambda x: (x * x, None))
    rule.defvjp(lambda x: ((x * x, None), x), lambda x, g: (2 * x * g[0],))
    step = torch.func.grad(lambda x: rule(x)[0].sum())
    assert_close(step(torch.ones(2)), 2 * torch.ones(2))
    with pytest.raises(gt.TransformError, match="returns tensors, numbers and texts"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(torch.ones(2))


class Times(torch.autograd.Function):
    """A matrix, which may be sparse, times another one; only the latter counts."""

    @staticmethod
    def forward(ctx, matrix, x):
        ctx.save_for_backward(matrix)
        return matrix @ x

    @staticmethod
    def backward(ctx, g):
        (matrix,) = ctx.saved_tensors
        return None, matrix.mT @ g


@pytest.mark.filterwarnings("ignore:gradtools did not check")
def test_a_sparse_argument_stands_still_in_forward_mode():
    matrix, x, tangent = torch.randn(3, 2, 2)
    sparse, times = matrix.to_sparse(), gt.lift(Times)
    moved = torch.func.jvp(lambda x: times(sparse, x), (x,), (tangent,))
    assert_close(moved, (matrix @ x, matrix @ tangent))


class Kept:
    def __init__(self, tensor):
        self.tensor = tensor


class SquareWithJvp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.kept = Kept(2 * x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return g * ctx.kept.tensor

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * ctx.kept.tensor


def test_an_object_on_ctx_is_read_by_the_jvp_of_the_class():
    square, x = gt.lift(SquareWithJvp), torch.randn(3, 2)

    def moved(x):
        return torch.func.jvp(square, (x,), (torch.ones_like(x),))[1]

    assert_close(moved(x), 2 * x)
    assert_close(torch.func.vmap(moved)(x), 2 * x)
    assert_close(
        torch.func.vmap(torch.func.jacfwd(moved))(x), 2 * torch.eye(2).expand(3, 2, 2)
    )
