"""Nearest centroids: an exact search that spends its time in a half-precision product.

A bfloat16 product is several times faster than a float32 one and its error has a bound. Scores from it that lie
further than the bound below a row's best cannot win; only what remains, usually one centroid a row, is looked at in
double precision. So the answer is that of the exact computation, and it depends on the row and the centroids alone:
not on how the rows were cut into blocks, on the number of processes or of threads.
"""

import contextlib

import torch

BLOCK = 1024  # rows scored at a time on a CPU: a multiple of 64, few enough to stay in the caches
GROUP = 20  # centroids whose scores are reduced to their maximum before single scores are looked at


def assign(features, centroids, inner_product=False):
    """The best centroid of every row: [n, d] float, [K, d] float -> int64 [n].

    Best is nearest in Euclidean distance, largest <f, c> - <c, c> / 2, or with inner_product largest <f, c> (as the
    recipe labels images, see odc.memory). Scores are compared in double precision; the lowest index wins ties. A row
    that holds a NaN gets label 0.
    """
    return NearestCentroid(centroids, inner_product)(features)


class NearestCentroid:
    """`assign` with the centroids' part of the work done once: NearestCentroid(centroids)(features)."""

    def __init__(self, centroids, inner_product=False):
        K, d = centroids.shape
        self.centroids = centroids.float()
        self.inner_product = inner_product

        # With m the mean centroid, <f, c> is <f - m, c - m> + <m, c - m> up to a number that all c share. Both
        # differences are short, and so are the errors of their product. The same for - <c, c> / 2.
        self.mean = mean = self.centroids.mean(0)
        centred = self.centroids - mean
        bias = (centred @ mean if inner_product else centred.square().sum(1) / -2).double()

        # The bias rides along as two more columns of the product, its rounded value and the remainder. Rows that fill
        # up the last group never win. Widths that are multiples of 8 suit matrix units.
        dtype = _product_dtype(centroids.device)
        self.coarse = torch.zeros(_round_up(K, GROUP), _round_up(d + 2, 8), dtype=dtype, device=centroids.device)
        self.coarse[:K, :d] = centred
        self.coarse[:K, d] = bias
        self.coarse[:K, d + 1] = bias - self.coarse[:K, d].double()
        self.coarse[K:, d] = -torch.inf

        # What the error bound needs of the centroids. A coarse score is off by the rounding of f - m, of c - m, of the
        # bias, of sums over d products in float32, and of the result (`unit`).
        self.unit = torch.finfo(dtype).eps / 2
        float32 = (d + 4) * 2.0**-23
        self.length = torch.linalg.vector_norm(centred, dim=1).max()
        self.length_error = torch.linalg.vector_norm(self.coarse[:K, :d].float() - centred, dim=1).max()
        self.length_error += float32 * self.length
        self.bias_error = (bias - self.coarse[:K, d : d + 2].double().sum(1)).abs().max().float()
        self.bias_error += float32 * self.length * (mean.norm() if inner_product else self.length)
        self.bias_error += 1e-30  # products below float32's range count as zero

    def __call__(self, features):
        """[n, d] -> int64 [n]."""
        n = len(features)
        labels = torch.zeros(n, dtype=torch.int64, device=features.device)
        # On a GPU a block fills the device: 2^28 scores are half a gigabyte.
        block = BLOCK if features.device.type == "cpu" else max(64, 2**28 // len(self.coarse) // 64 * 64)
        block = min(block, _round_up(max(n, 1), 64))
        rows = self.coarse.new_zeros(block, self.coarse.shape[1])
        rows[:, features.shape[1] : features.shape[1] + 2] = 1
        scores = self.coarse.new_empty(len(self.coarse), block)
        with _float32_accumulation():
            for start in range(0, n, block):
                part = features[start : start + block].float()
                self._assign_block(part, rows[: len(part)], scores[:, : len(part)], labels[start : start + block])
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
        length_error = torch.linalg.vector_norm(centred.sub_(rows[:, :d].float()), dim=1) + 2.0**-23 * length
        error = length_error * self.length + 1.01 * length * self.length_error + self.bias_error
        threshold = best - 2.02 * (error + self.unit * best.abs())

        # Candidates: usually one group a row, and in it one centroid. Of several all are kept, in ascending order.
        group, row = (group_best >= threshold).nonzero(as_tuple=True)
        pair, member = (groups[group, :, row] >= threshold[row, None]).nonzero(as_tuple=True)
        row, cluster = row[pair], group[pair] * GROUP + member
        labels[row] = cluster
        contested = (torch.bincount(row, minlength=len(features)) > 1)[row]
        if contested.any():
            self._decide(features, row[contested], cluster[contested], labels)

    def _decide(self, features, row, cluster, labels):
        """Choose between the candidates: pairs (row, cluster), of which every row has several, ascending in cluster."""
        if len(row) > 16 * len(features):  # hardly a choice: all scores about equal. All of them, for every such row.
            return self._compare_all(features, row.unique(), labels)
        f, c = features.index_select(0, row).double(), self.centroids.index_select(0, cluster).double()
        scores = (f * c).sum(1) if self.inner_product else -f.sub_(c).square_().sum(1)
        best = scores.new_full((len(features),), -torch.inf).scatter_reduce_(0, row, scores, "amax")
        wins = scores == best[row]
        labels[row[wins]] = len(self.centroids)
        labels.scatter_reduce_(0, row[wins], cluster[wins], "amin")

    def _compare_all(self, features, rows, labels):
        """Choose between all centroids, for some rows, by a product in double precision."""
        c = self.centroids.double() - self.mean
        bias = c.square().sum(1) * (0 if self.inner_product else -0.5)
        length = torch.linalg.vector_norm(c, dim=1).max()
        for some in rows.split(256):
            f = features[some].double() - (0 if self.inner_product else self.mean)
            scores = torch.addmm(bias, f, c.T)
            rounding = 2.0**-44 * length * torch.linalg.vector_norm(f, dim=1, keepdim=True)  # less is a tie
            labels[some] = (scores >= scores.amax(1, keepdim=True) - rounding).byte().argmax(1)


def _product_dtype(device):
    """bfloat16 where the device multiplies it in hardware with float32 accumulation, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if fast else torch.float32


@contextlib.contextmanager
def _float32_accumulation():
    """Forbid CUDA to add partial sums of a bfloat16 product in bfloat16, which the error bound does not cover."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def _round_up(number, multiple):
    return -(-number // multiple) * multiple
