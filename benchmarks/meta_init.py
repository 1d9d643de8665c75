"""The memory that each of two ranks needs to get a sharded model: made on the meta device, or made and then sharded.

python benchmarks/meta_init.py [--blocks 25]

Peak of the process's resident memory above what it was before, with everything that stays imported and warmed up. glibc
may keep freed blocks of this size to use them again: how many is chance. So it is told not to (`mallopt`); what it does
when it is let alone is in the last row.
"""

import argparse
import ctypes
import gc
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import report
from torch import nn

from lightning.fabric import Fabric
from lightning.fabric.testing import on_ranks, preload

preload("torch.distributed.fsdp", "torch.distributed.tensor")

WIDTH = 2048  # 16.8 MB in a block
RANKS = 2
M_MMAP_THRESHOLD = -3


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x))


def make(blocks: int, width: int = WIDTH) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width) for _ in range(blocks)))


def on_meta(fabric: Fabric, *size: int) -> Any:
    with fabric.init_module(empty_init=True):
        model = make(*size)
    return fabric.setup_module(model)


def made_and_set_up(fabric: Fabric, *size: int) -> Any:
    return fabric.setup_module(make(*size))


def by_hand(fabric: Fabric, *size: int) -> Any:
    from torch.distributed.fsdp import fully_shard

    model = make(*size)
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    for block in model:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WAYS = {
    "on meta, fabric.setup_module": on_meta,
    "for real, fabric.setup_module": made_and_set_up,
    "for real, fully_shard": by_hand,
}


def measure(way: str, blocks: int, keeps_freed: bool = False) -> tuple[float, float]:
    """On each rank: megabytes of growth at the peak and in the end."""
    from lightning.fabric.strategies import FSDPStrategy

    if not keeps_freed:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    fabric = Fabric(accelerator="cpu", devices=RANKS, strategy=FSDPStrategy(auto_wrap_policy={Block}))
    fabric.launch()
    WAYS[way](fabric, 2, 64)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _megabytes("VmRSS")
    model = WAYS[way](fabric, blocks)
    peak, after = _megabytes("VmHWM") - before, _megabytes("VmRSS") - before
    assert next(model.parameters()).numel() == WIDTH * WIDTH
    return peak, after


def _megabytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=25)
    args = parser.parse_args()

    block = (WIDTH + 1) * WIDTH * 4 / 1e6
    model = args.blocks * block
    bound = 1.1 * (model / RANKS + block)
    print(f"model {model:.0f} MB, largest block {block:.1f} MB, bound (model / {RANKS} + block) + 10 %: {bound:.0f} MB")
    rows, raw = [], {}
    for way, keeps_freed in (*((way, False) for way in WAYS), ("on meta, fabric.setup_module", True)):
        name = f"{way}, malloc's way" if keeps_freed else way
        raw[name] = on_ranks(RANKS, measure, way, args.blocks, keeps_freed, timeout=600)
        peaks, ends = zip(*raw[name], strict=True)
        rows.append([name, *peaks, *ends, "yes" if max(peaks) <= bound else "no"])
    header = ["MB per rank", "peak 0", "peak 1", "end 0", "end 1", "within bound"]
    report("meta_init", header, rows, model=model, block=block, bound=bound, megabytes=raw)


if __name__ == "__main__":
    main()
