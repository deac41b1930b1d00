"""A kernel or a call that is wrong: what is said, and nothing is left half done."""

import ctypes
import functools

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import gradtools as gt

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def like(x, *rest):
    return torch.empty_like(x)


def broken(function, **options):
    """Return a kernel of this name."""

    @functools.wraps(function)
    def named(*args):
        return function(*args)

    named.__name__ = "broken"
    return gt.external(named, **{"out": like, **options})


def text(error):
    return str(error.value)


def ways(kernel):
    """Call a kernel with and without a rule around, twice each: results, or errors."""
    x = X.clone()

    def with_gradient():
        return kernel(x.clone().requires_grad_())

    return [lambda: kernel(x), with_gradient, lambda: torch.func.vmap(kernel)(x[None])]


RETURNS = {
    "shape": (lambda x: x[:2].clone(), "a tensor of shape (3,)", "of shape (2,)"),
    "dtype": (lambda x: x.float(), "float64", "float32"),
    "a number": (lambda x: 1.0, "a tensor of shape (3,)", "a value of type float"),
    "nothing": (lambda x: None, "a tensor of shape (3,)", "None"),
    "a tuple": (lambda x: (x + 1,), "a tensor of shape (3,)", "a tuple of 1"),
    "meta": (lambda x: x.to("meta"), "cpu", "meta"),
}


@pytest.mark.parametrize("name", RETURNS)
def test_another_output_than_out_says(name):
    function, expected, got = RETURNS[name]
    kernel = broken(function)
    kernel.def_bwd(lambda residuals, g: g)
    for way in ways(kernel):
        for _ in range(2):  # what was wrong is wrong again
            with pytest.raises(gt.ForwardContractError) as error:
                way()
            assert "broken: the kernel returned something else than out= says" in text(
                error
            )
            assert f"{__file__}" in text(error)
            (violation,) = error.value.violations
            assert expected in violation.expected
            assert got in violation.got
            assert error.value.fix == "Correct the kernel, or what out= returns."


def test_a_kernel_that_goes_wrong_later_is_caught_then():
    factor = [torch.ones(3)]
    kernel = broken(lambda x: x * factor[0])
    for _ in range(4):
        kernel(X)
    factor[0] = torch.ones(2, 3)
    with pytest.raises(gt.ForwardContractError, match="something else than out= says"):
        kernel(X)
    factor[0] = torch.ones(3)
    assert_close(kernel(X), X)


def test_all_wrong_outputs_are_named_at_once():
    kernel = broken(
        lambda x: {"a": x[:1] + 0, "b": x.float(), "c": x + 1},
        out=lambda x: {"a": x, "b": x, "c": x},
    )
    with pytest.raises(gt.ForwardContractError) as error:
        kernel(X)
    assert [v.where for v in error.value.violations] == ["return['a']", "return['b']"]


def test_another_structure():
    kernel = broken(lambda x: [x + 1], out=lambda x: (x, x))
    with pytest.raises(gt.ForwardContractError) as error:
        kernel(X)
    (violation,) = error.value.violations
    assert violation.expected.startswith("a tuple of 2")
    assert violation.got.startswith("a list of 1")


@pytest.mark.parametrize("dtype", ["<U3", object, ">f8"])
def test_arrays_that_are_no_tensors(dtype):
    kernel = broken(lambda x: np.zeros(3, dtype), numpy=True)
    with pytest.raises(gt.ForwardContractError, match="a value of type ndarray"):
        kernel(X)


ALIASES = {
    "the argument": lambda x: x,
    "a view": lambda x: x.view(3),
    "detached": lambda x: x.detach(),
    "reversed": lambda x: x.as_strided((3,), (0,)),
}


@pytest.mark.parametrize("name", ALIASES)
def test_an_output_in_the_memory_of_the_argument(name):
    kernel = broken(ALIASES[name])
    for way in ways(kernel)[::2]:
        with pytest.raises(gt.ForwardContractError) as error:
            way()
        assert "broken: the kernel returned memory of an argument" in text(error)
        assert ".clone(), .copy()" in error.value.fix


@pytest.mark.parametrize(
    "view", [lambda x: x, lambda x: x[:], lambda x: x[::-1], lambda x: x.reshape(3)]
)
def test_an_array_in_the_memory_of_the_argument(view):
    with pytest.raises(gt.ForwardContractError, match="memory of an argument"):
        broken(view, numpy=True)(X)


def test_one_memory_for_two_outputs():
    def twice(x):
        out = x + 1
        return out, out

    with pytest.raises(gt.ForwardContractError, match="the same memory twice"):
        broken(twice, out=lambda x: (x, x))(X)


def into_a_tensor():
    buffer = torch.empty(3, dtype=torch.float64)
    return broken(lambda x: torch.exp(x, out=buffer))


def into_an_array():
    buffer = np.empty(3)
    return broken(lambda x: np.exp(x, out=buffer), numpy=True)


REUSED = "broken: the kernel returned memory that it has returned before"


@pytest.mark.parametrize("make", [into_a_tensor, into_an_array])
@pytest.mark.parametrize("policy", ["first", "off"])
def test_an_output_that_the_next_call_overwrites(make, policy):
    """Both results, or what bwd keeps of the first, would be those of the second."""
    with gt.gradcheck_policy(policy):
        kernel = make()
        first = kernel(X)
        with pytest.raises(gt.ForwardContractError, match=REUSED) as error:
            kernel(2 * X)
        assert "(.clone(), .copy())" in error.value.fix
        del first
        with pytest.raises(gt.ForwardContractError, match=REUSED):
            torch.func.vmap(make())(torch.stack([X, 2 * X]))
        kernel = make()
        kernel.def_bwd(lambda residuals, g: (g * residuals[1],))
        with pytest.raises(gt.ForwardContractError, match=REUSED):
            [kernel(x.requires_grad_()).sum() for x in (X.clone(), 2 * X)]


def test_an_output_that_comes_to_be_reused_later():
    buffers = [torch.empty(3, dtype=torch.float64) for _ in range(4)]
    kernel = broken(lambda x: torch.exp(x, out=buffers.pop()))
    buffers[:0] = [buffers[0]]
    kept = [kernel(X) for _ in range(4)]
    with pytest.raises(gt.ForwardContractError, match=REUSED):
        kernel(X)
    assert_close(kept[0], X.exp())


def test_memory_that_nobody_uses_any_more_may_come_again():
    buffer = np.empty(3)
    array = broken(lambda x: np.exp(x, out=buffer), numpy=True)
    tensor = broken(torch.exp)  # torch hands out the same place again
    for kernel in (array, tensor):
        for factor in (1.0, 2.0, 3.0, 4.0):
            assert_close(kernel(factor * X), (factor * X).exp())


def test_differences_of_a_kernel_that_overwrites_its_output():
    buffer = np.empty(3)
    with gt.gradcheck_policy("off"):
        kernel = broken(
            lambda x: np.exp(x, out=buffer), numpy=True, gradient="finite-differences"
        )
        with pytest.raises(gt.ForwardContractError, match=REUSED):
            kernel(X.clone().requires_grad_()).sum().backward()


def test_an_alias_that_comes_later_is_caught_then():
    returned = [lambda x: x + 1]
    kernel = broken(lambda x: returned[0](x))  # noqa: PLW0108 (anew)
    for _ in range(3):
        kernel(X)
    returned[0] = lambda x: x
    with pytest.raises(gt.ForwardContractError, match="memory of an argument"):
        kernel(X)


def edits_by_torch(x):
    out = x + 1
    x.mul_(2)
    return out


def edits_behind_torch(x):
    pointer = ctypes.cast(x.data_ptr(), ctypes.POINTER(ctypes.c_double))
    out = x + 1
    pointer[1] = 7.0
    return out


@pytest.mark.parametrize("function", [edits_by_torch, edits_behind_torch])
@pytest.mark.parametrize("policy", ["first", "always"])
def test_edits_are_found_and_undone_on_the_first_call(function, policy):
    kernel = broken(function)
    x, version = X.clone(), 0
    with gt.gradcheck_policy(policy), pytest.raises(gt.ForwardContractError) as error:
        kernel(x)
    assert "broken: the kernel edits its arguments in place" in text(error)
    assert "their values were put back" in text(error)
    assert error.value.violations[0].where == "args.x"
    assert torch.equal(x, X)
    assert x._version == version


def test_edits_that_torch_knows_of_are_found_on_every_call():
    function = [lambda x: x + 1]
    kernel = broken(lambda x: function[0](x))  # noqa: PLW0108 (anew)
    for _ in range(3):
        kernel(X.clone())
    function[0] = edits_by_torch
    with pytest.raises(gt.ForwardContractError, match="their old values are gone"):
        kernel(X.clone())
    with (
        gt.gradcheck_policy("off"),
        pytest.raises(gt.ForwardContractError, match="edits its arguments in place"),
    ):
        kernel(X.clone())


def test_edits_behind_torch_are_found_on_every_call_under_always():
    function = [lambda x: x + 1]
    kernel = broken(lambda x: function[0](x))  # noqa: PLW0108 (anew)
    for _ in range(3):
        kernel(X.clone())
    function[0] = edits_behind_torch
    kernel(X.clone())  # as documented: this costs a copy, and is not looked for
    with (
        gt.gradcheck_policy("always"),
        pytest.raises(gt.ForwardContractError, match="edits its arguments in place"),
    ):
        kernel(X.clone())


def test_writing_to_an_array_is_numpys_own_error_with_a_name():
    def writes(x):
        x[0] = 1
        return x

    x = X.clone()
    with pytest.raises(ValueError, match="read-only") as error:
        broken(writes, numpy=True)(x)
    assert "raised by the kernel broken" in error.value.__notes__[0]
    assert torch.equal(x, X)


def root(x):
    return torch.where(x < 0, torch.nan, x.abs().sqrt())


def test_nan_for_finite_arguments():
    kernel = broken(root)
    with pytest.raises(gt.ForwardContractError) as error:
        kernel(X)
    assert (
        "broken: the kernel returned NaN for finite arguments, in 1 of 3 numbers"
        in text(error)
    )
    assert "allow_nan=True" in error.value.fix
    with pytest.raises(gt.ForwardContractError, match="NaN"):
        kernel(X)  # it was not let through once
    kernel(X.abs())
    assert kernel(X).isnan().any()  # as documented: looked for once
    with (
        gt.gradcheck_policy("always"),
        pytest.raises(gt.ForwardContractError, match="NaN"),
    ):
        kernel(X)


def test_nan_that_is_no_mistake():
    assert broken(root, allow_nan=True)(X).isnan().sum() == 1
    assert broken(root)(X.where(X > 0, torch.nan)).isnan().sum() == 1
    with gt.gradcheck_policy("off"):
        assert broken(root)(X).isnan().sum() == 1
    assert broken(lambda x: 1 / (x - x))(X).isinf().all()  # inf is an overflow


class Boom(RuntimeError):
    pass


def test_what_the_kernel_raises_goes_on_with_a_name():
    calls = []

    def raises(x):
        calls.append(x)
        if len(calls) > 3:
            raise Boom("out of fuel") from KeyError("fuel")
        return x + 1

    kernel = broken(raises)
    kernel.def_bwd(lambda residuals, g: g)
    for _ in range(3):
        kernel(X)
    for way in ways(kernel):
        with gt.gradcheck_policy("off"), pytest.raises(Boom, match="fuel") as error:
            way()
        assert any("raised by the kernel broken" in n for n in error.value.__notes__)
        assert isinstance(error.value.__cause__, KeyError)


def test_what_out_raises_goes_on_with_a_name():
    def out(x):
        raise Boom("no shape")

    with pytest.raises(Boom) as error:
        broken(lambda x: x + 1, out=out)(X)
    assert error.value.__notes__[0].startswith("raised by out= (")
    assert "of broken (" in error.value.__notes__[0]


@pytest.mark.parametrize("out", [lambda x: None, lambda x: (x, 3), lambda x: ()])
def test_out_must_return_tensors(out):
    with pytest.raises(gt.DefinitionError, match="broken: out= must return tensors"):
        broken(lambda x: x + 1, out=out)(X)


def test_a_call_without_a_tensor():
    with pytest.raises(gt.DefinitionError, match="broken: an external takes at least"):
        broken(lambda x: x + 1)(3.0)


def test_dtypes_that_are_not_taken():
    kernel = broken(lambda x, i: x + 1, dtypes=(torch.float32, torch.bfloat16))
    kernel(X.float(), torch.arange(2))  # integers are no floating dtype
    with pytest.raises(gt.DefinitionError) as error:
        kernel(X, X.float())
    assert "broken: the kernel does not take this dtype" in text(error)
    (violation,) = error.value.violations
    assert violation.where == "args.x"
    assert violation.expected == "float32 or bfloat16"
    assert "float64" in violation.got


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr", "nested"])
def test_a_layout_that_has_no_row_of_numbers(layout):
    kernel = broken(lambda x, y: x + 1)
    if layout != "nested":  # it has no shape either
        kernel(X.diag(), X)
    sparse = {
        "sparse_coo": lambda: X.diag().to_sparse(),
        "sparse_csr": lambda: X.diag().to_sparse_csr(),
        "nested": lambda: torch._nested_tensor_from_tensor_list([X, X[:2]]),
    }[layout]()
    with pytest.raises(gt.DefinitionError) as error:
        kernel(sparse, X)
    assert "broken: a kernel takes tensors whose numbers stand in a row" in text(error)
    (violation,) = error.value.violations
    assert violation == gt.errors.Violation("args.x", "strided", layout)
    assert "x.to_dense()" in error.value.fix


def test_an_output_of_another_layout():
    with pytest.raises(gt.ForwardContractError) as error:
        broken(lambda x: x.to_sparse())(X)
    assert error.value.violations[0].got.endswith("float64, cpu, sparse_coo")
    with pytest.raises(gt.DefinitionError, match="broken: out= must return tensors"):
        broken(lambda x: x.clone(), out=lambda x: x.to_sparse())(X)


def test_arrays_of_a_dtype_that_numpy_has_not():
    with pytest.raises(gt.DefinitionError, match="numpy has no bfloat16"):
        broken(lambda x: x, numpy=True)(X.bfloat16())


def test_a_captured_tensor_that_needs_a_gradient():
    weight = torch.ones(3, requires_grad=True)
    kernel = broken(lambda x: x * weight)
    with pytest.raises(gt.CapturedTensorError, match="uses a tensor that needs a grad"):
        kernel(X)
    constant = weight.detach()
    assert_close(broken(lambda x: x * constant)(X), X)


def test_a_gradient_of_a_kernel_without_a_rule():
    kernel = broken(lambda x: x + 1)
    message = "broken: a derivative is wanted, and the rule states none"
    with pytest.raises(gt.DefinitionError, match=message):
        kernel(X.clone().requires_grad_())
    with pytest.raises(gt.DefinitionError, match=message):
        torch.func.grad(lambda x: kernel(x).sum())(X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": 3}, "the option out=3 is no function"),
        ({"vmap": "auto"}, "the option vmap='auto' is none of 'sequential', 'expand"),
        ({"numpy": 1}, "the option numpy=1 is no bool"),
        ({"dtypes": "float32"}, "the option dtypes='float32' is no floating dtype"),
        ({"dtypes": torch.int64}, "the option dtypes=torch.int64 is no floating"),
        ({"allow_nan": None}, "the option allow_nan=None is no bool"),
        ({"gradient": "differences"}, "the option gradient='differences' is no func"),
        ({"contract": 3}, "the option contract=3 is no contract"),
        ({"once_differentiable": 2}, "the option once_differentiable=2 is no bool"),
        ({"probe": 2}, "the option probe=2 is no function"),
    ],
)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(gt.DefinitionError) as error:
        gt.external(lambda x: x, **{"out": like, **options})
    assert message in text(error)


def test_gradient_and_nondiff_do_not_go_together():
    with pytest.raises(gt.DefinitionError, match="gradient= takes all arguments"):
        broken(lambda x, n: x, gradient=lambda g, x, n: g, nondiff_argnums=1)
