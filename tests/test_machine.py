"""What a machine offers: memory and processors within control groups, and what limits a training."""

from __future__ import annotations

import pytest
import torch

from gradstats.machine import Gpu, Machine, available_bytes, cpu_quota, machine, memory_limit


def test_available_memory_respects_control_groups(tmp_path) -> None:
    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", "MemTotal:  9000 kB\nMemAvailable:    8000 kB\n")
    assert available_bytes(tmp_path) == 8000 * 1024
    write("proc/self/cgroup", "0::/a/b\n")
    write("sys/fs/cgroup/a/b/memory.max", "max\n")
    assert available_bytes(tmp_path) == 8000 * 1024
    write("sys/fs/cgroup/a/memory.max", "3000000\n")  # of the group above
    write("sys/fs/cgroup/a/memory.current", "1000000\n")
    write("sys/fs/cgroup/a/memory.stat", "anon 5\ninactive_file 200000\n")
    assert available_bytes(tmp_path) == 2_200_000
    write("proc/self/cgroup", "4:cpu,memory:/elsewhere\n0::/\n")  # version 1, the path of the host
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "500000\n")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "400000\n")
    assert available_bytes(tmp_path) == 100_000


def test_limits_of_control_groups(tmp_path) -> None:
    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    assert (available_bytes(tmp_path), memory_limit(tmp_path), cpu_quota(tmp_path)) == (None,) * 3
    write("proc/meminfo", "MemTotal:  9000 kB\nMemAvailable:    8000 kB\nHugePages_Total:  0\n")
    write("proc/self/cgroup", "0::/a/b\n")
    write("sys/fs/cgroup/a/memory.max", "3000000\n")
    write("sys/fs/cgroup/a/b/memory.max", "4000000\n")
    write("sys/fs/cgroup/a/b/cpu.max", "150000 100000\n")
    write("sys/fs/cgroup/a/cpu.max", "max 100000\n")
    assert (memory_limit(tmp_path), cpu_quota(tmp_path)) == (3_000_000, 1.5)
    write("sys/fs/cgroup/a/memory.max", "99000000\n")  # above what the machine has
    write("sys/fs/cgroup/a/b/memory.max", "max\n")
    assert memory_limit(tmp_path) is None
    write("proc/self/cgroup", "4:cpu,cpuacct:/elsewhere\n3:memory:/x\n")
    write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "50000\n")
    write("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert cpu_quota(tmp_path) == 0.5
    write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    assert cpu_quota(tmp_path) is None


def test_this_machine() -> None:
    found = machine()
    assert found.threads == torch.get_num_threads()
    assert found.cores >= 1
    assert found.memory_bytes is None or found.memory_bytes > 2**28
    assert found.available_bytes is None or found.available_bytes <= found.memory_bytes
    assert found.to_dict()["gpus"] == tuple(g.__dict__ for g in found.gpus)


PLAIN = {
    "cores": 8, "usable_cores": 8, "cpu_quota": None, "threads": 8, "memory_bytes": 64 * 10**9,
    "available_bytes": 50 * 10**9, "memory_limit": None, "gpus": (Gpu("H100", 80 * 10**9, 79 * 10**9),),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"threads": 2}, "torch computes with 2 of 8 cores"),
        (
            {"threads": 8, "usable_cores": 4},
            "torch computes with 8 threads on 4 cores, which slows it",
        ),
        ({"cpu_quota": 1.5, "threads": 1}, "a quota of 1.5 of 8 cores' time"),
        ({"memory_limit": 8 * 10**9}, "a limit of 8 GB of 64 GB memory"),
        ({"gpus": ()}, "no GPU that this torch can use"),
        ({"gpus": (Gpu("H100", 80 * 10**9, 30 * 10**9),)}, "H100: 30 GB of 80 GB are free"),
    ],
)
def test_what_limits_a_training(changed, words) -> None:
    assert Machine(**PLAIN).limits() == []
    assert words in " ".join(Machine(**{**PLAIN, **changed}).limits())
