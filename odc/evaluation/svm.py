"""L2-regularised squared-hinge support vector machines, thousands of them at once.

The problem is the one that the recipe's LinearSVC gives to LIBLINEAR. With targets t_i of 1 and -1,
weights s_i of 2 for positives and 1 for negatives, and the bias as the weight of one more input
that is always 1, minimise over w

    P(w) = 1/2 ||w||^2 + C sum_i s_i max(0, 1 - t_i f_i)^2,    f_i = w . x_i.

**Many problems at once.** Every solution is a sum of rows, w = sum_i b_i x_i. So all that classes,
costs and folds need of the rows is their Gram matrix A, A_ij = x_i . x_j: then f = A b, and
||w||^2 = b . A b. The product of A with the vectors of all problems is one matrix product.

**Newton's method** (Chapelle, "Training a support vector machine in the primal", 2007). The active
rows are those with 1 - t_i f_i > 0. If they were known, P would be a quadratic with its minimum at
(A + diag(1 / c)) b = t on the active rows, where c_i = 2 C s_i, and b = 0 on the others. Each step
goes towards this minimum as far as P falls, and a few steps find the active rows. Costs are solved
in ascending order, each from the solution before.

**The linear system of a step** is solved in one of two ways, whichever takes fewer operations.
With few active rows: a Cholesky factorisation. Else: conjugate gradients for all problems at once.
Their preconditioner replaces A by its strongest eigenvectors L L^T and inverts L L^T + diag(1 / c)
by the Woodbury identity.

**Precision.** Steps are solved in float32, as corrections to values in float64, which makes up for
their rounding. P is 1-strongly convex in w, so w is at most as far from the solution as the
gradient is long: ||w - w*||^2 <= r . A r with r_i = b_i - c_i t_i max(0, 1 - t_i f_i). This bound
checks every problem, with f = A b in float64.

Letters: n rows, P problems, S costs, G Gram matrices, each with problems of its own.
"""

from dataclasses import dataclass

import torch

from odc.products import full_precision

POSITIVE_WEIGHT = 2.0  # the recipe's class_weight={1: 2, -1: 1}
TOLERANCE = 1e-6  # relative error of w at which a problem counts as solved
STEP_TOLERANCE = 3e-4  # relative error of one Newton step
ROUGH = 3e-2  # relative error of w above which f = A b in float32 is good enough
MAX_STEPS = 100  # Newton steps of a problem; five are usual
CAREFUL_AFTER = 20  # steps after which a problem is solved by factorisation in float64
MAX_RANK = 129  # of the preconditioner
RANKS = (1, 2, 4, 8, 16, 32, 64, 128)  # that it may have
GRAM_BLOCK = 1024  # rows of a Gram matrix that are computed at a time
BLOCK = 2**23  # numbers in the Gram matrices of problems that are solved together, about


@dataclass
class Fits:
    """The solutions of S costs x P problems on the same n rows."""

    coefficients: torch.Tensor  # [S, P, n] float64: b
    decisions: torch.Tensor  # [S, P, n] float64: f, also of rows that are not in the problem
    errors: torch.Tensor  # [S, P] float64: bound on ||w - w*|| / ||w||

    @property
    def converged(self):
        """[S, P] bool. Problems that did not converge must not be used."""
        return self.errors <= TOLERANCE


def gram_matrix(rows, others=None):
    """Inner products of rows [n, D] with others [m, D] (default: themselves): [n, m] float64.

    The input of 1 that makes the bias is included.
    """
    symmetric = others is None
    others = rows if symmetric else others
    result = torch.empty(len(rows), len(others), dtype=torch.float64, device=rows.device)
    for i in range(0, len(rows), GRAM_BLOCK):
        left = rows[i : i + GRAM_BLOCK].double()
        for j in range(0, i + 1 if symmetric else len(others), GRAM_BLOCK):
            part = left @ others[j : j + GRAM_BLOCK].double().T
            result[i : i + GRAM_BLOCK, j : j + GRAM_BLOCK] = part
            if symmetric:
                result[j : j + GRAM_BLOCK, i : i + GRAM_BLOCK] = part.T
    return result.add_(1)


def row_weights(targets):
    """s_i: 2 for positives, 1 for negatives, 0 for rows that are not in the problem; float64."""
    return (targets != 0).double() + (POSITIVE_WEIGHT - 1) * (targets > 0).double()


def fit(gram, targets, costs, progress=lambda fits: None):
    """Solve the problems of every cost and every row of targets -> Fits.

    gram: [n, n] float64, see `gram_matrix`. targets: [P, n] integer: 1 positive, -1 negative, 0 not
    in the problem. costs: S numbers. progress: called with the number of fits after each cost.
    """
    targets = targets.double()
    S, (P, n) = len(costs), targets.shape
    fits = Fits(gram.new_zeros(S, P, n), gram.new_zeros(S, P, n), gram.new_zeros(S, P))
    solver = _Solver(gram[None], *strongest_eigenvectors(gram))
    b = f = torch.zeros_like(targets)[None]
    for s in sorted(range(S), key=lambda s: costs[s]):
        slope = 2 * costs[s] * row_weights(targets)
        b, f, errors = solver.solve(targets[None], slope[None], b, f)
        fits.coefficients[s], fits.decisions[s], fits.errors[s] = b[0], f[0], errors[0]
        progress(P)
    return fits


def used_rows(targets):
    """The rows that each problem uses, of targets [P, n]: row numbers [P, u], their targets [P, u].

    u is the largest number of rows that a problem uses. Problems that use fewer are filled up with
    rows whose target is 0.
    """
    used = int((targets != 0).sum(1).max())
    rows = (targets == 0).to(torch.uint8).sort(dim=1, stable=True).indices[:, :used]
    return rows, targets.gather(1, rows)


def fit_subsets(gram, eigenvectors, rows, targets, costs, progress=lambda fits: None):
    """As `fit`, for problems that each use few rows of their own.

    eigenvectors: `strongest_eigenvectors(gram)`. rows, targets: [P, u], see `used_rows`.
    Returns coefficients [P, S, u] of these rows, and converged [P, S].
    """
    P, u = rows.shape
    coefficients = gram.new_zeros(P, len(costs), u)
    converged = torch.zeros(P, len(costs), dtype=torch.bool, device=gram.device)
    basis, values = eigenvectors
    ascending = sorted(range(len(costs)), key=lambda s: costs[s])
    # Small costs are easy: all at once, from zero. Larger ones start each at the one before.
    small = [s for s in ascending if costs[s] < 0.1]
    groups = [small, *([s] for s in ascending[len(small) :])]
    size = max(1, BLOCK // (u * u + u * len(costs)))
    parts = zip(*(x.split(size) for x in (rows, targets, coefficients, converged)))
    for index, t, found, done in parts:
        t = t.double()[:, None]  # [G, 1, u]
        own = gram[index[:, :, None], index[:, None]]  # [G, u, u]
        solver = _Solver(own, basis[index], values * u / len(gram))
        b = f = torch.zeros_like(t)
        for group in filter(None, groups):
            cost = torch.tensor([costs[s] for s in group], dtype=torch.float64, device=gram.device)
            slope = 2 * cost[:, None] * row_weights(t)
            b, f, errors = solver.solve(*(x.expand_as(slope) for x in (t, slope, b, f)))
            found[:, group], done[:, group] = b, errors <= TOLERANCE
            b, f = b[:, -1:], f[:, -1:]
        progress(len(index) * len(costs))
    return coefficients, converged


@full_precision()
def strongest_eigenvectors(gram):
    """L [n, rank] float32, so that L L^T is the dominant part of a Gram matrix; eigenvalues [rank].

    The strongest comes first. The eigenvalues are on the CPU. By subspace iteration.
    """
    n = len(gram)
    fast = gram.float()
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(n, min(n, MAX_RANK + 16), generator=generator).to(gram.device)
    for _ in range(4):
        q = torch.linalg.qr(fast @ q).Q
    values, vectors = torch.linalg.eigh(q.T @ (fast @ q))
    values, vectors = values.flip(0)[:MAX_RANK].clamp(min=0), vectors.flip(1)[:, :MAX_RANK]
    return q @ vectors * values.sqrt(), values.cpu().double()


class _Solver:
    """Newton's method on problems of G Gram matrices [G, n, n]; all tensors are [G, P, n].

    t: targets. slope: c, 0 for rows that are not in the problem. b, f = A b: the values so far.
    """

    def __init__(self, gram, basis, values):
        self.gram, self.fast = gram, gram.float()
        self.basis, self.values = basis.expand(len(gram), *basis.shape[-2:]), values
        self.ranks = torch.tensor([r for r in RANKS if r < len(values)] or [0])

    def product(self, b):
        """A b in float32."""
        return (b.float() @ self.fast).double()

    @full_precision()
    def solve(self, t, slope, b, f):
        """The solutions b and f, and bounds [G, P] on their relative errors.

        Problem p is done when it is solved for all G Gram matrices.
        """
        b, f = b.clone(), f.clone()
        errors = torch.full(b.shape[:2], torch.inf, dtype=torch.float64, device=b.device)
        todo = torch.arange(b.shape[1], device=b.device)
        exact = True  # f is A b in float64
        for count in range(MAX_STEPS):
            T, C, B, F = t[:, todo], slope[:, todo], b[:, todo], f[:, todo]
            residual = B - C * T * (1 - T * F).clamp_(min=0)
            error = self._error(residual, B, F, C, bound=False)
            if not exact and (count >= CAREFUL_AFTER or error.min() <= ROUGH):
                f[:, todo] = B @ self.gram
                exact = True
                continue
            close = error.amax(0) <= TOLERANCE
            if close.any():
                parts = (x[:, close] for x in (residual, B, F, C))
                error[:, close] = self._error(*parts, bound=True)
            errors[:, todo] = error
            left = ~close | (error.amax(0) > TOLERANCE)
            todo = todo[left]
            if len(todo) == 0:
                return b, f, errors
            if not left.all():
                T, C, B, F = T[:, left], C[:, left], B[:, left], F[:, left]
            careful = count >= CAREFUL_AFTER
            exact = exact and (careful or bool(error[:, left].min() <= ROUGH))
            db, df = self._newton_step(T, C, B, F, exact, careful)
            step = _line_search(B, F, db, df, T, C)
            b[:, todo], f[:, todo] = B + step * db, F + step * df
        errors[:, todo] = errors[:, todo].clamp(min=2 * TOLERANCE)  # the last were estimates
        return b, f, errors

    def _error(self, residual, b, f, slope, bound):
        """The length of the gradient by the length of w: a bound on the relative error of w.

        With bound=False an estimate, by the dominant part of A.
        """
        scale = _largest(residual)  # as float32 has a short range
        residual = residual / scale
        if bound:
            square = (residual * self.product(residual)).sum(-1)
        else:
            square = ((residual.float() @ self.basis).square().sum(-1)
                      + self.values[-1] * residual.square().sum(-1))
        # No w is longer than the root of 2 P(0) = sum slope. A thousandth is added, for a w of 0.
        norm = (b * f).sum(-1).clamp_(min=0).sqrt() + 1e-3 * slope.sum(-1).sqrt()
        return square.clamp_(min=0).sqrt() * scale[..., 0] / norm.clamp_(min=1e-300)

    def _newton_step(self, t, slope, b, f, exact, careful):
        """The step db, and df = A db exactly or in float32, to the minimum of the quadratic."""
        active = (t * f < 1) & (slope > 0)
        direct, rank = self._choose(active, slope)
        if careful:
            direct[:] = True
        db, df = torch.empty_like(b), torch.empty_like(f)
        for chosen, solve in ((direct, self._factorise), (~direct, self._conjugate_gradients)):
            p = chosen.nonzero()[:, 0]
            if len(p) == 0:
                continue
            on, B, F = active[:, p], b[:, p], f[:, p]
            removed = torch.where(on, 0.0, B)
            if careful:
                f_removed = removed @ self.gram
            else:
                f_removed = self.product(removed) if removed.any() else removed
            ridge = torch.where(on, 1 / slope[:, p], 1.0)
            rhs = torch.where(on, t[:, p] - F + f_removed - ridge * B, 0.0)
            scale = _largest(rhs)
            x, f_x = solve(on, ridge, rhs / scale, rank, careful)
            db[:, p] = x * scale - removed
            if not exact:
                df[:, p] = (self.product(x) if f_x is None else f_x) * scale - f_removed
        return db, db @ self.gram if exact else df

    def _choose(self, active, slope):
        """Which problems [P] to factorise, and the rank of the preconditioner for the others.

        The operations are estimated. Conjugate gradients take more products with A the more of A
        the preconditioner leaves.
        """
        n, device = active.shape[-1], active.device
        ranks = self.ranks.to(device)
        tails = self.values[self.ranks].to(device)
        products = 3 + 4 * (1 + slope.amax(-1, keepdim=True) * tails).sqrt()  # [G, P, ranks]
        counts = active.sum(-1).double()
        direct = torch.zeros(active.shape[1], dtype=torch.bool, device=device)
        for _ in range(2):  # to read A takes as long as to multiply it with about eight vectors
            size = 2 * n**2 * max(1.0, 8 / max(1, int((~direct).sum())))
            iterative = products * size + 4 * n * ranks.double() ** 2
            cheaper = counts**3 + 40 * counts**2 < iterative.amin(-1)
            direct = cheaper.double().mean(0) > 0.5
        return direct, int(self.ranks[iterative[:, ~direct].sum((0, 1)).argmin()])

    def _factorise(self, active, ridge, rhs, rank, careful):
        """Solve by a Cholesky factorisation of each problem's active rows -> x, None for A x."""
        x = torch.zeros_like(rhs)
        # Problems of about equal sizes are solved together.
        counts, order = active.sum(-1).cpu().flatten().sort()
        together = max(1, 2**16 // max(1, int(counts[-1])) ** 2)
        for size, part in zip(counts.split(together), order.split(together)):
            g, p = (part // x.shape[1]).to(x.device), (part % x.shape[1]).to(x.device)
            size = int(size[-1])
            if size == 0:
                continue
            # Active rows come first. Rows that fill up the shorter problems are cut loose.
            index = (~active[g, p]).to(torch.uint8).sort(dim=-1, stable=True).indices[:, :size]
            on = active[g, p].gather(1, index)
            for gram in (self.gram,) if careful else (self.fast, self.gram):
                system = gram[g[:, None, None], index[:, :, None], index[:, None]]
                system *= on[:, :, None] & on[:, None]
                system.diagonal(dim1=-2, dim2=-1).add_(ridge[g, p].gather(1, index).to(gram.dtype))
                factor, failed = torch.linalg.cholesky_ex(system)
                if not failed.any():  # else once more, in float64
                    break
            right = rhs[g, p].gather(1, index)[..., None].to(factor.dtype)
            solution = torch.cholesky_solve(right, factor)[..., 0].double()
            x[g, p] = torch.zeros_like(x[g, p]).scatter_(1, index, solution)
        return x, None

    def _conjugate_gradients(self, active, ridge, rhs, rank, careful):
        """Solve by preconditioned conjugate gradients on the active rows -> x, A x."""
        on, ridge, rhs = active.float(), ridge.float(), rhs.float()
        L = self.basis[..., :rank].contiguous()  # [G, n, rank]
        L_T = L.transpose(1, 2).contiguous()
        inverse = on / ridge
        # With D = inverse: (D^-1 + L L^T)^-1 = D - D L (1 + L^T D L)^-1 L^T D
        inner = torch.empty(*rhs.shape[:2], rank, rank, device=rhs.device)
        size = max(1, 2**23 // L.numel())
        for start in range(0, rhs.shape[1], size):
            scaled = inverse[:, start : start + size, None] * L_T[:, None]  # [G, size, rank, n]
            inner[:, start : start + size] = (scaled.flatten(1, 2) @ L).unflatten(1, (-1, rank))
        diagonal = inner.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(1 + 1e-6 * diagonal.amax(-1, keepdim=True))  # more than 1, against rounding
        inner = torch.cholesky_inverse(torch.linalg.cholesky(inner))

        def precondition(v):
            v = inverse * v
            return v - inverse * ((inner @ (v @ L)[..., None])[..., 0] @ L_T)

        x, f_x = torch.zeros_like(rhs), torch.zeros_like(rhs)
        residual, z = rhs, precondition(rhs)
        p, rz = z, (rhs * z).sum(-1, keepdim=True)
        goal = STEP_TOLERANCE**2 * rz
        for _ in range(200):
            f_p = p @ self.fast
            q = on * f_p + on * ridge * p
            a = torch.where(rz > goal, rz / (p * q).sum(-1, keepdim=True), 0.0)
            x, f_x, residual = x + a * p, f_x + a * f_p, residual - a * q
            z = precondition(residual)
            old, rz = rz, torch.where(rz > goal, (residual * z).sum(-1, keepdim=True), rz)
            if (rz <= goal).all():
                break
            p = z + torch.nan_to_num(rz / old, 0.0, 0.0, 0.0) * p
        return x.double(), f_x.double()


def _largest(vectors):
    return vectors.abs().amax(-1, keepdim=True).clamp_(min=1e-300)


def _line_search(b, f, db, df, t, slope):
    """The step length [..., 1], at most 16, that minimises P along db, where df = A db.

    Finds the root of the derivative, which increases and is piecewise linear, by Newton's method
    within a bracket.
    """
    quadratic = (db * df).sum(-1, keepdim=True)
    margin, fall, force = 1 - t * f, t * df, slope * t
    # A sum of terms that each vanish at the optimum: rounding does not hide a small derivative.
    first = ((b - force * margin.clamp(min=0)) * df).sum(-1, keepdim=True).abs()
    noise = 1e-15 * b.abs().sum(-1, keepdim=True) * db.abs().sum(-1, keepdim=True)
    step = torch.ones_like(quadratic)
    low, high = torch.zeros_like(step), torch.full_like(step, 16.0)
    for _ in range(50):
        hinge = (margin - step * fall).clamp_(min=0)
        derivative = ((b + step * db - force * hinge) * df).sum(-1, keepdim=True)
        done = derivative.abs() <= 1e-3 * first + noise
        if done.all():
            break
        low = torch.where(derivative < 0, step, low)
        high = torch.where(derivative < 0, high, step)
        curvature = quadratic + (slope * fall * fall * (hinge > 0)).sum(-1, keepdim=True)
        new = step - derivative / curvature.clamp(min=1e-300)
        new = torch.where((new > low) & (new < high), new, (low + high) / 2)
        step = torch.where(done, step, new)
    return step
