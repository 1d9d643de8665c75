"""Seconds from the command to the first all-reduce of two CPU ranks, for each way of starting them.

python benchmarks/launch.py [--rounds 5]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

HERE = str(Path(__file__))
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WAYS = {
    "torchrun, bare PyTorch": [*TORCHRUN, HERE, "--as-rank", "bare"],
    "torchrun": [*TORCHRUN, HERE, "--as-rank", "ddp"],
    "fabric run": ["-m", "lightning.fabric.cli", "run", "--devices", "2", HERE, "--as-rank", "ddp"],
    "python, ddp": [HERE, "--as-rank", "ddp"],
    "python, ddp_spawn": [HERE, "--as-rank", "ddp_spawn"],
    "python, ddp_forkserver": [HERE, "--as-rank", "ddp_forkserver"],
    "python, ddp_fork": [HERE, "--as-rank", "ddp_fork"],
}


def bare_rank() -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    note_the_time(dist.get_rank())
    dist.destroy_process_group()


def fabric_rank(fabric) -> None:  # type: ignore[no-untyped-def]  # the import belongs to what is measured
    import torch

    fabric.all_reduce(torch.ones(1), reduce_op="sum")
    note_the_time(fabric.global_rank)


def note_the_time(rank: int) -> None:
    if rank == 0:
        Path(os.environ["NOTE"]).write_text(repr(time.time()))


def as_rank(strategy: str) -> None:
    if strategy == "bare":
        bare_rank()
        return
    from lightning.fabric import Fabric

    Fabric(accelerator="cpu", devices=2, strategy=strategy).launch(fabric_rank)


def first_all_reduce(command: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "time"
        env = {**os.environ, "NOTE": str(note), "OMP_NUM_THREADS": "1"}
        start = time.time()
        subprocess.run([sys.executable, *command], env=env, check=True, capture_output=True)
        return float(note.read_text()) - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--as-rank", metavar="STRATEGY", help="for the processes that this starts")
    args = parser.parse_args()
    if args.as_rank:
        as_rank(args.as_rank)
        return
    from measure import report, take_turns

    ways = {name: partial(first_all_reduce, command) for name, command in WAYS.items()}
    found = take_turns(ways, args.rounds)
    median = {name: statistics.median(values) for name, values in found.items()}
    base = median["torchrun, bare PyTorch"]
    rows = [[name, median[name], min(found[name]), median[name] / base] for name in WAYS]
    report("launch", ["", "median s", "min s", "ratio"], rows, seconds=found)


if __name__ == "__main__":
    main()
