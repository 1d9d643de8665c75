"""How much longer ``from lightning.fabric import Fabric`` takes than ``import torch``, in fresh interpreters.

python benchmarks/import_cost.py [--rounds 7]
"""

import argparse
import statistics
import subprocess
import sys
from functools import partial

from measure import report, seconds, take_turns

WAYS = {
    "import torch": "import torch",
    "import torch, torch.distributed, torch.utils.data": "import torch, torch.distributed, torch.utils.data",
    "import lightning.fabric": "import lightning.fabric",
    "import torch; from lightning.fabric import Fabric": "import torch; from lightning.fabric import Fabric",
}


def run(code: str) -> float:
    return seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    found = take_turns({name: partial(run, code) for name, code in WAYS.items()}, args.rounds)
    median = {name: statistics.median(values) for name, values in found.items()}
    best = {name: min(values) for name, values in found.items()}
    rows = [[name, median[name], best[name], median[name] / median["import torch"]] for name in WAYS]
    report("import_cost", ["", "median s", "min s", "ratio"], rows, seconds=found)


if __name__ == "__main__":
    main()
