"""The examples of second order run, in small forms, and show what they claim."""

import importlib
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.on_cpu
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    torch.set_default_dtype(torch.float32)  # as for whoever runs them
    return importlib.import_module


def test_newtons_method_finds_the_optimum_of_scikit_learn(example):
    found = example("newton_cg").main()
    assert found["gradient"] < 1e-8
    assert found["steps"] < 12
    assert found["loss"] == pytest.approx(found["loss of scikit-learn"], abs=1e-10)


def test_meta_learning_helps(example):
    found = example("maml").main(steps=20, judged=60)
    assert found["learned"] > found["random start"] + 0.03


def test_the_implicit_meta_gradient_is_that_of_the_unrolled_steps(example):
    found = example("implicit_maml").found
    assert found["cosine"] > 0.9999
    assert found["loss after, from a start that has learned"] < found["loss after"] / 3


def test_sharpness_comes_to_the_edge_of_stability(example, tmp_path):
    path = tmp_path / "sharpness.png"
    histories = example("sharpness").main(steps=400, every=100, rates=(1.0,), path=path)
    *_, (_, loss, first, second) = histories[1.0]
    assert loss < histories[1.0][0][1] / 5
    assert first == pytest.approx(2.0, rel=0.25)
    assert second < first
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_network_is_less_sure_far_from_its_data(example):
    found = example("laplace").main()
    assert found["spread far away"] > 1.5 * found["spread at the data"]
    assert 0.7 < found["typical error of the estimate, in its own"] < 1.4


def test_the_implicit_layer_learns_and_keeps_no_iterations(example):
    found = example("implicit_layer").main(epochs=8)
    assert found["gap"] < 1e-10
    assert found["accuracy"] > 0.85
    assert found["memory of 200 steps over 20, rule"] == 1
    assert found["memory of 200 steps over 20, unrolled"] > 2
