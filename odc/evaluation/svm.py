"""L2-regularised squared-hinge support vector machines, thousands of them at once.

The problem is that of the recipe's LinearSVC. With targets t_i of 1 and -1, weights s_i of 2 for
positives and 1 for negatives, and the bias as the weight of an input of 1, minimise over w

    1/2 ||w||^2 + C sum_i s_i max(0, 1 - t_i f_i)^2,    f_i = w . x_i.

Every solution is a sum of rows, w = sum_i b_i x_i. So all that classes, costs and folds need of the
rows is their Gram matrix A, A_ij = x_i . x_j: then f = A b, and ||w||^2 = b . A b.

**Newton's method** (Chapelle, "Training a support vector machine in the primal", 2007). If the
active rows, those with 1 - t_i f_i > 0, were known, the minimum would be at (A + diag(1 / c)) b = t
on them, where c_i = 2 C s_i, and b = 0 on the others. Each step goes towards it as far as the
objective falls. Conjugate gradients solve these systems of all problems at once.

**Precision.** b and f are float64, a step to them is float32. The objective is 1-strongly convex in
w, so ||w - w*||^2 <= g . A g with g_i = b_i - c_i t_i max(0, 1 - t_i f_i) checks a problem.

Letters: n rows, P problems, S costs, G Gram matrices, each with problems of its own, r rank of L.
"""

from dataclasses import dataclass

import torch

POSITIVE_WEIGHT = 2.0  # the recipe's class_weight={1: 2, -1: 1}
TOLERANCE = 1e-6  # relative error of w at which a problem counts as solved
STEP_TOLERANCE = 1e-3  # relative error of the linear system of a step
MAX_STEPS = 100  # Newton steps of a problem; five are usual
FLOAT32_STEPS = 15  # later ones are in float64
MAX_ITERATIONS = 200  # of conjugate gradients
FLOAT64_TOLERANCE = 1e-9  # then, for problems that float32 does not solve
RANK = 32  # of the preconditioner
TOGETHER = 16  # problems of one Gram matrix that keep a processor busy
BLOCK = 1024  # rows of a Gram matrix that are computed at a time


@dataclass
class Fits:
    """The solutions of S costs x P problems for each of G Gram matrices of n rows."""

    coefficients: torch.Tensor  # [S, G, P, n] float64: b
    decisions: torch.Tensor  # [S, G, P, n] float64: f, also of rows that are not in the problem
    errors: torch.Tensor  # [S, G, P] float64: bound on ||w - w*|| / ||w||

    @property
    def converged(self):
        """[S, G, P] bool. Problems that did not converge must not be used."""
        return self.errors <= TOLERANCE


def gram_matrix(rows, others=None):
    """Inner products of rows [n, D] with others [m, D], and 1 for the bias: [n, m] float64."""
    others = (rows if others is None else others).double()
    return torch.cat([part.double() @ others.T for part in rows.split(BLOCK)]).add_(1)


def strongest_eigenvectors(gram):
    """L [n, r] float64, strongest first: L L^T is the dominant part of a Gram matrix [n, n]."""
    n, generator = len(gram), torch.Generator().manual_seed(0)
    q = torch.randn(n, min(n, RANK + 16), generator=generator, dtype=torch.float64).to(gram.device)
    for _ in range(4):  # subspace iteration
        q = torch.linalg.qr(gram @ q).Q
    values, vectors = torch.linalg.eigh(q.T @ (gram @ q))
    return (q @ vectors * values.clamp(min=0).sqrt()).flip(1)[:, :RANK]


def fit(gram, basis, targets, costs, progress=lambda fits: None):
    """Solve the problems of every cost and every row of targets -> Fits.

    gram: [G, n, n] float64. basis: [G, n, r], its `strongest_eigenvectors`. targets: [G, P, n]
    integer, 1, -1, or 0 for rows not in the problem. progress: called with the number of new fits.
    """
    (G, P, n), S = targets.shape, len(costs)
    fits = Fits(*(gram.new_zeros(S, G, P, *shape) for shape in ((n,), (n,), ())))
    solver = _Solver(gram, basis)
    weights = (targets != 0) + (POSITIVE_WEIGHT - 1) * (targets > 0).double()
    b = f = gram.new_zeros(G, P, n)
    # Each cost starts at the solution of a smaller one. Few problems are solved at several costs.
    order = torch.tensor(costs, dtype=torch.float64).argsort(stable=True)
    for group in order.split(max(1, TOGETHER // P)):
        slope = torch.cat([2 * costs[s] * weights for s in group], dim=1)
        t, b, f = (x[:, -P:].repeat(1, len(group), 1) for x in (targets, b, f))
        b, f, errors = solver.solve(t, slope, b, f)
        for values, found in ((fits.coefficients, b), (fits.decisions, f), (fits.errors, errors)):
            values[group] = found.unflatten(1, (-1, P)).transpose(0, 1)
        progress(G * P * len(group))
    return fits


class _Solver:
    """Newton's method on vectors [G, P, n]. t: targets. slope: c, 0 for rows not in the problem."""

    def __init__(self, gram, basis):
        self.gram, self.fast, self.basis = gram, gram.float(), basis
        self.rest = (gram.diagonal(dim1=1, dim2=2) - basis.square().sum(-1)).clamp(min=0)

    def solve(self, t, slope, b, f):
        """The solutions b and f, and bounds [G, P] on their relative errors."""
        errors = b.new_full(b.shape[:2], torch.inf)
        todo = torch.arange(b.shape[1], device=b.device)
        for count in range(MAX_STEPS):
            T, C, B, F = (x[:, todo] for x in (t, slope, b, f))
            gradient = B - C * T * (1 - T * F).clamp(min=0)
            square = (gradient * (gradient.float() @ self.fast)).sum(-1).clamp(min=0)
            # No w is longer than the root of sum c. A thousandth of it is added, for a w of 0.
            norm = (B * F).sum(-1).clamp(min=0).sqrt() + 1e-3 * C.sum(-1).sqrt()
            errors[:, todo] = square.sqrt() / norm
            left = (errors[:, todo] > TOLERANCE).any(0)  # for one of the Gram matrices
            if not left.any():
                break
            todo = todo[left]
            T, C, B, F, gradient = (x[:, left] for x in (T, C, B, F, gradient))
            active = (T * F < 1) & (C > 0)
            A, accuracy = ((self.fast, STEP_TOLERANCE) if count < FLOAT32_STEPS
                           else (self.gram, FLOAT64_TOLERANCE))
            removed = torch.where(active, 0.0, B)
            rhs = torch.where(active, removed.to(A.dtype) @ A - gradient / C, 0.0)
            step = self._conjugate_gradients(A, active, C, rhs, accuracy) - removed
            change = step @ self.gram
            length = _line_search(B, F, step, change, T, C)
            b[:, todo], f[:, todo] = B + length * step, F + length * change
        return b, f, errors

    def _conjugate_gradients(self, A, active, slope, rhs, accuracy):
        """Solve (A + diag(1 / c)) x = rhs on the active rows -> x float64."""
        L, ridge, residual = (x.to(A.dtype) for x in (self.basis, 1 / slope, rhs))
        # (L L^T + diag(1 / e))^-1 = e - e L (1 + L^T e L)^-1 L^T e, with A + diag(1 / c)'s diagonal
        e = active / (ridge + self.rest[:, None].to(A.dtype))
        inner = e @ (L[..., :, None] * L[..., None, :]).flatten(2)
        inner = inner.unflatten(2, (L.shape[-1], L.shape[-1]))
        diagonal = inner.diagonal(dim1=-2, dim2=-1)
        rounding = 10 * torch.finfo(A.dtype).eps
        diagonal += 1 + rounding * diagonal.amax(-1, keepdim=True)
        inner = torch.cholesky_inverse(torch.linalg.cholesky(inner))

        def precondition(v):
            v = e * v
            return v - e * ((inner @ (v @ L)[..., None])[..., 0] @ L.mT)

        x, todo = torch.zeros_like(residual), torch.arange(rhs.shape[1], device=rhs.device)
        p = precondition(residual)
        rz = (residual * p).sum(-1, keepdim=True)
        goal = accuracy**2 * rz
        for _ in range(MAX_ITERATIONS):
            left = (rz > goal).any(0)[:, 0]
            if not left.any():
                break
            if not left.all():
                todo, active, ridge, e, inner, residual, p, rz, goal = todo[left], *(
                    v[:, left] for v in (active, ridge, e, inner, residual, p, rz, goal))
            q = torch.where(active, p @ A + ridge * p, 0.0)
            length = torch.where(rz > goal, rz / (p * q).sum(-1, keepdim=True), 0.0)
            x[:, todo] += length * p
            residual = residual - length * q
            z = precondition(residual)
            old, rz = rz, (residual * z).sum(-1, keepdim=True)
            p = z + torch.where(rz > goal, rz / old, 0.0) * p
        return x.double()


def _line_search(b, f, step, change, t, slope):
    """The length [..., 1], at most 16, that minimises the objective along step; change = A step."""
    quadratic = (step * change).sum(-1, keepdim=True)
    margin, fall, force = 1 - t * f, t * change, slope * t
    length = torch.ones_like(quadratic)
    low, high = torch.zeros_like(length), torch.full_like(length, 16.0)
    # A sum of terms that each vanish at the optimum: rounding does not hide a small derivative.
    first = ((b - force * margin.clamp(min=0)) * change).sum(-1, keepdim=True).abs()
    for _ in range(30):  # Newton's method in a bracket: the derivative is piecewise linear
        hinge = (margin - length * fall).clamp(min=0)
        derivative = ((b + length * step - force * hinge) * change).sum(-1, keepdim=True)
        done = derivative.abs() <= 1e-3 * first
        if done.all():
            break
        low, high = low.where(derivative >= 0, length), high.where(derivative < 0, length)
        curvature = quadratic + (slope * fall * fall * (hinge > 0)).sum(-1, keepdim=True)
        new = length - derivative / curvature.clamp(min=1e-300)
        new = new.where((new > low) & (new < high), (low + high) / 2)
        length = length.where(done, new)
    return length
