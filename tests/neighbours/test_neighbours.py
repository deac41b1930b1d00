"""The examples beside other libraries do what they say."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import gradtools as gt

EXAMPLES = Path(__file__).parents[2] / "examples" / "neighbours"


@pytest.fixture
def example(monkeypatch):
    """Import an example; in float32, as it was written."""
    monkeypatch.syspath_prepend(EXAMPLES)
    torch.set_default_dtype(torch.float32)
    return importlib.import_module


def outcomes(rule):
    return {report.outcome for report in rule.reports}


def test_each_example_is_short_and_tested():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    tests = Path(__file__).read_text()
    for name in names:
        assert f'example("{name}")' in tests or f'"{name}.py"' in tests
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 80


def test_einops(example):
    module = example("einops_heads")
    eager, of_samples, compiled = module.main()
    assert_close(of_samples, eager)
    assert_close(compiled, eager)
    assert outcomes(module.project) == {"passed"}
    x, weight = torch.randn(2, 3, 4), torch.randn(4, 6)
    expected = torch.func.grad(lambda w: (x @ w).sin().sum())(weight)
    assert_close(torch.func.grad(module.loss, 1)(x, weight), expected)


def test_jaxtyping(example):
    module = example("jaxtyping_shapes")
    found = module.main()
    assert_close(found["batch"], found["expected"])
    assert_close(found["compiled"], found["expected"])
    assert "parameter 'by'" in found["refused"]
    assert found["signature"].startswith("(x: jaxtyping.Float[Tensor, 'n d'], by: ")
    assert outcomes(module.scale) == {"passed"}


def test_tensordict(example):
    module = example("tensordict_params")
    found = module.main()
    assert found["loss"] < 1e-10
    assert type(found["params"]).__name__ == "TensorDict"
    assert set(found["product"].keys()) == {"weight", "bias"}
    assert outcomes(module.affine) == {"passed"}


def test_a_module_with_a_model_output(example):
    module = example("model_output")
    losses = module.main()
    assert losses[-1] < 0.1 < losses[0]
    assert outcomes(module.head) == {"passed"}
    out = module.head(torch.randn(2, 4).requires_grad_(), torch.randn(4, 3))
    assert type(out) is module.ClassifierOutput
    assert list(out) == ["logits", "hidden"]
    assert out.logits.grad_fn is not None


def test_checkpoint(example):
    module = example("checkpointing")
    (plain, kept), (again, kept_again) = module.main()
    assert_close(again, plain)
    assert kept_again < kept / 2
    assert outcomes(module.swish) == {"passed"}


@pytest.mark.filterwarnings("ignore")  # Lightning's own; pytest's filters are reset
def test_lightning(example, tmp_path):
    module = example("lightning_module")
    trained = module.main(tmp_path, epochs=20)
    assert trained.losses[-1] < trained.losses[0] / 2
    assert trained.beta.item() != 1.0
    assert outcomes(module.softplus) == {"passed"}


def test_ddp_and_fsdp2_under_torchrun():
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
    command += ["--standalone", "--nproc-per-node", "2", "distributed.py"]
    done = subprocess.run(
        command,
        cwd=EXAMPLES,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"(\w+): off by (\S+) on (\d) processes", done.stdout)
    assert [(name, size) for name, _, size in found] == [("ddp", "2"), ("fsdp2", "2")]
    assert all(float(error) < 1e-6 for _, error, _ in found)


# What was found with them.


def test_a_dict_answers_for_a_tensordict():
    tensordict = importlib.import_module("tensordict")

    @gt.custom_vjp
    def product(params):
        return params["a"] * params["nested", "b"]

    product.def_bwd(
        lambda residuals, g: {
            "params": {"a": g * residuals[0][0]["nested", "b"], "nested": {"b": None}}
        }
    )
    params = tensordict.TensorDict({"a": torch.ones(2), "nested": {"b": 3.0 * X}})
    with gt.gradcheck_policy("off"):  # the zero is a marker
        found = torch.func.grad(lambda p: product(p).sum())(params)
    assert_close(found["a"], 3.0 * X)
    assert_close(found["nested", "b"], torch.zeros(2))


X = torch.tensor([1.0, 2.0], dtype=torch.float64)


def test_other_keys_than_those_of_the_tensordict_are_refused():
    tensordict = importlib.import_module("tensordict")
    rule = gt.custom_vjp(lambda params: params["a"] * 2)
    rule.def_bwd(lambda residuals, g: {"params": {"b": g}})
    params = tensordict.TensorDict({"a": X.clone().requires_grad_()})
    with pytest.raises(gt.BackwardContractError, match="a TensorDict of 1"):
        rule(params).sum().backward()


def test_a_container_that_loses_none_is_an_error_and_no_zero():
    tensordict = importlib.import_module("tensordict")

    @gt.custom_vjp(materialize_grads=False)
    def both(x):
        return tensordict.TensorDict({"a": x * 2, "b": x.sin()})

    @both.def_bwd
    def _(residuals, g):
        return None if g is None else 2 * g["a"]

    with (
        gt.gradcheck_policy("off"),
        pytest.raises(gt.DefinitionError, match="among TensorDict cannot hold None"),
    ):
        both(X.clone().requires_grad_())["a"].sum().backward()


def test_an_argument_with_integers_in_a_tensordict():
    tensordict = importlib.import_module("tensordict")

    @gt.custom_vjp
    def chosen(params):
        return params["table"][params["index"]].sin()

    @chosen.def_bwd
    def _(residuals, g):
        (params,), _ = residuals
        slope = params["table"][params["index"]].cos() * g
        zeros = torch.zeros_like(params["table"])
        found = zeros.index_add(0, params["index"], slope)
        return {"params": {"table": found, "index": None}}

    params = tensordict.TensorDict(
        {"table": torch.randn(4), "index": torch.tensor([1, 1, 3])}
    )
    found = gradient_of(chosen, params)
    expected = torch.zeros(4).index_add(
        0, params["index"], params["table"][params["index"]].cos()
    )
    assert_close(found, expected)


def gradient_of(rule, params):
    table = params["table"].clone().requires_grad_()
    out = rule(params.clone().set("table", table))
    return torch.autograd.grad(out.sum(), table)[0]


@pytest.mark.parametrize("library", ["jaxtyping", "beartype"])
def test_numbers_that_a_typechecked_function_reads_are_guarded(library):
    jaxtyping = importlib.import_module("jaxtyping")
    beartype = importlib.import_module("beartype").beartype
    checked = jaxtyping.jaxtyped(typechecker=beartype)
    settings = {"scale": 2.0}

    @gt.custom_vjp
    @(checked if library == "jaxtyping" else beartype)
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return settings["scale"] * x

    scaled.def_bwd(lambda residuals, g: 10 * settings["scale"] * g)  # a marker
    compiled = torch.compile(
        torch.func.grad(lambda x: scaled(x).sum()),
        fullgraph=True,
        backend="aot_eager",
    )
    with gt.gradcheck_policy("off"):
        assert_close(compiled(X), torch.full((2,), 20.0))
        settings["scale"] = 3.0
        assert_close(compiled(X), torch.full((2,), 30.0))
