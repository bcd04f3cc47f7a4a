"""One rank of test_dead_rank.py: steps until a collective raises, then writes when and what, as JSON.

python distributed_dead_rank.py RANK RANKS FOLDER TIMEOUT
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from npu_xent.distributed import vocab_parallel_cross_entropy

N, COLUMNS, STEPS = 64, 40, 20


def main(rank: int, ranks: int, folder: Path, timeout: float) -> None:
    """Steps for ever. After an error it stays until all others have one too: its end would tell them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    dist.barrier()  # processes start seconds apart, which does not count for the timeout
    group = dist.new_group(timeout=datetime.timedelta(seconds=timeout))
    logits, target = torch.randn(N, COLUMNS, requires_grad=True), torch.arange(N) % (ranks * COLUMNS)
    step = 0
    try:
        while True:
            vocab_parallel_cross_entropy(logits, target, group=group, reduction="mean").backward()
            step += 1
            if step == STEPS:
                (folder / f"{rank}.ready").touch()
    except Exception as error:
        found = {"at": time.monotonic(), "step": step, "error": type(error).__name__, "text": str(error)}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    while len(list(folder.glob("*.json"))) < ranks - 1:
        time.sleep(0.02)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]))
