"""What the benchmarks share: take turns, compare medians, print a table and write it down."""

import gc
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def take_turns(ways: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call every way once per round (ABAB), so that a busy moment of the machine hits all; return what they return."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(way())
    return found


def blocks_in_turns(
    steps: Mapping[str, Callable[[], Any]], rounds: int, calls: int, barrier: Callable[[], Any]
) -> dict[str, list[float]]:
    """On each rank: the milliseconds of a step, the median of each block of ``calls``, for all sides.

    Sides take turns, each round in the other order, and ranks begin a block together.
    """
    found: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-2, rounds):  # two rounds to warm up, and to compile
        for name in list(steps)[:: 1 if number % 2 else -1]:
            barrier()
            block = statistics.median(seconds(steps[name]) for _ in range(calls)) * 1e3
            if number >= 0:
                found[name].append(block)
    return found


def seconds(function: Callable[[], Any], before: Callable[[], Any] | None = None) -> float:
    """Return the seconds of one call, without those of ``before``."""
    if before is not None:
        before()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def per_call(function: Callable[[], Any], calls: int) -> float:
    """Return the median of the seconds that one call takes."""
    times = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        function()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1e9


def peak_extra_megabytes(function: Callable[[], Any]) -> float:
    """Return how far the process's own memory rose above its level at the start, at the highest moment (Linux).

    Pages of a mapped file do not count: the kernel drops them when somebody needs the memory.
    """
    gc.collect()
    before = _status("RssAnon")
    levels, is_over = [before], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.001):
            levels.append(_status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    is_over.set()
    watcher.join()
    return (max(*levels, _status("RssAnon")) - before) / 1e3


def _status(field: str) -> int:
    """Kilobytes, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def report(name: str, header: Iterable[str], rows: Iterable[Iterable[Any]], **raw: Any) -> None:
    """Print the table and write it to ``results/<name>.json`` with the raw figures and the machine."""
    table = [[_text(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print(f"\n{name}")
    for first, *others in table:
        print("  " + first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True)), sep="  ")
    RESULTS.mkdir(exist_ok=True)
    machine = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine, "table": table, **raw}, indent=1) + "\n")


def _text(cell: Any) -> str:
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)
