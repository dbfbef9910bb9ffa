"""What every rank of tests/test_distributed.py runs: `ranks.py RANK WORLD DIRECTORY`.

Each case trains as its name says and compares what this rank's monitor found with the oracle.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import rank_cases_bytes  # noqa: F401  (imported for the cases that they register)
import rank_cases_ddp  # noqa: F401
import rank_cases_faults  # noqa: F401
import rank_cases_fsdp  # noqa: F401
import rank_cases_parts  # noqa: F401
import rank_cases_schedulers  # noqa: F401
import rank_cases_timing  # noqa: F401
import rank_cases_uneven  # noqa: F401
import rank_cases_vram  # noqa: F401
import torch
import torch.distributed as dist
from rank_tools import CASES


def main() -> None:
    rank, world, place = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{place / 'init'}",
        timeout=timedelta(seconds=30),
        world_size=world,
        rank=rank,
    )
    results = {}
    for name, (wanted, run) in CASES.items():
        if wanted not in (0, world) or (len(sys.argv) > 4 and name not in sys.argv[4:]):
            continue
        start = time.perf_counter()
        try:
            results[name] = {"figures": run(rank, world)}
            results[name]["seconds"] = round(time.perf_counter() - start, 2)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        (place / f"{rank}.json").write_text(json.dumps(results))
        torch._dynamo.reset()
    dist.destroy_process_group()
    # FSDP2's caches keep the groups, and with them gloo's threads, past the interpreter's end, where
    # they may abort the process: rank_end.py says how. What was found is written.
    os._exit(0)


if __name__ == "__main__":
    main()
