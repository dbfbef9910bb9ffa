"""Which CUDA C++ operations run on their own and which only by name. Needs no GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gradstats import backends, reference
from gradstats.errors import BackendError

HALF = torch.bfloat16


@pytest.fixture
def built(monkeypatch):
    """Pretend that the extension was built with its Hopper part."""
    module = SimpleNamespace(
        build_info={"torch": "0", "cpu_capability": "", "cuda": True},
        multi_sq_norm_cuda=lambda tensors: "norms",
        linear_stats_cuda=lambda *args: "hopper",
        linear_stats=lambda *args: "cpu",
    )
    monkeypatch.setattr(backends, "extension", lambda: (module, "pretended"))
    monkeypatch.setattr(backends, "triton_available", lambda: (True, "pretended"))
    backends._resolve.cache_clear()
    yield module
    backends._resolve.cache_clear()


def test_what_never_ran_is_not_chosen(built):
    assert backends.choose("linear_stats", "cuda", HALF) == "triton"
    assert backends.choose("multi_sq_norm", "cuda", HALF) == "cuda"


def test_by_name(built):
    with backends.use("cuda"):
        assert backends.choose("linear_stats", "cuda", HALF) == "cuda"
        like = SimpleNamespace(device=torch.device("cuda"), dtype=HALF)
        assert backends.implementation("linear_stats", like) is built.linear_stats_cuda
        with pytest.raises(BackendError, match=r"take bfloat16, float16, not torch\.float32"):
            backends.choose("linear_stats", "cuda", torch.float32)


def test_rows_that_are_too_wide_for_a_kernel(built):
    """An automatic choice takes the reference; Triton by name refuses."""
    pytest.importorskip("triton")
    like = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    g, x = torch.randn(2, 2, 3, 8200)
    rstd = x.square().mean(-1).rsqrt()
    args = (None, rstd, None, True, True, False, False)
    found = backends.implementation("layer_norm_stats", like)(g, x, *args)
    true = reference.layer_norm_stats(g, x, *args)
    assert all(map(torch.equal, found, true))
    narrow = backends.implementation("layer_norm_stats", like)
    with pytest.raises(BackendError, match="tensors are on cpu"):  # it came to the kernel
        narrow(g[..., :8], x[..., :8], *args)
    with backends.use("triton"), pytest.raises(BackendError, match="D is 8200"):
        backends.implementation("layer_norm_stats", like)(g, x, *args)


def test_without_the_hopper_part(built):
    """An extension for other GPUs lacks the operation: it stays automatic, as every other one."""
    del built.linear_stats_cuda
    assert "no CUDA kernel" in backends.refusal("cuda", "linear_stats", "cuda", HALF)
    with backends.use("cuda"):
        assert backends.choose("linear_stats", "cuda", HALF) == "triton"
