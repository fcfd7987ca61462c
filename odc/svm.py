"""L2-regularised squared-hinge support vector machines, many at once, in the kernel form.

The problem is LIBLINEAR's (odc.md section 7, the recipe's LinearSVC): with t_i = 1 / -1, s_i = 2 / 1 for positives /
negatives and the bias a weight on one more input of constant 1,

    P(w) = 1/2 ||w||^2 + C sum_i s_i max(0, 1 - t_i f_i)^2,    f_i = w . x_i.

Every solution is w = sum_i b_i x_i, so all classes, costs and folds of one feature map need only the Gram matrix
K [N, N] of its rows: f = K b, ||w||^2 = b . K b. At the optimum b_i = 2 C s_i t_i max(0, 1 - t_i f_i).

Letters: N rows, P problems that share them, S costs.
"""

from dataclasses import dataclass

import torch

POSITIVE_WEIGHT = 2.0  # the recipe's class_weight={1: 2, -1: 1}
TOLERANCE = 1e-7  # relative error of w at which a problem counts as solved
MAX_STEPS = 100  # Newton steps of one problem; a few are usual


@dataclass
class Fits:
    """The solutions of S costs x P problems."""

    coefficients: torch.Tensor  # [S, N, P] float64: b
    decisions: torch.Tensor  # [S, N, P] float64: f, the decision value of every row, also of those not in the problem
    errors: torch.Tensor  # [S, P]: upper bound of ||w - w*|| / ||w||; the objective is within ||w - w*||^2 / 2
    converged: torch.Tensor  # [S, P] bool: errors <= TOLERANCE


def gram(rows, others=None, block=1024):
    """Inner products of rows [n, D] with others [m, D] (default: themselves), bias input included -> float64 [n, m]."""
    others = rows if others is None else others
    result = torch.empty(len(rows), len(others), dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        if others is rows:  # symmetric: only the lower blocks
            stop = min(start + block, len(rows))
            torch.mm(rows[part].double(), rows[:stop].double().T, out=result[part, :stop])
            result[:start, part] = result[part, :start].T
        else:
            torch.mm(rows[part].double(), others.double().T, out=result[part])
    return result.add_(1)


def row_weights(targets):
    """s_i: 2 for positives, 1 for negatives, 0 for rows that are not in the problem; float64, the shape of targets."""
    return (targets != 0).double() + (POSITIVE_WEIGHT - 1) * (targets > 0).double()


def objective(coefficients, decisions, targets, cost):
    """P(w) of every problem: [N, P] coefficients, decisions and targets -> [P]."""
    hinge = (1 - targets * decisions).clamp_(min=0)
    return 0.5 * (coefficients * decisions).sum(0) + cost * (row_weights(targets) * hinge.square()).sum(0)


def fit(kernel, targets, costs):
    """Solve the problems of every cost and every column of targets.

    kernel: [N, N] float64, see `gram`. targets: [N, P] integer, 1 positive, -1 negative, 0 not in the problem.
    costs: S numbers. Returns Fits; a problem that did not converge has `converged` False there and must not be used.
    """
    targets = targets.double()
    S, (N, P) = len(costs), targets.shape
    fits = Fits(kernel.new_zeros(S, N, P), kernel.new_zeros(S, N, P), kernel.new_zeros(S, P),
                torch.zeros(S, P, dtype=torch.bool))
    for p in range(P):
        b = f = kernel.new_zeros(N)
        for s in sorted(range(S), key=lambda s: costs[s]):  # from small to large: each starts at the one before
            b, f, fits.errors[s, p] = _newton(kernel, targets[:, p], costs[s], b, f)
            fits.coefficients[s, :, p], fits.decisions[s, :, p] = b, f
    fits.converged = fits.errors <= TOLERANCE
    return fits


def used_rows(problems):
    """The rows that each problem uses: [P, N] targets -> rows [P, n] int64 and their targets [P, n], n the most used.

    A problem with fewer rows is filled up with rows whose target is 0.
    """
    n = int((problems != 0).sum(1).max())
    rows = (problems == 0).sort(dim=1, stable=True).indices[:, :n]
    return rows, problems.gather(1, rows)


def fit_subsets(kernel, rows, targets, costs):
    """As `fit`, for problems that each use few rows of their own.

    rows: [P, n] row numbers, targets: [P, n], see `used_rows`. Returns coefficients [P, n, S] of those rows and
    converged [P, S].
    """
    coefficients = kernel.new_zeros(*rows.shape, len(costs))
    converged = torch.zeros(len(rows), len(costs), dtype=torch.bool)
    for p in range(len(rows)):
        fits = fit(kernel[rows[p]][:, rows[p]], targets[p][:, None], costs)
        coefficients[p], converged[p] = fits.coefficients[:, :, 0].T, fits.converged[:, 0]
    return coefficients, converged


def _newton(kernel, t, cost, b, f):
    """Newton's method with exact line search on one problem; returns b, f and the relative error bound."""
    slope = 2 * cost * row_weights(t)
    error = torch.inf
    for _ in range(MAX_STEPS):
        rest = b - slope * t * (1 - t * f).clamp(min=0)  # the gradient in w is sum_i rest_i x_i
        size = (b @ f).clamp(min=0).sqrt()
        error = float((rest @ (kernel @ rest)).clamp(min=0).sqrt() / size) if size > 0 else torch.inf
        if error <= TOLERANCE:
            break
        active = ((t * f < 1) & (slope > 0)).nonzero()[:, 0]
        system = kernel[active][:, active]
        system.diagonal().add_(1 / slope[active])
        new = torch.zeros_like(b)
        new[active] = torch.cholesky_solve(t[active][:, None], torch.linalg.cholesky(system))[:, 0]
        step_f = kernel[:, active] @ new[active] - f
        step = _line_search(b, f, new - b, step_f, t, slope)
        b, f = b + step * (new - b), f + step * step_f
    return b, f, error


def _line_search(b, f, db, df, t, slope):
    """The step length in [0, 1] that minimises P: its derivative is increasing, so bisection finds the root."""
    linear, quadratic = b @ df, db @ df

    def derivative(step):
        hinge = (1 - t * (f + step * df)).clamp(min=0)
        return linear + step * quadratic - (slope * t * hinge) @ df

    if derivative(1.0) <= 1e-12 * abs(derivative(0.0)):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if derivative(middle) < 0 else (low, middle)
    return low
