"""The best centroid of every row: exact, though half precision does most of it.

1. `odc.products` gives a coarse score of every row with every centroid. A centroid whose score lies
   below the row's best by more than twice the bound cannot be the best one. Scores are first
   reduced to the maximum of each GROUP of centroids: one pass finds the few groups that matter.
2. The centroids that remain, usually one a row, are compared in double precision.

So the answer depends on the row and the centroids alone, not on blocks, processes or threads, but
where two scores differ by the rounding of double precision alone. A GPU compares up to 4,096 rows
with all centroids in double precision, without the first step.
"""

import torch

from odc.products import CoarseScores

BLOCK = 1024  # rows scored at a time on a CPU: few enough to stay in the caches
GROUP = 20  # centroids whose scores are first reduced to their maximum


def nearest_centroids(features, centroids, inner_product=False):
    """The best centroid of every row: [n, d] float, [K, d] float -> int64 [n].

    Best means nearest in Euclidean distance. With inner_product it is the largest <f, c>, as the
    recipe labels images. The lowest index wins ties. A row that holds a NaN gets label 0.
    """
    return NearestCentroid(centroids, inner_product)(features)


class NearestCentroid:
    """`nearest_centroids` for several calls: NearestCentroid(centroids)(features).

    The centroids are prepared at the first call.
    """

    def __init__(self, centroids, inner_product=False):
        self.centroids, self.inner_product, self.coarse = centroids.float(), inner_product, None

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
            self.coarse = CoarseScores(self.centroids, GROUP, euclidean=not self.inner_product)
        block = BLOCK
        if device.type == "cuda":  # half a gigabyte of scores or of rows fills the device
            block = max(64, min(2**28 // len(self.centroids), 2**27 // d))
        for rows, own in zip(features.split(block), labels.split(block)):
            self._assign_block(rows.float(), own)
        return labels

    def _assign_block(self, features, labels):
        scores, error = self.coarse(features)  # [K, n], [n]
        groups = scores.unflatten(0, (-1, GROUP))  # [K / GROUP, GROUP, n]
        group_best = groups.amax(1).float()
        best = group_best.amax(0)
        threshold = best - 2.02 * (error + self.coarse.unit * best.abs())

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
