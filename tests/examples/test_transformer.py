"""The demonstration of strategies: one training script, the same losses and weights under every one of them."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
import torch

from lightning.fabric import Fabric
from lightning.fabric.testing import on_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))  # the scripts import each other as they do when they are run

import every_strategy  # noqa: E402
import transformer  # noqa: E402
from every_strategy import ROWS, SINGLE, Row, Run, run  # noqa: E402

pytestmark = pytest.mark.slow


ran = cache(run)  # a row is compared with several others
BY_NAME = {(row.name, row.ranks): row for row in ROWS}


@pytest.fixture(scope="module")
def alone() -> Run:
    return ran(SINGLE)


@pytest.mark.timeout(600)  # the first time, DeepSpeed compiles parts of itself
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_each_strategy_trains_as_one_process_does(row: Row, alone: Run) -> None:
    if not row.can_run:
        pytest.skip(f"needs the package {row.package}")
    result = ran(row)
    assert result.weights.keys() == alone.weights.keys()
    assert max(result.differences(alone)) <= row.limit


def test_the_model_learns(alone: Run) -> None:
    assert len(alone.losses) == 20
    assert alone.losses[0] > 5.4 > 5.0 > alone.losses[-1]  # by chance: log(256) = 5.5


@pytest.mark.parametrize("name", ["ddp", "fsdp FULL_SHARD"])
def test_joint_and_separate_set_up_train_the_same_bit_by_bit(name: str) -> None:
    joint = BY_NAME[name, 2]
    separate = replace(joint, arguments=(*joint.arguments, "--setup=separate"))
    assert ran(joint).differences(ran(separate)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "on_meta", "ranks"),
    [
        ("fsdp FULL_SHARD", "fsdp, made on meta", 2),
        ("tensor parallel x data parallel", "the same, made on meta", 4),
    ],
)
def test_a_model_made_on_meta_trains_the_same_bit_by_bit(name: str, on_meta: str, ranks: int) -> None:
    assert ran(BY_NAME[name, ranks]).differences(ran(BY_NAME[on_meta, ranks])) == (0.0, 0.0)


def test_a_row_that_is_over_its_limit_fails_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other_data = Row("other data", 1, ("--strategy=ddp", "--seed=7"))
    absent = replace(other_data, name="not here", package="no_such_package")
    monkeypatch.setattr(every_strategy, "ROWS", (other_data, absent))
    monkeypatch.setattr(sys, "argv", ["every_strategy.py", "--steps=2"])
    assert every_strategy.main() == 1
    printed = capsys.readouterr().out
    assert "OVER\n" in printed
    assert "not run: pip install no_such_package" in printed
    assert printed.endswith("1 over the limit\n")


@pytest.mark.parametrize("devices", [2, 4])
def test_a_batch_does_not_depend_on_the_number_of_ranks(devices: int) -> None:
    """Each micro-batch, taken over all ranks, has the same pieces of text."""
    [expected] = on_ranks(1, _pieces, 1)
    found = on_ranks(devices, _pieces, devices)
    assert [sorted(chain(*parts)) for parts in zip(*found, strict=True)] == [sorted(parts) for parts in expected]


def _pieces(devices: int) -> list[list[list[int]]]:
    fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp")
    fabric.launch()
    loader = fabric.setup_dataloaders(transformer.micro_batches(fabric, transformer.parse_args([])))
    return [tokens.tolist() for _, (tokens, _) in zip(range(6), loader, strict=False)]


@pytest.mark.parametrize(
    "command",
    [
        [str(EXAMPLES / "transformer.py"), "--devices", "2", "--strategy", "fsdp"],
        ["-m", "lightning.fabric.cli", "run", "--devices", "2", str(EXAMPLES / "transformer.py"), "--strategy", "ddp"],
    ],
    ids=["python", "fabric run"],
)
def test_the_script_runs_as_a_script(command: list[str], alone: Run, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    command = [sys.executable, *command, "--steps", "3", "--accelerator", "cpu", "--out", str(path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("step ")]
    assert printed == pytest.approx(alone.losses[:3], abs=2e-6)
    assert "world size 2, loss " in done.stdout
    assert torch.load(path)["model"].keys() == alone.weights.keys()
