"""The demonstration: one script, every way to start it, the same weights."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = str(EXAMPLES / "digits.py")
# Two ranks with half of the images each, or one process with all: every step is one of full-batch gradient descent.
ON_TWO, ON_ONE = ["--batch-size", "700"], ["--batch-size", "1400"]
FABRIC_RUN = ["-m", "lightning.fabric.cli", "run", "--accelerator", "cpu", "--main-port", "0"]
OWN_LAUNCH = """\
import sys
from digits import Fabric, parse_args, train

if __name__ == "__main__":
    strategy = sys.argv.pop(1)
    Fabric(accelerator="cpu", devices=2, strategy=strategy).launch(train, parse_args())
"""
WAYS = {
    "python": ["{own}", "ddp", *ON_TWO],
    "fabric run": [*FABRIC_RUN, "--devices", "2", SCRIPT, *ON_TWO],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT, *ON_TWO],
    "ddp_spawn": ["{own}", "ddp_spawn", *ON_TWO],
    "ddp_fork": ["{own}", "ddp_fork", *ON_TWO],
    "one process": [*FABRIC_RUN, SCRIPT, *ON_ONE],
}
Train = Callable[[str], dict[str, Tensor]]


def run(args: list[str], folder: Path) -> str:
    """Run Python with the arguments and the script's own ones; return what it printed."""
    own = folder / "own_launch.py"
    own.write_text(OWN_LAUNCH)
    args = [arg.format(own=own) for arg in args]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{EXAMPLES}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, *args, "--lr", "0.1", "--seed", "1", "--out", str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return the weights after two epochs, by the way of starting."""
    known: dict[str, dict[str, Tensor]] = {}

    def train(way: str) -> dict[str, Tensor]:
        if way not in known:
            folder = tmp_path_factory.mktemp("digits")
            printed = run([*WAYS[way], "--epochs", "2"], folder)
            assert f"world size {1 if way == 'one process' else 2}" in printed
            known[way] = torch.load(folder / "checkpoint.pt")["model"]
        return known[way]

    return train


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("python", "one process")])
def test_weights_are_bit_identical_however_two_ranks_are_started(trained: Train, way: str) -> None:
    weights, reference = trained(way), trained("python")
    assert weights.keys() == reference.keys()
    assert all(torch.equal(weights[name], reference[name]) for name in reference)


def test_two_ranks_train_as_one_process_does(trained: Train) -> None:
    torch.testing.assert_close(trained("python"), trained("one process"), rtol=0, atol=1e-5)


def test_a_second_run_resumes_and_learns(tmp_path: Path) -> None:
    command = [*FABRIC_RUN, "--devices", "2", SCRIPT]
    assert "resumed" not in run([*command, "--epochs", "1"], tmp_path)
    printed = run([*command, "--epochs", "4", "--resume"], tmp_path)
    assert "world size 2\nresumed after epoch 1\nepoch 2:" in printed

    with open(tmp_path / "metrics" / "version_1" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    accuracy = float(rows[-1]["accuracy"])
    assert accuracy > 0.8
    assert accuracy * 397 == pytest.approx(round(accuracy * 397), abs=1e-6), "each held-out image counts once"
