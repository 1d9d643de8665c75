"""The demonstration: one script, every way to start it, the same weights."""

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # trains twice, in fresh interpreters

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = str(EXAMPLES / "digits.py")
# Two ranks with half of the images each, or one process with all: every step is one of full-batch gradient descent.
ON_TWO, ON_ONE = ["--batch-size", "700"], ["--batch-size", "1400"]
OWN_LAUNCH = """\
import os
from digits import Fabric, parse_args, train

if __name__ == "__main__":
    Fabric(devices=2, strategy=os.environ["STRATEGY"]).launch(train, parse_args())
"""
WAYS = {
    "ddp": ["{own}", *ON_TWO],
    "fabric run": ["-m", "lightning.fabric.cli", "run", "--devices", "2", SCRIPT, *ON_TWO],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT, *ON_TWO],
    "ddp_spawn": ["{own}", *ON_TWO],
    "ddp_fork": ["{own}", *ON_TWO],
    "one process": [SCRIPT, *ON_ONE],
}


def run(args: list[str], folder: Path, strategy: str = "auto") -> str:
    """Run Python with the arguments and the script's own ones; return what it printed."""
    own = folder / "own_launch.py"
    own.write_text(OWN_LAUNCH)
    args = [arg.format(own=own) for arg in args]
    path = f"{EXAMPLES}:{os.environ.get('PYTHONPATH', '')}"
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "STRATEGY": strategy, "LT_ACCELERATOR": "cpu"}
    command = [sys.executable, *args, "--lr", "0.1", "--seed", "1", "--out", str(folder)]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a run of two epochs, by the way of starting."""
    folders: dict[str, Path] = {}

    def train(way: str) -> Path:
        if way not in folders:
            folder = tmp_path_factory.mktemp("digits")
            printed = run([*WAYS[way], "--epochs", "2"], folder, strategy=way)
            assert f"world size {1 if way == 'one process' else 2}\n" in printed
            folders[way] = folder
        return folders[way]

    return train


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "checkpoint.pt")["model"]


def rows(folder: Path, version: int) -> list[dict[str, str]]:
    with open(folder / "metrics" / f"version_{version}" / "metrics.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("ddp", "one process")])
def test_weights_are_bit_identical_however_two_ranks_are_started(trained: Callable[[str], Path], way: str) -> None:
    found, reference = weights(trained(way)), weights(trained("ddp"))
    assert found.keys() == reference.keys()
    assert all(torch.equal(found[name], reference[name]) for name in reference)


def test_two_ranks_train_as_one_process_does(trained: Callable[[str], Path]) -> None:
    torch.testing.assert_close(weights(trained("ddp")), weights(trained("one process")), rtol=0, atol=1e-5)


def test_two_ranks_count_each_held_out_image_once(trained: Callable[[str], Path]) -> None:
    on_two, on_one = (float(rows(trained(way), 0)[-1]["accuracy"]) for way in ("fabric run", "one process"))
    assert on_two == on_one == pytest.approx(round(on_one * 397) / 397)


def test_a_second_run_resumes_and_learns(trained: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copy(trained("fabric run") / "checkpoint.pt", tmp_path)
    printed = run([SCRIPT, "--epochs", "5", "--resume"], tmp_path)
    assert "resumed after epoch 2\nepoch 3:" in printed
    assert [row["step"] for row in rows(tmp_path, 0)] == ["2", "3", "4"]
    assert float(rows(tmp_path, 0)[-1]["accuracy"]) > 0.8
