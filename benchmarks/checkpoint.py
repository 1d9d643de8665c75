"""Time and memory of saving and loading a large model, against the leanest bare PyTorch that does the same.

python benchmarks/checkpoint.py [--megabytes 600] [--rounds 5]

A save is on the disk when it returns, which ``torch.save`` alone does not promise: it is compared with ``torch.save``
and ``fsync``. Disks have moods, so the same is measured in memory (a tmpfs), where ``fsync`` is nothing and bare is
``torch.save`` alone. Checkpoints whose digests are verified are read once more.

"create and fill" is a model made under ``init_module(empty_init=True)``, set up and loaded into. Bare PyTorch makes it
on the meta device and lets it have the mapped file's pages (``load_state_dict(assign=True)``). That reads nothing yet,
and the weights stay the file's: whoever overwrites or truncates it changes them, or ends the process. Fabric copies
them, so that nothing refers to the file afterwards. So the two are also compared where both have weights of their own:
after each was changed once, as the first step of an optimizer does; and with bare PyTorch that copies them, too.
"""

import argparse
import ctypes
import os
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import peak_extra_megabytes, report, seconds, take_turns
from torch import nn

from lightning.fabric import Fabric
from lightning.fabric.testing import on_ranks, preload

preload("torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint")

LAYERS, BYTES = 12, 4
SHARED_MEMORY = Path("/dev/shm")
M_MMAP_THRESHOLD = -3
Task = tuple[Callable[[], object], Callable[[], object], Callable[[], object]]


def give_freed_memory_back() -> None:
    """Have the C library do it at once, so that one side does not live on what another has left (Linux)."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def large(megabytes: int) -> nn.Module:
    width = int((megabytes * 1e6 / LAYERS / BYTES) ** 0.5)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))


def saving_and_loading(folder: Path, megabytes: int, where: str) -> dict[str, Task]:
    """Return ``task -> (bare PyTorch, Fabric, what comes before each without being timed)``."""
    fabric = Fabric(accelerator="cpu", devices=1)
    model = large(megabytes)
    wrapped = fabric.setup(model)
    bare_file, fabric_file = folder / "bare.pt", folder / "fabric.pt"

    def bare_load() -> None:
        model.load_state_dict(torch.load(bare_file, mmap=True, weights_only=True)["model"])

    def bare_save() -> None:
        torch.save({"model": model.state_dict()}, bare_file)

    def bare_save_to_the_disk() -> None:
        bare_save()
        bring_to_the_disk(bare_file)

    def fabric_save(**options: Any) -> None:
        fabric.save(fabric_file, {"model": wrapped}, **options)

    def remove_files() -> None:
        fabric.strategy.wait_for_saves()
        bare_file.unlink(missing_ok=True)
        fabric_file.unlink(missing_ok=True)
        os.sync()

    def write_files() -> None:
        for file, save in ((bare_file, bare_save), (fabric_file, fabric_save)):
            if not file.exists():
                save()
        os.sync()

    def fabric_load(**options: Any) -> None:
        fabric.load(fabric_file, {"model": wrapped}, **options)

    without, later = {"digests": False}, {"blocking": False}
    tasks: dict[str, Task] = {
        "save without digests": (bare_save_to_the_disk, partial(fabric_save, **without), remove_files),
        "save": (bare_save_to_the_disk, fabric_save, remove_files),
        "until training goes on, of a blocking save": (fabric_save, partial(fabric_save, **later), remove_files),
        "save over an older file": (bare_save_to_the_disk, fabric_save, write_files),
        "load, sizes verified": (bare_load, partial(fabric_load, verify=False), write_files),
        "load, digests verified": (bare_load, fabric_load, write_files),
    }
    return {f"{title}, {where}": task for title, task in tasks.items()}


def bring_to_the_disk(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def megabytes_per_second(folder: Path, megabytes: int) -> float:
    """Of the disk: a file is written in large pieces, and brought to it."""
    piece = os.urandom(8 << 20)
    count = megabytes * 10**6 // len(piece)

    def write() -> None:
        with (folder / "plain").open("wb") as file:
            for _ in range(count):
                file.write(piece)
        bring_to_the_disk(folder / "plain")

    taken = statistics.median(seconds(write, os.sync) for _ in range(3))
    (folder / "plain").unlink()
    return count * len(piece) / 1e6 / taken


# ---- create and fill -------------------------------------------------------------------------------------------------


def created_bare(file: Path, megabytes: int, copied: bool = False) -> nn.Module:
    with torch.device("meta"):
        model = large(megabytes)
    state = torch.load(file, mmap=True, weights_only=True)["model"]
    if copied:
        state = {name: value.clone() for name, value in state.items()}
    model.load_state_dict(state, assign=True)
    return model


def created_by_fabric(file: Path, megabytes: int, fabric: Fabric) -> nn.Module:
    with fabric.init_module(empty_init=True):
        model = large(megabytes)
    model = fabric.setup(model)
    fabric.load(file, {"model": model})
    return model


@torch.no_grad()
def read_once(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.sum()


@torch.no_grad()
def change_once(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(0.5)


def creating(folder: Path, megabytes: int, precision: Any) -> dict[str, Task]:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    file = folder / f"{precision}.pt"
    torch.save({"model": fabric._precision.convert_module(large(megabytes)).state_dict()}, file)
    kept: list[nn.Module] = []  # freed where no time is taken

    def then(make: Callable[[], nn.Module], use: Callable[[nn.Module], object] | None) -> Callable[[], None]:
        def task() -> None:
            kept.append(make())
            if use is not None:
                use(kept[-1])

        return task

    bare = partial(created_bare, file, megabytes)
    ours = partial(created_by_fabric, file, megabytes, fabric)
    return {
        "create and fill": (then(bare, None), then(ours, None), kept.clear),
        "create, fill, read once": (then(bare, read_once), then(ours, read_once), kept.clear),
        "create, fill, change once": (then(bare, change_once), then(ours, change_once), kept.clear),
        "create and fill, both copy": (then(partial(bare, copied=True), None), then(ours, None), kept.clear),
    }


def measured(task: Task, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the seconds, and the extra megabytes at the most, of both sides."""
    *sides, before = task
    ways = dict(zip(("bare", "fabric"), sides, strict=True))
    memory = {}
    for name, way in ways.items():
        before()
        memory[name] = peak_extra_megabytes(way)
    return take_turns({name: partial(seconds, way, before) for name, way in ways.items()}, rounds), memory


# ---- on two ranks ----------------------------------------------------------------------------------------------------


def sharded_by_hand(file: Path, megabytes: int) -> nn.Module:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = large(megabytes)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for part in model:
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    state = torch.load(file, mmap=True, weights_only=True)["model"]
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    return model


def creating_on_ranks(file: Path, megabytes: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """On each rank: the seconds, and the extra megabytes at the most, of both sides."""
    from lightning.fabric.strategies import FSDPStrategy

    fabric = Fabric(accelerator="cpu", devices=2, strategy=FSDPStrategy(auto_wrap_policy={nn.Linear}))
    fabric.launch()
    give_freed_memory_back()
    kept: list[nn.Module] = []

    def before() -> None:
        kept.clear()
        fabric.barrier()

    bare, ours = partial(sharded_by_hand, file, megabytes), partial(created_by_fabric, file, megabytes, fabric)
    return measured((lambda: kept.append(bare()), lambda: kept.append(ours()), before), rounds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    give_freed_memory_back()
    rows, raw = [], {}

    def add(title: str, time: dict[str, list[float]], memory: dict[str, float]) -> None:
        median = {name: statistics.median(values) for name, values in time.items()}
        rows.append([title, *median.values(), median["fabric"] / median["bare"], *memory.values()])
        raw[title] = {"seconds": time, "peak extra MB": memory}

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        disk = megabytes_per_second(folder, args.megabytes)
        tasks = saving_and_loading(folder, args.megabytes, "disk")
        if SHARED_MEMORY.is_dir():
            in_memory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=SHARED_MEMORY)))
            found = saving_and_loading(in_memory, args.megabytes, "memory")
            tasks |= {title: found[title] for title in list(found)[:3]}
        tasks |= creating(folder, args.megabytes, "32-true")
        in_half = creating(folder, args.megabytes, "bf16-true")
        tasks |= {f"{title}, bf16-true": in_half[title] for title in list(in_half)[-2:]}
        for title, task in tasks.items():
            add(title, *measured(task, args.rounds))
            task[2]()
        found = on_ranks(2, creating_on_ranks, folder / "32-true.pt", args.megabytes, args.rounds, timeout=1200)[0]
        add("create and fill, fsdp, 2 ranks", *found)
    header = ["", "bare s", "fabric s", "ratio", "bare extra MB", "fabric extra MB"]
    report("checkpoint", header, rows, tasks=raw, megabytes=args.megabytes, disk_megabytes_per_second=disk)
    print(f"\nThe disk takes {disk:.0f} MB/s.")


if __name__ == "__main__":
    main()
