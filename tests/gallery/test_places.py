"""Integer positions: gather, scatter and sort."""

import pytest
import torch

import gradtools as gt
from tests.gallery.stating import restated


def test_gather_and_scatter_are_each_others_derivative(gallery):
    names = gallery("gather_scatter")
    assert names["first"].abs().max() < 1e-6
    assert names["second"].abs().max() < 1e-6
    assert names["reads"].tolist() == [1, 0, 3, 0, 1]
    table = torch.randn(5, 3, dtype=torch.float64)
    rows = torch.tensor([[1, 1], [4, 0]])
    loss = lambda gather: (
        lambda t: torch.stack([gather(t, r) for r in rows]).sin().sum()
    )
    found, expected = (
        torch.func.hessian(loss(f))(table) for f in (names["gather"], lambda t, r: t[r])
    )
    torch.testing.assert_close(found, expected)


def test_rows_that_are_read_twice_and_overwrite_each_other_are_refused(gallery):
    def overwriting(residuals, g):
        (table, rows), _ = residuals
        return torch.zeros_like(table).index_copy(0, rows, g), None

    rule = restated(gallery("gather_scatter")["gather"], bwd=overwriting)
    with pytest.raises(gt.GradientMismatchError, match=r"args\.table is not the deriv"):
        rule(torch.randn(5, 3, requires_grad=True), torch.tensor([0, 2, 2, 4, 2]))


@pytest.fixture
def sorting(gallery):
    return gallery("sorting")


def test_sorted_values_have_the_gradients_of_torch(sorting):
    x, g = torch.randn(3, 7), torch.randn(3, 7)
    y = x.clone().requires_grad_()
    values, places = sorting["sort"](y)
    expected, of_torch = torch.func.vjp(lambda x: torch.sort(x)[0], x)
    torch.testing.assert_close(values.detach(), expected)
    assert torch.equal(x.gather(-1, places), values)
    assert not places.requires_grad
    torch.testing.assert_close(torch.autograd.grad(values, y, g), of_torch(g))


def test_the_trimmed_mean_does_not_follow_spoilt_targets(sorting):
    assert sorting["plain"] > 10 * sorting["clean"]
    assert sorting["robust"] < 1.2 * sorting["clean"]


def test_values_sent_back_to_the_wrong_places_are_refused(sorting):
    def bwd(residuals, g):
        _, (_, places) = residuals
        return g[0].gather(-1, places)  # the inverse, for the permutation

    with pytest.raises(gt.GradientMismatchError, match=r"args\.x is not the deriv"):
        restated(sorting["sort"], bwd=bwd)(torch.randn(7, requires_grad=True))


def test_a_cotangent_of_the_positions_does_not_exist(sorting):
    def bwd(residuals, g):
        return g[0] + g[1]

    with pytest.raises(TypeError, match="NoneType") as caught:
        restated(sorting["sort"], bwd=bwd)(torch.randn(7, requires_grad=True))
    assert any("raised in bwd" in note for note in caught.value.__notes__)
