"""The best centroid of every row: an exact search that spends its time in a half-precision product.

A bfloat16 product is several times faster than a float32 one, and its error has a bound. The search
has two steps:

1. A bfloat16 product gives a coarse score of every row with every centroid. A centroid whose coarse
   score lies below the row's best by more than the bound cannot be the best one.
2. The centroids that remain, usually one a row, are compared in double precision.

So the answer is that of the double-precision search. It depends on the row and the centroids alone,
not on the blocks, the number of processes or the number of threads.

Two tricks make the bound tight. Rows and centroids are taken relative to the mean centroid m, as
<f, c> is <f - m, c - m> + <m, c - m> up to a number that all centroids share, and short vectors
have small errors. And scores are first reduced to the maximum of each GROUP of centroids, so that
one pass over the product finds the few groups that matter.
"""

import contextlib

import torch

BLOCK = 1024  # rows scored at a time on a CPU: a multiple of 64, few enough to stay in the caches
GROUP = 20  # centroids whose scores are first reduced to their maximum


def assign(features, centroids, inner_product=False):
    """The best centroid of every row: [n, d] float, [K, d] float -> int64 [n].

    Best means nearest in Euclidean distance, which is the largest <f, c> - <c, c> / 2. With
    inner_product it is the largest <f, c>, as the recipe labels images. The lowest index wins ties.
    A row that holds a NaN gets label 0.
    """
    return NearestCentroid(centroids, inner_product)(features)


class NearestCentroid:
    """`assign` for centroids that serve several calls: NearestCentroid(centroids)(features).

    The centroids are prepared at the first call.
    """

    def __init__(self, centroids, inner_product=False):
        self.centroids, self.inner_product, self.coarse = centroids.float(), inner_product, None

    def _prepare(self):
        K, d = self.centroids.shape
        self.mean = mean = self.centroids.mean(0)
        centred = self.centroids - mean
        bias = centred @ mean if self.inner_product else centred.square().sum(1) / -2
        bias = bias.double()

        # The bias makes two more columns of the product: its rounded value and the remainder. Rows
        # that fill up the last group never win. Widths that are multiples of 8 suit matrix units.
        dtype = _product_dtype(centred.device)
        width = _round_up(d + 2, 8)
        self.coarse = torch.zeros(_round_up(K, GROUP), width, dtype=dtype, device=centred.device)
        self.coarse[:K, :d] = centred
        self.coarse[:K, d] = bias
        self.coarse[:K, d + 1] = bias - self.coarse[:K, d].double()
        self.coarse[K:, d] = -torch.inf

        # What the error bound needs of the centroids. A coarse score errs by the rounding of f - m,
        # of c - m, of the bias, of sums of d products in float32, and of the result (`unit`).
        self.unit = torch.finfo(dtype).eps / 2
        float32 = (d + 4) * 2.0**-23
        self.length = torch.linalg.vector_norm(centred, dim=1).max()
        rounding = self.coarse[:K, :d].float() - centred
        self.length_error = torch.linalg.vector_norm(rounding, dim=1).max() + float32 * self.length
        self.bias_error = (bias - self.coarse[:K, d : d + 2].double().sum(1)).abs().max().float()
        self.bias_error += float32 * self.length * (
            mean.norm() if self.inner_product else self.length)
        self.bias_error += 1e-30  # products below the range of float32 count as zero

    def __call__(self, features):
        """[n, d] -> int64 [n]."""
        (n, d), device = features.shape, features.device
        labels = torch.zeros(n, dtype=torch.int64, device=device)
        if device.type == "cuda" and n <= 4096:
            # A GPU multiplies so few rows in double precision sooner than it tells the CPU how many
            # centroids remain after step 1. Nothing here makes the CPU wait.
            self._compare_all(features, torch.arange(n, device=device), labels)
            return labels
        if self.coarse is None:
            self._prepare()
        block = BLOCK
        if device.type == "cuda":  # half a gigabyte of scores or of rows fills the device
            block = max(64, min(2**28 // len(self.coarse), 2**27 // d) // 64 * 64)
        block = min(block, _round_up(max(n, 1), 64))
        rows = self.coarse.new_zeros(block, self.coarse.shape[1])
        rows[:, d : d + 2] = 1
        scores = self.coarse.new_empty(len(self.coarse), block)
        with _float32_accumulation():
            for start in range(0, n, block):
                part = features[start : start + block].float()
                self._assign_block(part, rows[: len(part)], scores[:, : len(part)],
                                   labels[start : start + block])
        return labels

    def _assign_block(self, features, rows, scores, labels):
        d = features.shape[1]
        centred = features - self.mean
        rows[:, :d] = centred
        torch.mm(self.coarse, rows.T, out=scores)
        groups = scores.unflatten(0, (-1, GROUP))  # [K / GROUP, GROUP, n]
        group_best = groups.amax(1).float()
        best = group_best.amax(0)
        length = torch.linalg.vector_norm(centred, dim=1)
        length_error = torch.linalg.vector_norm(centred.sub_(rows[:, :d].float()), dim=1)
        length_error += 2.0**-23 * length
        error = length_error * self.length + 1.01 * length * self.length_error + self.bias_error
        threshold = best - 2.02 * (error + self.unit * best.abs())

        # Usually one group a row remains, and in it one centroid. All are kept, in ascending order.
        group, row = (group_best >= threshold).nonzero(as_tuple=True)
        pair, member = (groups[group, :, row] >= threshold[row, None]).nonzero(as_tuple=True)
        row, cluster = row[pair], group[pair] * GROUP + member
        labels[row] = cluster
        contested = (torch.bincount(row, minlength=len(features)) > 1)[row]
        self._decide(features, row[contested], cluster[contested], labels)

    def _decide(self, features, row, cluster, labels):
        """Choose among several centroids a row: pairs (row, cluster), ascending in cluster."""
        if len(row) > 16 * len(features):  # about all scores are equal: compare with all centroids
            return self._compare_all(features, row.unique(), labels)
        f = features.index_select(0, row).double()
        c = self.centroids.index_select(0, cluster).double()
        scores = (f * c).sum(1) if self.inner_product else -f.sub_(c).square_().sum(1)
        best = scores.new_full((len(features),), -torch.inf).scatter_reduce_(0, row, scores, "amax")
        wins = scores == best[row]
        labels[row[wins]] = len(self.centroids)
        labels.scatter_reduce_(0, row[wins], cluster[wins], "amin")

    def _compare_all(self, features, rows, labels):
        """Choose among all centroids, for some rows, by a product in double precision."""
        mean = self.centroids.double().mean(0)
        c = self.centroids.double() - mean
        bias = c.square().sum(1) * (0 if self.inner_product else -0.5)
        length = torch.linalg.vector_norm(c, dim=1).max()
        for some in rows.split(max(64, 2**22 // len(c))):
            f = features[some].double() - (0 if self.inner_product else mean)
            scores = torch.addmm(bias, f, c.T)
            rounding = 2.0**-44 * length * torch.linalg.vector_norm(f, dim=1, keepdim=True)
            tied = scores >= scores.amax(1, keepdim=True) - rounding
            labels[some] = tied.byte().argmax(1)


def _product_dtype(device):
    """bfloat16 where the device multiplies it in hardware and adds in float32, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if fast else torch.float32


@contextlib.contextmanager
def _float32_accumulation():
    """Keep CUDA from adding partial sums of a bfloat16 product in bfloat16, past the bound."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def _round_up(number, multiple):
    return -(-number // multiple) * multiple
