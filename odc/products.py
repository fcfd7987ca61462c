"""Inner products whose error is known: in full float32, or in half precision with a bound.

A bfloat16 product is several times faster than a float32 one. An exact search can spend its time in
it all the same, because the error of every score has a bound: what lies below the best scores by
more than twice the bound cannot be among the best, and the little that remains is compared in
double precision.

The bound is small because rows and queries are taken relative to the mean row m, and short vectors
have small rounding errors. Up to a number that all rows share, the inner product <q, r> is
<q - m, r - m> + <m, r - m>, and -|q - r|^2 / 2 is <q - m, r - m> - |r - m|^2 / 2. The second terms
are a bias of the row. It makes two more columns of the product, its rounded value and the
remainder.
"""

import contextlib

import torch

PIECES = {"cpu": 512, "cuda": 16384}  # rows that are prepared at a time


@contextlib.contextmanager
def full_precision():
    """Products in the precision of their factors: no autocast, no TF32, no sums in bfloat16.

    Containers may switch TF32 on by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, and its error is 1e-3.
    """
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision(), matmul.allow_bf16_reduced_precision_reduction
    torch.set_float32_matmul_precision("highest")
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        matmul.allow_bf16_reduced_precision_reduction = before[1]


def coarse_dtype(device):
    """bfloat16 where the device multiplies it in hardware and adds in float32, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if fast else torch.float32


class CoarseScores:
    """Coarse inner products of rows [n, d] with queries: CoarseScores(rows)(queries).

    With euclidean, -|q - r|^2 / 2 takes the place of the inner product. `multiple` fills the rows
    up to a multiple of it; these rows score -inf.
    """

    @full_precision()
    def __init__(self, rows, multiple=1, euclidean=False):
        (n, d), device = rows.shape, rows.device
        dtype = coarse_dtype(device)
        self.unit = torch.finfo(dtype).eps / 2  # relative error of rounding to dtype
        self.mean = rows.mean(0, dtype=torch.float32)
        # Widths that are multiples of 8 suit matrix units.
        self.rows = torch.zeros(-(-n // multiple) * multiple, -(-(d + 2) // 8) * 8,
                                dtype=dtype, device=device)
        self.rows[n:, d] = -torch.inf
        accumulation = (d + 4) * 2.0**-23  # relative error of a sum of d products in float32
        length = length_error = bias_error = torch.zeros((), device=device)
        size = PIECES[device.type]
        for part, coarse in zip(rows.split(size), self.rows[:n].split(size)):
            centred = part.float() - self.mean
            bias = centred.square().sum(1) / -2 if euclidean else centred @ self.mean
            bias = bias.double()
            coarse[:, :d] = centred
            coarse[:, d] = bias
            coarse[:, d + 1] = bias - coarse[:, d].double()
            lost = bias - coarse[:, d : d + 2].double().sum(1)
            bias_error = torch.maximum(bias_error, lost.abs().max().float())
            length = torch.maximum(length, _length(centred).max())
            rounding = _length(centred - coarse[:, :d].float())
            length_error = torch.maximum(length_error, rounding.max())
        self.length, self.length_error = length, length_error + accumulation * length
        self.bias_error = bias_error + accumulation * length * (
            length if euclidean else self.mean.norm()) + 1e-30  # below float32's range

    @full_precision()
    def __call__(self, queries):
        """Scores [n, q] and bounds [q] for queries [q, d] float32.

        The true score differs by the query's bound and `unit` of the score, at most. True scores
        are less by a number that a query's scores share, <q, m> for the inner product.
        """
        d = queries.shape[1]
        coarse = self.rows.new_zeros(len(queries), self.rows.shape[1])
        centred = queries - self.mean
        coarse[:, :d] = centred
        coarse[:, d : d + 2] = 1
        length = _length(centred)
        rounding = _length(centred - coarse[:, :d].float()) + 2.0**-23 * length
        error = rounding * self.length + 1.01 * length * self.length_error + self.bias_error
        return self.rows @ coarse.T, error


def _length(vectors):
    return torch.linalg.vector_norm(vectors, dim=1)
