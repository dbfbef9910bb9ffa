"""The CUDA C++ kernels on a Hopper GPU, against the reference in float64. Skipped elsewhere."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from gradstats import backends, reference

hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
built = hasattr(backends.extension()[0], "linear_stats_cuda")
pytestmark = pytest.mark.skipif(not (hopper and built), reason="needs a Hopper GPU and its kernels")

SHAPES = [  # (B, T, I, O)
    (1, 16, 64, 64), (2, 64, 192, 128), (3, 64, 192, 256), (5, 65, 200, 136), (7, 197, 768, 384),
    (4, 1, 64, 72), (33, 3, 129, 257), (2, 1000, 1024, 512), (64, 128, 256, 256), (9, 512, 24, 40),
    (6, 300, 400, 1160), (1, 4096, 384, 2048),
]  # fmt: skip
FIRST = """
import torch
from gradstats import backends
module, _ = backends.extension()
x, g = (torch.randn(3, 130, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
for moments in (False, True):
    module.linear_stats_cuda(x, g, True, True, moments)
    torch.cuda.synchronize()
"""


@pytest.fixture(scope="module", autouse=True)
def returns():
    """Barriers that nobody completes would hang: ask once, in a process that can be given up."""
    if hopper and built:
        subprocess.run([sys.executable, "-c", FIRST], timeout=120, check=True)


def inputs(shape, dtype):
    batch, len_t, len_i, len_o = shape
    torch.manual_seed(1)
    x = torch.randn(batch, len_t, len_i, device="cuda", dtype=dtype)
    g = torch.randn(batch, len_t, len_o, device="cuda", dtype=dtype)
    return x, g


def compare(x, g, moments, tolerance=2e-3):
    module, _ = backends.extension()
    found = module.linear_stats_cuda(x, g, True, True, moments)
    again = module.linear_stats_cuda(x, g, True, True, moments)
    true = reference.linear_stats(x.double(), g.double(), True, True, moments)
    names = ("dw", "db", "w_sq_norm", "b_sq_norm", "w_m2", "b_m2")
    for name, a, b, c in zip(names, found, true, again, strict=True):
        assert a.shape == b.shape, name
        assert torch.equal(a, c), f"{name} differs between runs"
        if b.numel():
            limit = 2**-7 if name in ("dw", "db") else tolerance
            error = float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-300))
            assert error <= limit, (name, error)


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_stats(shape, dtype, moments):
    compare(*inputs(shape, dtype), moments)


def test_samples_that_are_nearly_alike():
    x, g = inputs((32, 256, 256, 256), torch.bfloat16)
    compare(x[:1].expand(32, -1, -1).contiguous(), g[:1] + g * 2**-6, True)


@pytest.mark.parametrize("moments", [False, True])
def test_any_strides(moments):
    x, g = inputs((6, 70, 264, 136), torch.bfloat16)
    compare(x[..., 1:], g, moments)
    compare(x.transpose(0, 1).contiguous().transpose(0, 1), g, moments)
    compare(x, g[:, :1].expand(-1, 70, -1), moments)
    compare(x[::2], g[::2], moments)


def test_no_positions():
    x, g = inputs((3, 4, 16, 8), torch.bfloat16)
    compare(x[:, :0], g[:, :0], True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_multi_dot(dtype):
    sizes = (0, 1, 3, 31, 4096, 32768, 100_003, 1_000_000)
    torch.manual_seed(2)
    a = [torch.randn(n + 1, device="cuda").to(dtype) for n in sizes]
    b = [torch.randn(n + 1, device="cuda").to(dtype) for n in sizes]
    for shift in (0, 1):  # aligned alike, and not
        left, right = [t[: len(t) - 1] for t in a], [t[shift : len(t) - 1 + shift] for t in b]
        found = backends.extension()[0].multi_dot_cuda(left, right)
        for p, q, out in zip(left, right, found, strict=True):
            scale = float((p.double() * q.double()).abs().sum()) or 1.0
            assert abs(float(out) - float((p.double() * q.double()).sum())) <= 1e-6 * scale
        assert torch.equal(found, backends.extension()[0].multi_dot_cuda(left, right))


@pytest.mark.parametrize("count", [3, 121, 1003])  # the small table, the large one, two of them
def test_multi_sq_norm(count):
    """Lengths that are no multiple of anything, any alignment, empty ones, all dtypes at once."""
    torch.manual_seed(3)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    tensors = [
        torch.randn(37 * i % 5000 + i % 4, device="cuda").to(dtypes[i % 3])[i % 4 :]
        for i in range(count)
    ]
    tensors[1] = torch.randn(300, 1001, device="cuda").t()  # several chunks, strides
    found = backends.extension()[0].multi_sq_norm_cuda(tensors)
    true = torch.stack([t.double().square().sum() for t in tensors])
    assert ((found.double() - true).abs() <= 1e-6 * true).all()
    assert torch.equal(found, backends.extension()[0].multi_sq_norm_cuda(tensors))


def test_captured_on_a_stream_of_its_own():
    module, _ = backends.extension()
    x, g = inputs((5, 200, 384, 264), torch.bfloat16)
    runs = (
        lambda: module.linear_stats_cuda(x, g, True, True, True),
        lambda: (module.multi_sq_norm_cuda([x, g]), module.multi_dot_cuda([x], [x])),
        lambda: (module.rank_one_sq_norm_cuda(x[:, 0], g[:, 0]),),
    )
    for run in runs:
        expected = run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for t in captured:
            t.fill_(float("nan"))
        graph.replay()
        assert all(map(torch.equal, captured, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    x, g = (t.to("cuda:1") for t in inputs((5, 200, 384, 264), torch.bfloat16))
    compare(x, g, True)
    assert backends.extension()[0].multi_sq_norm_cuda([x, g]).device.index == 1


@pytest.mark.parametrize("moments", [False, True])
def test_more_elements_than_31_bits_count(moments):
    batch, len_t, len_i, len_o = 33, 8192, 8192, 64
    x = torch.empty(batch, len_t, len_i, device="cuda", dtype=torch.bfloat16).normal_()
    g = torch.randn(batch, len_t, len_o, device="cuda").bfloat16()
    assert x.numel() > 2**31
    found = backends.extension()[0].linear_stats_cuda(x, g, True, False, moments)
    for b in (0, batch - 1):
        true = (g[b].float().t() @ x[b].float()).double().square().sum()
        assert abs(float(found[2][b]) / float(true) - 1) <= 2e-3


def test_beside_other_work():
    """Fewer clusters at once than were counted on: blocks that come later find their work."""
    x, g = inputs((9, 512, 1024, 1024), torch.bfloat16)
    module, _ = backends.extension()
    expected = module.linear_stats_cuda(x, g, True, False, True)
    side, a = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(20):
            a = a @ a / 64
    found = [module.linear_stats_cuda(x, g, True, False, True) for _ in range(10)]
    torch.cuda.synchronize()
    for again in found:
        assert all(map(torch.equal, again, expected))
