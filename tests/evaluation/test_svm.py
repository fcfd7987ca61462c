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


def fit(rows, targets, costs):
    """Fits [S, P, ...] of the problems on one Gram matrix."""
    gram = svm.gram_matrix(rows)
    fits = svm.fit(gram[None], svm.strongest_eigenvectors(gram)[None], targets[None], costs)
    return svm.Fits(fits.coefficients[:, 0], fits.decisions[:, 0], fits.errors[:, 0])


def check_against_linear_svc(rows, targets, costs, **options):
    fits = fit(rows, targets, costs)
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


@pytest.mark.parametrize("options, costs, tolerance", [
    (dict(n=400, width=5), (100.0, 1.0, 0.5**10), 1e-12),  # a singular Gram matrix
    (dict(n=100, width=20, scale=30.0), (100.0, 0.0625), 1e-13)])  # rows that are not normalised
def test_ill_conditioned_systems(options, costs, tolerance):
    check_against_linear_svc(*problem(**options), costs, dual=False, tol=tolerance)


def test_several_gram_matrices_at_once():
    rows, targets = problem(n=80, width=90, labels=2)
    others, other_targets = problem(n=80, width=90, labels=2, seed=1)
    gram = torch.stack([svm.gram_matrix(rows), svm.gram_matrix(others)])
    basis = torch.stack([svm.strongest_eigenvectors(each) for each in gram])
    both = svm.fit(gram, basis, torch.stack([targets, other_targets]), voc.COSTS)
    assert both.converged.all()
    for g, alone in enumerate((fit(rows, targets, voc.COSTS),
                               fit(others, other_targets, voc.COSTS))):
        assert torch.allclose(both.decisions[:, g], alone.decisions, rtol=1e-5, atol=1e-6)


def test_float64_takes_over(monkeypatch):
    """From the first step on, and for what float32 does not solve."""
    rows, targets = problem()
    fits = fit(rows, targets, (100.0, 0.0625))
    monkeypatch.setattr(svm, "FLOAT32_STEPS", 0)
    careful = fit(rows, targets, (100.0, 0.0625))
    assert fits.converged.all() and careful.converged.all()
    assert torch.allclose(fits.decisions, careful.decisions, rtol=1e-5, atol=1e-6)


def test_the_bound_of_the_error_holds():
    rows, targets = problem()
    gram = svm.gram_matrix(rows)
    fits = fit(rows, targets, (1.0,))
    for p in range(len(targets)):
        b, f, t = fits.coefficients[0, p], fits.decisions[0, p], targets[p].double()
        assert torch.allclose(gram @ b, f, atol=1e-10)
        gradient = b - 2 * torch.where(t > 0, 2, 1) * t * (1 - t * f).clamp(min=0)
        bound = (gradient @ gram @ gradient).clamp(min=0).sqrt() / (b @ f).sqrt()
        assert bound <= svm.TOLERANCE
        assert float(fits.errors[0, p]) == pytest.approx(float(bound), rel=1e-2, abs=1e-12)


def test_a_problem_that_does_not_converge_is_reported(monkeypatch):
    monkeypatch.setattr(svm, "MAX_STEPS", 2)
    rows, targets = problem()
    fits = fit(rows, targets, (100.0,))
    assert not fits.converged.any()
    assert (fits.errors > svm.TOLERANCE).all()


@pytest.mark.parametrize("noise", (0.0, 1e-5))
def test_many_equal_rows_with_targets_of_both_kinds(noise):
    """A step in float32 is all rounding here; costs in turn start from such solutions."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(8, generator=generator)
    rows = (row / row.norm()).repeat(300, 1) + noise * torch.randn(300, 8, generator=generator)
    targets = torch.where(torch.rand(4, 300, generator=generator) < 0.3, 1, -1)
    fits = fit(rows, targets, (1.0, 10.0, 100.0))
    assert fits.converged.all()


def test_gram_matrix(monkeypatch):
    monkeypatch.setattr(svm, "BLOCK", 7)
    rows, _ = problem(n=20, width=6)
    others, _ = problem(n=11, width=6, seed=1)
    assert torch.allclose(svm.gram_matrix(rows), rows.double() @ rows.double().T + 1)
    assert torch.allclose(svm.gram_matrix(rows, others), rows.double() @ others.double().T + 1)
