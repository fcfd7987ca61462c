"""L2-regularised squared-hinge support vector machines, many at once, in the kernel form.

The problem is LIBLINEAR's (the VOC07 benchmark, the recipe's LinearSVC): with t_i = 1 / -1, s_i = 2 / 1 for positives /
negatives and the bias a weight on one more input of constant 1,

    P(w) = 1/2 ||w||^2 + C sum_i s_i max(0, 1 - t_i f_i)^2,    f_i = w . x_i.

Every solution is w = sum_i b_i x_i, so all classes, costs and folds of one feature map need only the Gram matrix
K [n, n] of its rows: f = K b, ||w||^2 = b . K b. With c_i = 2 C s_i the gradient in w is sum_i r_i x_i with
r_i = b_i - c_i t_i max(0, 1 - t_i f_i), and a Newton step on the active rows (1 - t_i f_i > 0) solves
(K + diag(1 / c)) b = t there, with b = 0 elsewhere.

P is 1-strongly convex in w, so ||w - w*|| <= ||gradient|| = sqrt(r . K r): that is the bound by which every problem is
checked. Steps are solved in float32 as corrections to float64 values, the check uses f = K b in float64.

Letters: n rows, G groups of problems with a Gram matrix each, P problems of a group, S costs.
"""

from dataclasses import dataclass

import torch

POSITIVE_WEIGHT = 2.0  # the recipe's class_weight={1: 2, -1: 1}
TOLERANCE = 1e-6  # relative error of w at which a problem counts as solved
FORCING = 3e-4  # relative accuracy of one Newton step
ROUGH = 3e-2  # relative error above which K b in float32 does
MAX_STEPS = 100  # Newton steps of one problem; five are usual
CAREFUL_AFTER = 20  # steps, after which a problem that resists is solved in float64 throughout
MAX_RANK = 129  # of the preconditioner
BLOCK = 2**24  # numbers in one temporary tensor, about


@dataclass
class Fits:
    """The solutions of S costs x P problems on the same n rows."""

    coefficients: torch.Tensor  # [S, P, n] float64: b
    decisions: torch.Tensor  # [S, P, n] float64: f, the decision value of every row, also of those not in the problem
    errors: torch.Tensor  # [S, P] float64: bound of ||w - w*|| / ||w||; the objective is within ||w - w*||^2 of optimal
    converged: torch.Tensor  # [S, P] bool: errors <= TOLERANCE


def gram(rows, others=None, block=1024):
    """Inner products of rows [n, D] with others [m, D] (default: themselves), bias input included -> float64 [n, m]."""
    others = rows if others is None else others
    result = torch.empty(len(rows), len(others), dtype=torch.float64, device=rows.device)
    for i in range(0, len(rows), block):
        left = rows[i : i + block].double()
        for j in range(0, i + 1 if others is rows else len(others), block):
            part = left @ others[j : j + block].double().T
            result[i : i + block, j : j + block] = part
            if others is rows:  # symmetric: the upper blocks are copies
                result[j : j + block, i : i + block] = part.T
    return result.add_(1)


def row_weights(targets):
    """s_i: 2 for positives, 1 for negatives, 0 for rows that are not in the problem; float64, the shape of targets."""
    return (targets != 0).double() + (POSITIVE_WEIGHT - 1) * (targets > 0).double()


def objective(coefficients, decisions, targets, cost):
    """P(w) of each problem, for [..., n] coefficients, decisions and targets -> [...]."""
    hinge = (1 - targets * decisions).clamp_(min=0)
    return 0.5 * (coefficients * decisions).sum(-1) + cost * (row_weights(targets) * hinge.square()).sum(-1)


def fit(kernel, targets, costs, progress=None):
    """Solve the problems of every cost and every row of targets.

    kernel: [n, n] float64, see `gram`. targets: [P, n] integer, 1 positive, -1 negative, 0 not in the problem.
    costs: S numbers. progress: called with the number of fits after each cost. Returns Fits; a problem that did not
    converge has `converged` False there and must not be used.
    """
    targets = targets.double()
    S, (P, n) = len(costs), targets.shape
    coefficients, decisions = kernel.new_zeros(S, P, n), kernel.new_zeros(S, P, n)
    errors = kernel.new_zeros(S, P)
    solver = _Solver(kernel[None], *principal_rows(kernel))
    weights = row_weights(targets)
    older = before = b = f = None
    for s in sorted(range(S), key=lambda s: costs[s]):  # from small to large: each starts at the two before
        slope = 2 * costs[s] * weights
        if b is None:
            b, f = torch.zeros_like(targets), torch.zeros_like(targets)
            db, df = slope * targets, (slope * targets) @ kernel
        else:
            db, df = b - older[0], f - older[1]
        older = b, f
        if before is None or costs[s] <= 2 * before:  # along the path so far; too bold for a large change of the cost
            step = _line_search(b, f, db, df, targets, slope)
            b, f = b + step * db, f + step * df
        before = costs[s]
        b, f, error = solver.solve(targets[None], slope[None], b[None], f[None])
        b, f = b[0], f[0]
        coefficients[s], decisions[s], errors[s] = b, f, error[0]
        if progress:
            progress(P)
    return Fits(coefficients, decisions, errors, errors <= TOLERANCE)


def used_rows(problems):
    """The rows that each problem uses: [P, n] targets -> row numbers [P, u] int64 and their targets [P, u].

    u is the largest number of rows a problem uses; one with fewer is filled up with rows whose target is 0.
    """
    used = int((problems != 0).sum(1).max())
    rows = (problems == 0).to(torch.uint8).sort(dim=1, stable=True).indices[:, :used]
    return rows, problems.gather(1, rows)


def fit_subsets(kernel, principal, rows, targets, costs, progress=None):
    """As `fit`, for problems that each use few rows of their own: all costs of a problem together.

    principal: `principal_rows(kernel)`. rows: [P, u] row numbers, targets: [P, u], see `used_rows`. Returns
    coefficients [P, S, u] of those rows and converged [P, S].
    """
    P, u = rows.shape
    coefficients = kernel.new_zeros(P, len(costs), u)
    converged = torch.zeros(P, len(costs), dtype=torch.bool, device=kernel.device)
    basis, values = principal
    ascending = sorted(range(len(costs)), key=lambda s: costs[s])
    # Small costs are well conditioned: all at once from zero. Larger ones start each at the solution before.
    groups = [[s for s in ascending if costs[s] < 0.1]] + [[s] for s in ascending if costs[s] >= 0.1]
    size = max(1, BLOCK // 2 // (u * u + u * len(costs)))
    for start in range(0, P, size):
        part = slice(start, min(start + size, P))
        index, t = rows[part], targets[part].double()[:, None]  # [G, u], [G, 1, u]
        grams = torch.stack([kernel.index_select(0, own).index_select(1, own) for own in index])
        solver = _Solver(grams, basis[index], values * u / len(kernel))
        b = f = torch.zeros_like(t)
        for group in filter(None, groups):
            cost = torch.tensor([costs[s] for s in group], dtype=torch.float64, device=kernel.device)
            slope = 2 * cost[:, None] * row_weights(t)
            b, f, errors = solver.solve(t.expand_as(slope), slope, b.expand_as(slope), f.expand_as(slope))
            coefficients[part, group], converged[part, group] = b, errors <= TOLERANCE
            b, f = b[:, -1:], f[:, -1:]
        if progress:
            progress(len(index) * len(costs))
    return coefficients, converged


def principal_rows(kernel, rank=MAX_RANK, rounds=4):
    """L [n, rank] float32 with L L^T the dominant part of the Gram matrix, columns by falling strength; and the
    eigenvalues [rank], as Python numbers. Subspace iteration from a fixed start.
    """
    n = len(kernel)
    fast = kernel.float()
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(n, min(n, rank + 16), generator=generator).to(kernel.device)
    for _ in range(rounds):
        q = torch.linalg.qr(fast @ q).Q
    values, vectors = torch.linalg.eigh(q.T @ (fast @ q))
    values, vectors = values.flip(0)[:rank].clamp(min=0), vectors.flip(1)[:, :rank]
    return q @ vectors * values.sqrt(), values.cpu().double()


class _Solver:
    """Newton's method on the problems of G groups; tensors are [G, P, n]."""

    def __init__(self, kernel, basis, values):
        self.kernel, self.fast = kernel, kernel.float()  # [G, n, n]
        self.basis, self.values = basis.expand(len(kernel), *basis.shape[-2:]), values
        self.ranks = torch.tensor([r for r in (1, 2, 4, 8, 16, 32, 64, 128) if r < len(values)] or [0])

    def product(self, b):
        """K b, in float32."""
        return (b.float() @ self.fast).double()

    def solve(self, t, slope, b, f):
        """From b and f = K b to the solution: b, f and the relative error bounds [G, P].

        Problems are dropped from the work as they converge: whole columns p (all groups) at a time.
        """
        b, f = b.clone(), f.clone()
        errors = torch.full(b.shape[:2], torch.inf, dtype=torch.float64, device=b.device)
        todo = torch.arange(b.shape[1], device=b.device)
        exact = True  # f is K b in float64
        for count in range(MAX_STEPS):
            T, C, B, F = t[:, todo], slope[:, todo], b[:, todo], f[:, todo]
            rest = B - C * T * (1 - T * F).clamp_(min=0)
            error = self._error(rest, B, F, C)
            if not exact and error.min() <= ROUGH:
                f[:, todo] = B @ self.kernel
                exact = True
                continue
            close = error.amax(0) <= TOLERANCE
            if close.any():
                error[:, close] = self._error(rest[:, close], B[:, close], F[:, close], C[:, close], bound=True)
            errors[:, todo] = error
            left = ~close | (error.amax(0) > TOLERANCE)
            todo = todo[left]
            if len(todo) == 0:
                break
            if not left.all():
                T, C, B, F = T[:, left], C[:, left], B[:, left], F[:, left]
            careful = count >= CAREFUL_AFTER
            exact = exact and (careful or bool(error[:, left].min() <= ROUGH))
            db, df = self._newton_step(T, C, B, F, exact, careful)
            step = _line_search(B, F, db, df, T, C)
            b[:, todo], f[:, todo] = B + step * db, F + step * df
        else:
            errors[:, todo] = errors[:, todo].clamp(min=2 * TOLERANCE)  # estimates that were never checked
        return b, f, errors

    def _error(self, rest, b, f, slope, bound=False):
        """||gradient|| / ||w||, the bound of the relative error; else an estimate from the dominant part of K."""
        scale = rest.abs().amax(-1, keepdim=True).clamp_(min=1e-300)  # float32 has a short range
        rest = rest / scale
        if bound:
            square = (rest * self.product(rest)).sum(-1)
        else:
            square = (rest.float() @ self.basis).square().sum(-1) + self.values[-1] * rest.square().sum(-1)
        gradient = square.clamp_(min=0).sqrt() * scale[..., 0]
        norm = (b * f).sum(-1).clamp_(min=0).sqrt()
        # No w is longer than the root of 2 P(0) = sum slope: a thousandth of it stands in for a w of about 0.
        return gradient / (norm + 1e-3 * slope.sum(-1).sqrt()).clamp_(min=1e-300)

    def _newton_step(self, t, slope, b, f, exact, careful):
        """The step db and df = K db, exact or in float32, towards the minimum of the active rows' quadratic."""
        active = (t * f < 1) & (slope > 0)
        n = b.shape[-1]
        # What a problem's step costs: products with K, more of them the worse the preconditioner, or a factorisation.
        top = slope.amax(-1, keepdim=True)
        tails = self.values[self.ranks].to(b.device)  # what a preconditioner of each rank leaves of K
        products = 3 + 4 * (1 + top * tails).sqrt()
        preparation = 4 * n * self.ranks.to(b.device).double() ** 2
        counts = active.sum(-1).double()
        direct = torch.zeros(b.shape[1], dtype=torch.bool, device=b.device)
        for _ in range(2):  # reading K takes as long as the product with about eight columns
            size = 2 * n**2 * max(1.0, 8 / max(1, int((~direct).sum())))
            iterative = products * size + preparation
            direct = (counts**3 + 40 * counts**2 < iterative.amin(-1)).double().mean(0) > 0.5
        if careful:
            direct[:] = True
        rank = int(self.ranks[iterative[:, ~direct].sum((0, 1)).argmin()])
        db, df = torch.empty_like(b), torch.empty_like(f)
        for chosen, step in ((direct, self._direct), (~direct, self._conjugate_gradients)):
            p = chosen.nonzero()[:, 0]
            if len(p) == 0:
                continue
            on, B, F = active[:, p], b[:, p], f[:, p]
            removed = torch.where(on, 0.0, B)
            K_removed = removed @ self.kernel if careful else self.product(removed) if removed.any() else removed
            ridge = torch.where(on, 1 / slope[:, p], 1.0)
            rhs = torch.where(on, t[:, p] - F + K_removed - ridge * B, 0.0)
            scale = rhs.abs().amax(-1, keepdim=True).clamp_(min=1e-300)
            x, Kx = step(on, ridge, rhs / scale, rank, careful)
            db[:, p] = x * scale - removed
            if not exact:
                df[:, p] = (self.product(x) if Kx is None else Kx) * scale - K_removed
        return db, db @ self.kernel if exact else df

    def _direct(self, active, ridge, rhs, rank, careful):
        """Factorise the active rows of every problem -> x, None for K x."""
        x = torch.zeros_like(rhs)
        group, problem = torch.meshgrid(torch.arange(x.shape[0]), torch.arange(x.shape[1]), indexing="ij")
        counts = active.sum(-1).cpu().flatten()
        order = counts.argsort()
        group, problem, counts = group.flatten()[order], problem.flatten()[order], counts[order].tolist()
        start = 0
        while start < len(counts):
            stop = start + 1
            while stop < len(counts) and (stop + 1 - start) * counts[stop] ** 2 <= BLOCK // 256:
                stop += 1
            g, p, size = group[start:stop].to(x.device), problem[start:stop].to(x.device), counts[stop - 1]
            start = stop
            if size == 0:
                continue
            # Active rows first; the shorter ones are filled up with inactive rows that are cut loose.
            index = (~active[g, p]).to(torch.uint8).sort(dim=-1, stable=True).indices[:, :size]  # [q, size]
            on = active[g, p].gather(1, index)
            for kernel in (self.kernel,) if careful else (self.fast, self.kernel):  # float32 may find no factor
                if len(g) == 1:
                    system = kernel[g[0]].index_select(0, index[0]).index_select(1, index[0])[None]
                else:
                    system = kernel[g[:, None, None], index[:, :, None], index[:, None]]
                    system *= on[:, :, None] & on[:, None]
                system.diagonal(dim1=-2, dim2=-1).add_(ridge[g, p].gather(1, index).to(system.dtype))
                factor, failed = torch.linalg.cholesky_ex(system)
                if not failed.any():
                    break
            solution = torch.cholesky_solve(rhs[g, p].gather(1, index)[..., None].to(factor.dtype), factor)
            x[g, p] = torch.zeros_like(x[g, p]).scatter_(1, index, solution[..., 0].double())
        return x, None

    def _conjugate_gradients(self, active, ridge, rhs, rank, careful):
        """Conjugate gradients, preconditioned by the dominant part of K on the active rows -> x, K x."""
        on, ridge, rhs = active.float(), ridge.float(), rhs.float()
        L = self.basis[..., :rank].contiguous()  # [G, n, rank]
        L_T = L.transpose(1, 2).contiguous()
        inverse = on / ridge
        # (D^-1 + L L^T)^-1 = D - D L (1 + L^T D L)^-1 L^T D
        inner = torch.empty(*rhs.shape[:2], rank, rank, device=rhs.device)
        size = max(1, BLOCK // 2 // L.numel())
        for start in range(0, rhs.shape[1], size):
            scaled = inverse[:, start : start + size, None] * L_T[:, None]  # [G, size, rank, n]
            inner[:, start : start + size] = (scaled.flatten(1, 2) @ L).unflatten(1, (-1, rank))
        diagonal = inner.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(1 + 1e-6 * diagonal.amax(-1, keepdim=True))  # a little more, against float32's rounding
        inner = torch.cholesky_inverse(torch.linalg.cholesky(inner))

        def precondition(v):
            v = inverse * v
            return v - inverse * ((inner @ (v @ L)[..., None])[..., 0] @ L_T)

        x, Kx = torch.zeros_like(rhs), torch.zeros_like(rhs)
        residual, z = rhs, precondition(rhs)
        p, rz = z, (rhs * z).sum(-1, keepdim=True)
        goal = FORCING**2 * rz
        for _ in range(200):
            Kp = p @ self.fast
            q = on * Kp + on * ridge * p
            a = torch.where(rz > goal, rz / (p * q).sum(-1, keepdim=True), 0.0)
            x, Kx, residual = x + a * p, Kx + a * Kp, residual - a * q
            z = precondition(residual)
            old, rz = rz, torch.where(rz > goal, (residual * z).sum(-1, keepdim=True), rz)
            if (rz <= goal).all():
                break
            p = z + torch.nan_to_num(rz / old, 0.0, 0.0, 0.0) * p
        return x.double(), Kx.double()


def _line_search(b, f, db, df, t, slope):
    """The step length [..., 1], at most 16, that minimises P along db, where df = K db: the root of an increasing,
    piecewise linear derivative, by Newton's method kept within a bracket.
    """
    quadratic = (db * df).sum(-1, keepdim=True)
    margin, fall, force = 1 - t * f, t * df, slope * t
    # Summed as differences that vanish row by row at the optimum, so that rounding does not hide a small derivative.
    first = ((b - force * margin.clamp(min=0)) * df).sum(-1, keepdim=True).abs()
    noise = 1e-15 * b.abs().sum(-1, keepdim=True) * db.abs().sum(-1, keepdim=True)  # of a df that ought to be 0
    step = torch.ones_like(quadratic)
    low, high = torch.zeros_like(step), torch.full_like(step, 16.0)
    for _ in range(50):
        hinge = (margin - step * fall).clamp_(min=0)
        derivative = ((b + step * db - force * hinge) * df).sum(-1, keepdim=True)
        done = derivative.abs() <= 1e-3 * first + noise
        if done.all():
            break
        low, high = torch.where(derivative < 0, step, low), torch.where(derivative < 0, high, step)
        curvature = quadratic + (slope * fall * fall * (hinge > 0)).sum(-1, keepdim=True)
        new = step - derivative / curvature.clamp(min=1e-300)
        step = torch.where(done, step, torch.where((new > low) & (new < high), new, (low + high) / 2))
    return step
