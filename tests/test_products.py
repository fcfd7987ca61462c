"""Coarse scores stay within their bound; full precision is pinned and given back."""

import subprocess
import sys

import pytest
import torch

from odc import products
from tests.processes import ROOT, environment


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("common, spread", [(0, 1), (5, 1), (1, 1e-4), (0, 1e-12), (0, 1e3)])
def test_the_bound_holds(monkeypatch, dtype, common, spread):
    monkeypatch.setattr(products, "coarse_dtype", lambda device: dtype)
    monkeypatch.setitem(products.PIECES, "cpu", 100)
    generator = torch.Generator().manual_seed(0)
    rows = common + spread * torch.randn(333, 70, generator=generator)
    queries = common + spread * torch.randn(50, 70, generator=generator)
    coarse = products.CoarseScores(rows, multiple=16)
    scores, bound = coarse(queries)
    assert scores.dtype == dtype and scores.shape == (336, 50) and scores[333:].isneginf().all()
    exact = rows.double() @ queries.double().T - queries.double() @ coarse.mean.double()
    error = (scores[:333].double() - exact).abs()
    allowed = bound + coarse.unit * torch.maximum(exact.abs(), scores[:333].double().abs())
    assert (error <= allowed).all()
    if dtype == torch.bfloat16 and spread >= 1:  # and it is of use
        assert error.max() > allowed.max() / 100


def test_full_precision_is_pinned_and_given_back():
    matmul = torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(ZeroDivisionError):
            with products.full_precision():
                assert torch.get_float32_matmul_precision() == "highest"
                assert not matmul.allow_tf32
                assert not matmul.allow_bf16_reduced_precision_reduction
                raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "medium"
        assert matmul.allow_bf16_reduced_precision_reduction
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_variable_with_which_containers_allow_tf32():
    program = ("import torch; from odc.products import full_precision\n"
               "matmul = torch.backends.cuda.matmul\n"
               "before = matmul.allow_tf32\n"
               "with full_precision():\n    print(before, matmul.allow_tf32)\n"
               "print(matmul.allow_tf32)")
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, check=True,
                         env=environment(TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="1"),
                         capture_output=True).stdout
    assert out.split() == ["True", "False", "True"]
