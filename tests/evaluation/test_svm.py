"""The squared-hinge solver against scikit-learn's LinearSVC."""

import warnings

import pytest
import torch
from sklearn.svm import LinearSVC

from odc.evaluation import svm, voc


def problem(n=150, width=40, labels=3, seed=0, scale=1.0):
    """Unit rows [n, width] with some structure, and targets [labels, n] of 1 / -1."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(n, width, generator=generator)
    scores = rows @ torch.randn(width, labels, generator=generator)
    scores += 0.3 * torch.randn(n, labels, generator=generator)
    targets = torch.where(scores > scores.quantile(0.8, dim=0), 1, -1).T
    return scale * rows / rows.norm(dim=1, keepdim=True), targets


def linear_svc(rows, targets, cost, **options):
    """scikit-learn's tightest solution -> (w and bias [D + 1], decision function)."""
    options = {"dual": True, "tol": 1e-9, "max_iter": 1_000_000, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, loss="squared_hinge",
                          intercept_scaling=1, **options)
        model.fit(rows.double().numpy(), targets.numpy())
    weight = torch.cat([torch.from_numpy(model.coef_[0]), torch.from_numpy(model.intercept_)])
    return weight, lambda x: torch.from_numpy(model.decision_function(x.double().numpy()))


def primal_objective(weight, rows, targets, cost):
    """The objective as LIBLINEAR states it; weight [D + 1], the bias last."""
    inputs = torch.cat([rows.double(), torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    hinge = (1 - targets * (inputs @ weight)).clamp(min=0)
    importance = torch.where(targets > 0, 2.0, 1.0) * (targets != 0)
    return 0.5 * weight @ weight + cost * (importance * hinge**2).sum()


def primal_weight(coefficients, rows):
    """w = sum_i b_i x_i, and the bias."""
    return torch.cat([rows.double().T @ coefficients, coefficients.sum()[None]])


def check_against_linear_svc(rows, targets, costs, **options):
    fits = svm.fit(svm.gram_matrix(rows), targets, costs)
    assert fits.converged.all()
    for s, cost in enumerate(costs):
        for p, t in enumerate(targets):
            used = t != 0
            weight, decide = linear_svc(rows[used], t[used], cost, **options)
            ours = primal_objective(primal_weight(fits.coefficients[s, p], rows), rows, t, cost)
            assert ours <= primal_objective(weight, rows, t, cost) * (1 + 1e-7)
            assert torch.allclose(fits.decisions[s, p], decide(rows), rtol=1e-4, atol=1e-5)


def test_every_cost_of_the_protocol():
    rows, targets = problem()
    check_against_linear_svc(rows, targets, voc.COSTS)


def test_rows_that_are_not_in_a_problem():
    rows, targets = problem()
    targets = targets.clone()
    targets[0, ::3] = 0
    targets[1, 1::3] = 0
    check_against_linear_svc(rows, targets, (100.0, 0.0625, 0.5**12))


def test_more_rows_than_features():
    """A singular Gram matrix, where a large cost makes the systems ill conditioned."""
    rows, targets = problem(n=400, width=5)
    check_against_linear_svc(rows, targets, (100.0, 1.0, 0.5**10), dual=False, tol=1e-12)


def test_rows_that_are_not_normalised():
    rows, targets = problem(n=100, width=20, scale=30.0)
    check_against_linear_svc(rows, targets, (100.0, 0.0625), dual=False, tol=1e-13)


def test_conjugate_gradients_and_factorisation_agree(monkeypatch):
    """The choice between the two is one of speed alone."""
    rows, targets = problem(n=600, width=700)
    gram = svm.gram_matrix(rows)
    chosen = svm.fit(gram, targets, voc.COSTS)
    calls = []
    for name in ("_factorise", "_conjugate_gradients"):
        original = getattr(svm._Solver, name)

        def counted(self, *arguments, name=name, original=original):
            calls.append(name)
            return original(self, *arguments)

        monkeypatch.setattr(svm._Solver, name, counted)
    svm.fit(gram, targets, voc.COSTS)
    assert set(calls) == {"_factorise", "_conjugate_gradients"}
    monkeypatch.setattr(svm, "CAREFUL_AFTER", 0)  # every step by factorisation, in float64
    calls.clear()
    exact = svm.fit(gram, targets, voc.COSTS)
    assert set(calls) == {"_factorise"}
    assert chosen.converged.all() and exact.converged.all()
    assert torch.allclose(chosen.decisions, exact.decisions, rtol=1e-6, atol=1e-7)
    assert torch.allclose(chosen.coefficients, exact.coefficients, rtol=1e-4, atol=1e-6)


def test_subsets_are_the_same_problems():
    rows, targets = problem(n=200, width=300, labels=4)
    generator = torch.Generator().manual_seed(1)
    targets = targets * (torch.rand(targets.shape, generator=generator) < 0.3)  # of few rows
    gram = svm.gram_matrix(rows)
    used, labels = svm.used_rows(targets)
    coefficients, converged = svm.fit_subsets(gram, svm.strongest_eigenvectors(gram), used, labels,
                                              voc.COSTS)
    assert converged.all()
    whole = svm.fit(gram, targets, voc.COSTS)
    for p in range(len(targets)):
        decisions = coefficients[p] @ gram[used[p]]
        assert torch.allclose(decisions, whole.decisions[:, p], rtol=1e-5, atol=1e-6)


def test_the_bound_of_the_error_holds():
    rows, targets = problem()
    gram = svm.gram_matrix(rows)
    fits = svm.fit(gram, targets, (1.0,))
    for p in range(len(targets)):
        b, f, t = fits.coefficients[0, p], fits.decisions[0, p], targets[p].double()
        assert torch.allclose(gram @ b, f, atol=1e-10)
        gradient = b - 2 * svm.row_weights(t) * t * (1 - t * f).clamp(min=0)
        bound = (gradient @ gram @ gradient).clamp(min=0).sqrt() / (b @ f).sqrt()
        assert bound <= svm.TOLERANCE
        assert float(fits.errors[0, p]) == pytest.approx(float(bound), rel=1e-2, abs=1e-12)


def test_a_problem_that_does_not_converge_is_reported(monkeypatch):
    monkeypatch.setattr(svm, "MAX_STEPS", 2)
    rows, targets = problem()
    fits = svm.fit(svm.gram_matrix(rows), targets, (100.0,))
    assert not fits.converged.any()
    assert (fits.errors > svm.TOLERANCE).all()


def test_all_rows_alike():
    rows = torch.ones(30, 8) / 8**0.5
    targets = torch.tensor([[1] * 10 + [-1] * 20])
    fits = svm.fit(svm.gram_matrix(rows), targets, voc.COSTS)
    assert fits.converged.all()
    # f is one number x for all rows, and ||w||^2 = x^2 / 2:
    # x / 2 = 2 C (10 * 2 (1 - x) - 20 (1 + x)) = -80 C x, so x = 0.
    assert fits.decisions.abs().max() < 1e-6


@pytest.mark.parametrize("noise", (0.0, 1e-5))
def test_many_equal_rows_with_targets_of_both_kinds(noise):
    """A step in float32 is all rounding here; costs in turn start from such solutions."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(8, generator=generator)
    rows = (row / row.norm()).repeat(300, 1) + noise * torch.randn(300, 8, generator=generator)
    targets = torch.where(torch.rand(4, 300, generator=generator) < 0.3, 1, -1)
    fits = svm.fit(svm.gram_matrix(rows), targets, (1.0, 10.0, 100.0))
    assert fits.converged.all()


@pytest.mark.parametrize("block", (7, 1024))
def test_gram_matrix(block, monkeypatch):
    monkeypatch.setattr(svm, "GRAM_BLOCK", block)
    rows, _ = problem(n=20, width=6)
    others, _ = problem(n=11, width=6, seed=1)
    assert torch.allclose(svm.gram_matrix(rows), rows.double() @ rows.double().T + 1)
    assert torch.allclose(svm.gram_matrix(rows, others), rows.double() @ others.double().T + 1)


def test_float32_products_keep_their_precision():
    """TF32 or bfloat16 may be allowed for the rest of a program, but not here."""
    rows, targets = problem(n=600, width=700)
    gram = svm.gram_matrix(rows)
    torch.set_float32_matmul_precision("medium")
    try:
        rough = svm.fit(gram, targets, voc.COSTS)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    exact = svm.fit(gram, targets, voc.COSTS)
    assert torch.equal(rough.coefficients, exact.coefficients)
