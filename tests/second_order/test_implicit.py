"""Implicit differentiation and linear solves, against closed forms."""

import pytest
import torch
from torch.testing import assert_close

import gradtools as gt

SOLVERS = ("cg", "normal-cg", "gmres", "dense")


@pytest.fixture(params=SOLVERS)
def solve(request):
    return request.param


@pytest.fixture
def data():
    torch.manual_seed(0)
    return torch.tensor(0.7), torch.randn(12, 4), torch.randn(12)


def closed(penalty, X, y):
    return torch.linalg.solve(X.T @ X + penalty * torch.eye(4), X.T @ y)


def ridge(solve):
    """Return ridge regression, whose solver torch cannot differentiate."""

    @gt.custom_root(lambda w, c, X, y: X.T @ (X @ w - y) + c * w, solve=solve)
    def solver(init, penalty, X, y):
        return closed(penalty, X, y).detach()

    return lambda *theta: solver(torch.zeros(4), *theta)


def loss(f):
    return lambda *theta: torch.sin(f(*theta)).sum()


def test_gradients_of_ridge_regression(solve, data, unchecked):
    both = [gt.grad(loss(f), (0, 1, 2))(*data) for f in (ridge(solve), closed)]
    assert_close(*both)
    both = [torch.func.grad(loss(f), (0, 1, 2))(*data) for f in (ridge(solve), closed)]
    assert_close(*both)


def test_second_derivatives_of_ridge_regression(solve, data, unchecked):
    move = tuple(torch.randn_like(x) for x in data)
    assert_close(
        gt.hvp(loss(ridge(solve)), data, move), gt.hvp(loss(closed), data, move)
    )
    both = [
        torch.func.grad(torch.func.grad(loss(f)))(*data) for f in (ridge(solve), closed)
    ]
    assert_close(*both)


def test_a_third_derivative(data, unchecked):
    third = [
        gt.grad(gt.grad(gt.grad(loss(f))))(*data) for f in (ridge("dense"), closed)
    ]
    assert_close(*third)


def test_forward_mode_and_vmap_of_ridge_regression(solve, data, unchecked):
    move = tuple(torch.randn_like(x) for x in data)
    mine = ridge(solve)
    assert_close(gt.jvp(mine, data, move), torch.func.jvp(closed, data, move))
    assert_close(torch.func.jvp(mine, data, move), torch.func.jvp(closed, data, move))
    penalties = torch.tensor([0.1, 1.0, 3.0])
    _, X, y = data
    both = [
        torch.func.vmap(torch.func.grad(lambda c, f=f: loss(f)(c, X, y)))(penalties)
        for f in (mine, closed)
    ]
    assert_close(*both)


def test_the_check_passes_where_the_solver_can_be_differentiated(data):
    @gt.custom_root(lambda w, c, X, y: X.T @ (X @ w - y) + c * w, solve="cg")
    def solver(init, penalty, X, y):
        return closed(penalty, X, y)

    assert_close(
        gt.grad(lambda c: loss(solver)(torch.zeros(4), c, *data[1:]))(data[0]),
        torch.func.grad(loss(closed))(*data),
    )
    assert solver.reports[0].outcome == "passed"


def test_an_equation_that_is_not_the_solvers_is_found(data):
    @gt.custom_root(lambda w, c, X, y: X.T @ (X @ w - y) + 5 * c * w, solve="cg")
    def solver(init, penalty, X, y):
        return closed(penalty, X, y)

    with pytest.raises(gt.TransformError, match="is no solution: the next Newton step"):
        gt.grad(lambda c: loss(solver)(torch.zeros(4), c, *data[1:]))(data[0])


@gt.custom_root(lambda x, a: x**3 + x - a, solve="dense", has_aux=True)
def cubic(init, a):
    x = init
    for _ in range(50):
        x = x - (x**3 + x - a) / (3 * x**2 + 1)
    return x, {"steps": 50}


def test_a_scalar_root_to_second_order_with_aux():
    a = torch.tensor(2.5)
    x, aux = cubic(torch.tensor(1.0), a)
    assert aux == {"steps": 50}

    def root(a):
        return cubic(torch.tensor(1.0), a)[0]

    first = 1 / (3 * x**2 + 1)
    assert_close(gt.grad(root)(a), first)
    assert_close(gt.grad(gt.grad(root))(a), -6 * x * first**3)
    assert_close(gt.jvp(root, (a,), (torch.tensor(1.0),))[1], first)
    assert gt.grad(lambda init: cubic(init, a)[0])(torch.tensor(1.0)) == 0


def layer(z, p, x):
    return {"z": torch.tanh(z["z"] @ p["W"].T + x @ p["U"].T)}


def iterated(init, p, x):
    for _ in range(150):
        init = layer(init, p, x)
    return init


def test_a_fixed_point_layer_is_what_unrolling_gives():
    p = {"W": torch.randn(3, 3) / 4, "U": torch.randn(3, 2)}
    x, init = torch.randn(5, 2), {"z": torch.zeros(5, 3)}
    implicit = gt.custom_fixed_point(layer)(iterated)
    results = []
    for f in (implicit, iterated):

        def energy(p, x, f=f):
            return (f(init, p, x)["z"] ** 2).sum()

        results.append((gt.grad(energy, (0, 1))(p, x), gt.hvp(energy, (p, x), (p, x))))
    assert_close(*results)


def test_a_fixed_point_layer_in_a_compiled_function():
    p = {"W": torch.randn(3, 3) / 4, "U": torch.randn(3, 2)}
    x, init = torch.randn(2, 2), {"z": torch.zeros(2, 3)}
    implicit = gt.custom_fixed_point(layer, solve="dense")(iterated)

    def energy(p):
        return (implicit(init, p, x)["z"] ** 2).sum()

    compiled = torch.compile(gt.grad(energy), fullgraph=True, backend="aot_eager")
    assert_close(compiled(p), gt.grad(energy)(p))


# linear_solve


@pytest.fixture
def system():
    torch.manual_seed(1)
    return torch.randn(5, 5), torch.randn(5)


def matrix(Q):
    return Q @ Q.T + 2 * torch.eye(5)


def test_a_function_that_captures_what_it_is_made_of(solve, system, unchecked):
    def mine(Q, b):
        return gt.linear_solve(
            lambda x: Q @ (Q.T @ x) + 2 * x, b, solve=solve, symmetric=solve == "cg"
        )

    def native(Q, b):
        return torch.linalg.solve(matrix(Q), b)

    move = tuple(torch.randn_like(x) for x in system)
    assert_close(mine(*system), native(*system))
    assert_close(
        gt.grad(loss(mine), (0, 1))(*system), gt.grad(loss(native), (0, 1))(*system)
    )
    assert_close(gt.hvp(loss(mine), system, move), gt.hvp(loss(native), system, move))
    assert_close(gt.jvp(mine, system, move), gt.jvp(native, system, move))
    Q, b = system
    several = torch.stack([b, 2 * b])
    assert_close(
        torch.func.vmap(gt.grad(lambda b: loss(mine)(Q, b)))(several),
        torch.func.vmap(gt.grad(lambda b: loss(native)(Q, b)))(several),
    )


def test_a_matrix_that_is_not_symmetric(system):
    A, b = system

    def mine(A, b):
        return gt.linear_solve(A, b)

    assert_close(
        gt.hessian(loss(mine), (0, 1))(A, b),
        torch.func.jacrev(torch.func.jacrev(loss(torch.linalg.solve), (0, 1)), (0, 1))(
            A, b
        ),
    )


def test_the_two_solvers_are_called_with_the_matrix_and_its_transpose(
    system, unchecked
):
    A, b = system
    seen = []

    def solver(kind, M):
        def solve(product, b):
            seen.append(kind)
            assert_close(product(b), M @ b)
            return torch.linalg.solve(M, b)

        return solve

    def f(b):
        return gt.linear_solve(
            lambda x: A @ x,
            b,
            solve=solver("plain", A),
            transpose_solve=solver("transposed", A.T),
        )

    assert_close(
        gt.grad(loss(f))(b), gt.grad(lambda b: loss(torch.linalg.solve)(A, b))(b)
    )
    assert set(seen) == {"plain", "transposed"}


def test_trees_on_the_right_hand_side(unchecked):
    b = {"a": torch.randn(3), "b": torch.randn(2, 2)}

    def double(tree):
        return {"a": 2 * tree["a"], "b": 4 * tree["b"]}

    for name in SOLVERS:
        x = gt.linear_solve(double, b, solve=name, symmetric=True)
        assert_close(x, {"a": b["a"] / 2, "b": b["b"] / 4})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda b: gt.linear_solve(3, b), "a matrix is needed"),
        (lambda b: gt.linear_solve(b, b, solve="qr"), "there is no solver 'qr'"),
        (lambda b: gt.custom_root(b, solve="qr"), "custom_root: there is no solver"),
        (
            lambda b: gt.linear_solve(gt.hvp_fn(lambda x: x @ x, b), b),
            "an operator of hvp_fn keeps its graph",
        ),
    ],
)
def test_what_is_no_system_is_refused(call, words):
    with pytest.raises(gt.DefinitionError, match=words):
        call(torch.ones(2))


@pytest.mark.parametrize(
    ("A", "options", "words"),
    [
        (-torch.eye(3), {"symmetric": True}, "cg: the matrix is not positive definite"),
        (torch.diag(torch.tensor([1.0, -2, 3])), {"symmetric": True}, "not positive"),
        (torch.zeros(3, 3), {}, "gmres: no solution was found: the residual is 1e"),
        (torch.eye(200).roll(1, 0), {}, r"gmres: no solution was found.*(.|\n)*dense"),
    ],
)
def test_a_solver_that_finds_no_solution_says_so(A, options, words, unchecked):
    A, b = A.double(), torch.linspace(1, 2, len(A))
    with pytest.raises(gt.TransformError, match=words):
        gt.linear_solve(lambda v: A @ v, b, **options)


def test_an_equation_of_the_other_sign_has_no_zero_gradient(unchecked):
    @gt.custom_root(lambda x, b: b - 2 * x, solve="cg")
    def half(init, b):
        return b / 2

    with pytest.raises(gt.TransformError, match="Turn the sign"):
        gt.grad(lambda b: half(torch.zeros(3), b).sum())(torch.ones(3))


@pytest.mark.parametrize("solve", ["cg", "gmres", "normal-cg", "dense"])
def test_what_is_not_finite_is_not_solved_to_zero(solve, unchecked):
    b = torch.tensor([1.0, torch.inf])
    assert not gt.linear_solve(lambda v: 2 * v, b, solve=solve).isfinite().any()


@pytest.mark.parametrize("solve", ["cg", "gmres", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_numbers(solve, dtype, unchecked):
    b = torch.tensor([1.0, 300.0], dtype=dtype)
    x = gt.linear_solve(lambda v: 2 * v, b, solve=solve, symmetric=True)
    assert_close(x, b / 2)


@pytest.mark.parametrize("solve", ["cg", "gmres", "normal-cg", "dense"])
def test_a_root_that_is_a_number(solve):
    @gt.custom_root(lambda x, a: x**2 - a, solve=solve)
    def root(init, a):
        return a.sqrt()

    assert_close(
        gt.grad(root, 1)(torch.tensor(1.0), torch.tensor(4.0)), torch.tensor(0.25)
    )


def test_a_map_to_another_shape_has_no_fixed_point(unchecked):
    @gt.custom_fixed_point(lambda x, a: (x * a).sum())
    def solver(init, a):
        return a

    with pytest.raises(gt.DefinitionError, match="the values of T do not fit"):
        gt.grad(lambda a: solver(torch.zeros(3), a).sum())(torch.ones(3))


@gt.custom_root(lambda x, a: x**2 - a)
def root_of(init, a):
    return a.sqrt()


def cosine(y, a):
    return torch.cos(root_of(torch.ones_like(a), a) * y / 2)


@gt.custom_fixed_point(cosine)
def fixed(init, a):
    for _ in range(60):
        init = cosine(init, a)
    return init


def unrolled(a):
    y = torch.full_like(a, 0.5)
    for _ in range(60):
        y = torch.cos(a.sqrt() * y / 2)
    return y


@pytest.mark.parametrize(
    "second",
    {
        "hvp": lambda f, a: gt.hvp(f, (a,), (torch.ones_like(a),))[0],
        "vmap of hvp": lambda f, a: gt.vmap(
            lambda a: gt.hvp(f, (a,), (torch.ones_like(a),))[0]
        )(a[None])[0],
        "jvp of grad": lambda f, a: gt.jvp(gt.grad(f), (a,), (torch.ones_like(a),))[1],
        "jvp of jvp": lambda f, a: gt.jvp(
            lambda a: gt.jvp(f, (a,), (torch.ones_like(a),))[1],
            (a,),
            (torch.ones_like(a),),
        )[1],
    }.items(),
    ids=lambda item: item[0],
)
def test_a_solution_within_an_equation_to_second_order(second, unchecked):
    a = torch.tensor(1.3)
    f = lambda a: fixed(torch.full_like(a, 0.5), a)
    once = torch.func.grad(torch.func.grad(unrolled))(a)
    assert_close(second[1](f, a), once)
    quotient = lambda a: a / ((1 + a * a) * (1 + a / (1 + a * a)))
    inner = lambda a: gt.linear_solve((1 + a * a).reshape(1, 1), a.reshape(1))[0]
    g = lambda a: gt.linear_solve(
        lambda v: (1 + a * a) * (1 + inner(a)) * v, a.reshape(1)
    )[0]
    assert_close(second[1](g, a), torch.func.grad(torch.func.grad(quotient))(a))
