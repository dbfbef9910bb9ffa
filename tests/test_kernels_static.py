"""What the compiler makes of the Triton kernels, read without a GPU, and what plans them."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

PATH = Path(__file__).parents[1] / "bench" / "static_table.py"
spec = importlib.util.spec_from_file_location("static_table", PATH)
table = importlib.util.module_from_spec(spec)
sys.modules["static_table"] = table
spec.loader.exec_module(table)

# float16 compiles to bfloat16's code but for the opcode's type; the table in bench/ has it.
# A Gram of many samples takes as many registers as one of few, but for one or two: see the table.
CASES = [c for c in table.all_cases() if "fp16" not in c[0] and "many samples" not in c[0]]
built: dict[tuple[object, int], object] = {}


def build(launch, arch):
    key = (table.identity(launch), arch)
    if key not in built:
        built[key] = table.build(launch, arch)
    return built[key]


@pytest.mark.parametrize(("name", "call"), CASES, ids=[c[0] for c in CASES])
def test_sm_90(name, call):
    launches = table.launches_of(call)
    assert launches
    for launch in launches:
        made = build(launch, 90)
        assert not made.spills, (launch.kernel.__name__, made)
        assert made.shared <= table.SHARED_LIMIT[90]
        threads = launch.num_warps * 32
        assert made.registers * threads <= 65536
        dots = ("_fused_kernel", "_conv_kernel", "_cross_kernel", "_conv_gram_kernel")
        whole = "T=16" not in name  # 16 rows are too few for a warpgroup
        if launch.kernel.__name__ in dots and "bf16" in name and whole:
            assert made.opcodes["HGMMA"], "no wgmma"
            assert made.opcodes["UTMALDG" if "fused" in name else "LDGSTS"] or "pointers" in name
            assert made.opcodes["LDGSTS"] or made.opcodes["UTMALDG"], "no asynchronous copies"


SM_80 = [c for c in table.all_cases(80) if "fused 128" in c[0] or "128→128" in c[0]]
SM_80 = [c for c in SM_80 if "bf16" in c[0]]


@pytest.mark.parametrize(("name", "call"), SM_80, ids=[c[0] for c in SM_80])
def test_sm_80(name, call):
    """What fills the registers there; the smaller tiles are in the table."""
    for launch in table.launches_of(call, 80):
        made = build(launch, 80)
        assert not made.spills, (launch.kernel.__name__, made)
        assert made.shared <= table.SHARED_LIMIT[80]


def test_the_reader_sees_spills():
    """A tile that cannot fit in registers must be reported."""
    x = torch.empty(8, 64, 768, dtype=torch.bfloat16, device="meta")
    c = table.linear_config.Config("fused", 128, 128, 16, 4, 1)
    (launch,) = table.launches_of(lambda: table.linear_stats.weight_stats(x, x, True, c))
    assert build(launch, 90).spills


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize(("arch", "opcode"), [(100, "UTCHMMA"), (120, "HMMA")])
def test_other_architectures(arch, opcode, moments):
    """The tile that fills the registers there; the others are in the table."""
    x = torch.empty(8, 64, 768, dtype=torch.bfloat16, device="meta")
    c = table.linear_config.fused_tile(64, False, x.dtype, moments, arch)
    (launch,) = table.launches_of(lambda: table.linear_stats.weight_stats(x, x, moments, c))
    made = build(launch, arch)
    assert not made.spills
    assert made.opcodes[opcode]
    assert made.shared <= table.SHARED_LIMIT[arch]


def test_sm_100_small_tiles():
    """What spilled there: parts of samples in float32, inputs that no descriptor can describe."""
    c = table.linear_config.fused_tile(64, False, torch.float32, False, 100)
    parts = replace(c, schedule=table.Schedule(200, 1, parts=True))
    apart = table.linear_config.fused_tile(64, True, torch.bfloat16, False, 100, described=False)
    for c, dtype in ((parts, torch.float32), (apart, torch.bfloat16)):
        x = torch.empty(8, 64, 768, dtype=dtype, device="meta")
        launches = table.launches_of(
            lambda x=x, c=c: table.linear_stats.weight_stats(x, x, False, c), 100
        )
        assert not build(launches[0], 100).spills


@pytest.mark.parametrize(("i", "o"), [(770, 768)])
def test_odd_widths_keep_asynchronous_copies(i, o):
    x = torch.empty(8, 64, i, dtype=torch.bfloat16, device="meta")
    g = torch.empty(8, 64, o, dtype=torch.bfloat16, device="meta")
    c = table.linear_config.Config("fused", 128, 128, 64, 8, 4)
    (launch,) = table.launches_of(lambda: table.linear_stats.weight_stats(x, g, False, c))
    made = build(launch, 90)
    assert made.opcodes["LDGSTS"]
    assert not made.opcodes["LDG"]
    assert not made.spills


def test_config_stays_within_all_configs():
    from gradstats.kernels.linear_config import all_configs, config

    known = set(all_configs())
    sizes = (1, 2, 7, 16, 100, 768, 3000, 50257)
    for batch, t, i, o in itertools.product((1, 2, 13, 64), (1, 2, 17, 33, 64, 1024), sizes, sizes):
        for dtype, moments in itertools.product((torch.float32, torch.bfloat16), (False, True)):
            c = config(batch, t, i, o, dtype, moments)
            assert (c.schedule is not None) == (c.path == "fused")
            assert (dtype, moments, replace(c, schedule=None)) in known


def test_config_chooses_by_cost():
    from gradstats.kernels.linear_config import config

    bf16 = torch.bfloat16
    assert config(64, 1, 768, 768, bf16, False).path == "rank_one"
    assert config(64, 16, 768, 768, bf16, False).path == "gram"
    assert config(64, 16, 768, 768, bf16, True).path == "fused"  # the Gram has no elements
    assert config(32, 256, 4096, 4096, bf16, False).path == "gram"  # reads less out of L2
    assert config(32, 256, 4096, 4096, bf16, False, 108, 80).path == "fused"
    assert config(8, 2048, 4096, 4096, bf16, False).path == "fused"
    assert config(16, 1024, 768, 768, bf16, False).path == "fused"
    assert not config(16, 1024, 768, 50257, bf16, False).schedule.share  # tiles enough
    assert config(16, 1024, 768, 768, bf16, False).schedule.share
    assert config(1, 8192, 768, 768, bf16, False).schedule.parts
    # Short work is not worth joining.
    assert not config(32, 64, 1024, 1024, bf16, True).schedule.share


def test_grids_fit_a_card():
    """Programs beyond 65535 fit in the first dimension alone; longer samples than most are."""

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    long, rows, ids = meta(2, 2**15, 64), meta(70_000, 2, 64), meta(2, 2**15, dtype=torch.int64)
    calls = {
        "tied cross": lambda: table.tied_cross.tied_cross(ids, long, meta(2, 2**15, 9), long),
        "linear, long": lambda: table.linear_stats.linear_stats(long, long, True, False, True),
        "linear, rows": lambda: table.linear_stats.linear_stats(rows, rows, True, False, False),
        "embedding": lambda: table.embedding_stats.embedding_stats(ids, long, 2**20, -1, True),
        "layer norm": lambda: table.layer_norm_stats.layer_norm_stats(
            rows, rows, None, rows[..., 0], None, True, True, False, False
        ),
    }
    for name, call in calls.items():
        for launch in table.launches_of(call):
            assert max((1, *launch.grid[1:])) < 2**16, (name, launch.grid)
            assert launch.grid[0] < 2**31, (name, launch.grid)


@pytest.mark.parametrize("module", ["gradstats.kernels", "gradstats.kernels.linear_config"])
def test_import_is_light(module):
    code = f"import sys, {module}; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_descriptors_where_the_layout_allows():
    x = torch.empty(4, 6, 24, dtype=torch.bfloat16)
    assert table.linear_stats.describable(x)
    assert table.linear_stats.describable(x[:, 1:, :20])
    assert not table.linear_stats.describable(x.float())
    assert not table.linear_stats.describable(x[..., 1:])  # not in steps of 16 bytes
    assert not table.linear_stats.describable(x[..., ::2])
    assert not table.linear_stats.describable(x.transpose(1, 2))
    assert not table.linear_stats.describable(x[:1].expand(4, 6, 24))
    from gradstats.kernels.linear_config import config

    for arch, there in ((80, False), (90, True), (100, True), (120, False)):
        assert config(8, 1024, 768, 768, torch.bfloat16, False, 132, arch).described == there


def test_cpu_tensors_are_refused():
    from gradstats.errors import BackendError

    x = torch.randn(2, 3, 4)
    with pytest.raises(BackendError, match=r"tensors are on cpu.*TRITON_INTERPRET=1"):
        table.linear_stats.linear_stats(x, x, True, False, False)
