"""The Triton kernels compiled and run on a card: they are what an automatic choice takes there.

Skipped elsewhere. Every check that the interpreter runs, and what only a card can show: capture,
streams, other devices, no wait for the host, tensors past 2³¹ bytes that are really there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from interpreted import run_checks
from models import loss
from oracle import assert_matches, per_sample_gradients
from torch import nn

import gradstats
from gradstats import backends
from gradstats.ops import ops

ready = torch.cuda.is_available() and backends.triton_available()[0]
pytestmark = pytest.mark.skipif(not ready, reason="needs a GPU and Triton")
HERE = Path(__file__).parent
CHECKED = sorted(f for f in HERE.glob("test_kernels_*.py") if "run_checks" in f.read_text())


@pytest.mark.parametrize("file", CHECKED, ids=lambda f: f.stem)
def test_what_the_interpreter_checks(file):
    run_checks(str(file), device="cuda")


def normal(*shape: int, dtype=torch.bfloat16, device="cuda") -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype)


def calls(device="cuda"):
    """(operation, arguments) by name: every kernel, and every path of the linear one."""
    x, g = normal(4, 96, 256, device=device), normal(4, 96, 192, device=device)
    image, out = normal(4, 32, 14, 14, device=device), normal(4, 48, 14, 14, device=device)
    ids = torch.randint(50, (4, 96), device=device)
    mean, rstd = x.float().mean(-1), x.float().square().mean(-1).rsqrt()
    scale = normal(256, device=device)
    where = ([3, 3], [1, 1], [1, 1], [1, 1], 1, True, True)
    return {
        "fused": (ops.linear_stats, (x, g, True, True, True)),
        "gram": (ops.linear_stats, (x[:, :12], g[:, :12], True, True, False)),
        "rank one": (ops.linear_stats, (x[:, :1], g[:, :1], True, True, True)),
        "convolution": (ops.conv_stats, (image, out, *where, True)),
        "layer norm": (ops.layer_norm_stats, (x, x, mean, rstd, scale, True, True, True, True)),
        "embedding": (ops.embedding_stats, (ids, x, 50, -1, True)),
        "tied": (ops.tied_cross, (ids, x, normal(4, 96, 50, device=device), x)),
    }


NAMES = ("fused", "gram", "rank one", "convolution", "layer norm", "embedding", "tied")


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


@pytest.fixture
def triton():
    with backends.use("triton"):
        yield


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("name", NAMES)
def test_captured_on_a_stream_of_its_own(name):
    op, args = calls()[name]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = as_tuple(op(*args))  # also compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = as_tuple(op(*args))
    for t in captured:
        t.fill_(float("nan"))
    graph.replay()
    torch.testing.assert_close(captured, expected)  # the library's products may take other paths


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_host(name):
    op, args = calls()[name]
    op(*args)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("triton")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    for op, args in calls("cuda:1").values():
        assert all(t.device.index == 1 for t in as_tuple(op(*args)))
        torch.cuda.synchronize(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_squared_norms_where_the_extension_has_no_cuda_part(dtype):
    tensors = [normal(*s, dtype=dtype) for s in ((300, 1000), (0,), (7,), ())]
    with backends.use("reference"):
        found = ops.multi_sq_norm(tensors)
    true = torch.stack([t.double().square().sum() for t in tensors])
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ((found - true).abs() <= 1e-6 * true).all()


@pytest.mark.usefixtures("triton")
def test_long_samples_of_tied_weights():
    """262144 tiles of a sample: more than a grid's second dimension takes."""
    t, d, rows = 2**15, 16, 64
    ids = torch.randint(rows, (1, t), device="cuda")
    e, h, a = normal(1, t, d), normal(1, t, rows), normal(1, t, d)
    found = ops.tied_cross(ids, e, h, a)
    rows_of_e = torch.zeros(rows, d, device="cuda", dtype=torch.float64)
    rows_of_e.index_add_(0, ids[0], e[0].double())
    true = ((h[0].double().t() @ a[0].double()) * rows_of_e).sum()
    size = ((h[0].double().abs().t() @ a[0].double().abs()) * rows_of_e.abs()).sum()
    assert abs(float(found) - float(true)) <= 1e-5 * float(size)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("moments", [False, True])
def test_more_elements_than_31_bits_count(moments):
    """x of 2³¹ + elements, through descriptors: the last sample is where 32 bits do not reach."""
    batch, t, i, o = 33, 8192, 8192, 64
    x = torch.empty(batch, t, i, device="cuda", dtype=torch.bfloat16).normal_()
    g = normal(batch, t, o)
    assert x.numel() > 2**31
    found = ops.linear_stats(x, g, True, False, moments)
    for b in (0, batch - 1):
        true = (g[b].float().t() @ x[b].float()).double().square().sum()
        assert abs(float(found[2][b]) / float(true) - 1) <= 2e-3
    dw = torch.einsum("bto,bti->oi", g, x).float()
    assert float((found[0].float() - dw).norm() / dw.norm()) <= 2**-7


class Small(nn.Module):
    """A layer for each kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(31, 48)
        self.conv = nn.Conv1d(48, 64, 3, padding=1)
        self.group = nn.GroupNorm(8, 64)
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.group(self.conv(self.table(ids).transpose(1, 2))).transpose(1, 2)
        return self.down(F.gelu(self.up(self.norm(h))))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model(compiled, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    model = Small().cuda()
    ids = torch.randint(31, (6, 40), device="cuda")
    true = per_sample_gradients(model, loss, ids)
    monitor = gradstats.attach(model)
    loss(torch.compile(model) if compiled else model, ids).backward()
    assert_matches(monitor.step(), true, 1e-5)


def test_bfloat16_under_autocast():
    """Norms of gradients that are themselves rounded: against the reference backend's."""
    torch.manual_seed(0)
    model, ids = Small().cuda(), torch.randint(31, (6, 40), device="cuda")
    found = {}
    for name in ("triton", "reference"):
        with backends.use(name), gradstats.attach(model) as monitor:
            with torch.autocast("cuda", torch.bfloat16):
                value = loss(model, ids)
            value.backward()
            found[name] = monitor.step().per_sample_sq_norm
            model.zero_grad()
    a, b = found["triton"].double(), found["reference"].double()
    assert float(((a - b).abs() / b).max()) <= 1e-2
