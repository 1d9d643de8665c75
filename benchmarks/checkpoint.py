"""Time and memory of saving and loading a large model, against the leanest bare PyTorch that does the same.

python benchmarks/checkpoint.py [--megabytes 600] [--rounds 5]
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measure import peak_extra_megabytes, report, seconds, take_turns
from torch import nn

from lightning.fabric import Fabric

LAYERS, BYTES = 12, 4


def large(megabytes: int) -> nn.Module:
    width = int((megabytes * 1e6 / LAYERS / BYTES) ** 0.5)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))


Task = tuple[Callable[[], object], Callable[[], object], Callable[[], object] | None]


def tasks(folder: Path, megabytes: int) -> dict[str, Task]:
    """Return ``task -> (bare PyTorch, Fabric, what comes before each without being timed)``."""
    fabric = Fabric(accelerator="cpu", devices=1)
    model = large(megabytes)
    wrapped = fabric.setup(model)
    bare_file, fabric_file = folder / "bare.pt", folder / "fabric.pt"

    def bare_load() -> None:
        model.load_state_dict(torch.load(bare_file, mmap=True, weights_only=True)["model"])

    def bare_create() -> None:
        with torch.device("meta"):
            created = large(megabytes)
        created.to_empty(device="cpu")
        created.load_state_dict(torch.load(bare_file, mmap=True, weights_only=True)["model"])

    def fabric_create() -> None:
        with fabric.init_module(empty_init=True):
            created = large(megabytes)
        fabric.load(fabric_file, {"model": fabric.setup(created)})

    def bare_save() -> None:
        torch.save({"model": model.state_dict()}, bare_file)

    def fabric_save() -> None:
        fabric.save(fabric_file, {"model": wrapped})

    def remove_files() -> None:
        bare_file.unlink(missing_ok=True)
        fabric_file.unlink(missing_ok=True)

    def write_files() -> None:
        for file, save in ((bare_file, bare_save), (fabric_file, fabric_save)):
            if not file.exists():
                save()

    return {
        "save": (bare_save, fabric_save, remove_files),
        "save over an older file": (bare_save, fabric_save, write_files),
        "load": (bare_load, lambda: fabric.load(fabric_file, {"model": wrapped}), write_files),
        "create and fill": (bare_create, fabric_create, None),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    rows, raw = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for task, (bare, fabric, before) in tasks(Path(folder), args.megabytes).items():
            if before is not None:
                before()
            memory = {"bare": peak_extra_megabytes(bare), "fabric": peak_extra_megabytes(fabric)}
            ways = {"bare": partial(seconds, bare, before), "fabric": partial(seconds, fabric, before)}
            time = take_turns(ways, args.rounds)
            median = {name: statistics.median(values) for name, values in time.items()}
            rows.append([task, *median.values(), median["fabric"] / median["bare"], *memory.values()])
            raw[task] = {"seconds": time, "peak extra MB": memory}
    header = ["", "bare s", "fabric s", "ratio", "bare extra MB", "fabric extra MB"]
    report("checkpoint", header, rows, tasks=raw, megabytes=args.megabytes)


if __name__ == "__main__":
    main()
