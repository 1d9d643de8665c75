"""`fabric consolidate`: one file out of a folder, as plain torch and every strategy read it; or a message."""

import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning.fabric.accelerators.cpu import CPUAccelerator
from lightning.fabric.checkpoint.manifest import read_manifest, verify
from lightning.fabric.checkpoint.saving import SaveOptions, save
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.strategies import _sharded_files as files
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.testing import on_ranks, preload
from lightning.fabric.utilities.consolidate_checkpoint import consolidate_checkpoint, main
from lightning.fabric.utilities.data import AttributeDict
from lightning.fabric.utilities.load import HAS_MANIFEST

preload("torch.distributed.fsdp", "torch.distributed.checkpoint", "lightning.fabric.strategies._sharded_files")


def _model() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    model[3].weight = model[2].weight
    return model


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": model[2].parameters(), "lr": 0.3}, {"params": [*model[0].parameters()]}]


def _train(model: nn.Module) -> dict[str, Any]:
    adam = torch.optim.AdamW(_groups(model))
    sgd = torch.optim.SGD(model[1].parameters(), lr=0.1)
    model(torch.arange(12.0).reshape(4, 3)).square().sum().backward()
    adam.step()
    sgd.step()
    plain = {"step": 3, "names": ["a"], "rng": torch.ones(2), "config": AttributeDict(lr=0.1, empty=b"")}
    return {"model": model, "adam": adam, "sgd": sgd, **plain}


def _save(folder: str, processes: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    strategy = DDPStrategy(
        CPUAccelerator(), [torch.device("cpu")] * processes, LightningEnvironment(), timeout=timedelta(seconds=30)
    )
    strategy.setup_environment()
    model = _model()
    fully_shard(model, mesh=init_device_mesh("cpu", (processes,)))
    state = _train(model)
    for path, sharded in ((f"{folder}/c.ckpt", True), (f"{folder}/full", False)):
        save(files.prepare(strategy, state, sharded=sharded), path, SaveOptions(), strategy._peers())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    on_ranks(2, _save, str(folder), 2)
    return folder


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved / "c.ckpt", tmp_path / "c.ckpt")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def test_the_file_is_what_a_full_save_writes(checkpoint: Path, saved: Path) -> None:
    output = consolidate_checkpoint(checkpoint)
    assert output == checkpoint.with_name("c.ckpt.consolidated")
    merged = torch.load(output, weights_only=True)
    assert _same(merged, torch.load(saved / "full", weights_only=True))
    model = _model()
    optimizer = torch.optim.AdamW(_groups(model))
    model.load_state_dict(merged["model"])
    optimizer.load_state_dict(merged["adam"])
    assert optimizer.param_groups[0]["lr"] == 0.3
    reference = _train(_model())
    assert torch.allclose(model[0].weight, reference["model"][0].weight)
    assert torch.allclose(
        optimizer.state[model[0].weight]["exp_avg"], reference["adam"].state_dict()["state"][1]["exp_avg"]
    )


def test_the_file_has_a_manifest_of_its_own(checkpoint: Path) -> None:
    output = consolidate_checkpoint(checkpoint)
    manifest, of_folder = read_manifest(output), read_manifest(checkpoint)
    assert manifest is not None
    assert of_folder is not None
    verify(output, manifest)
    assert (manifest.strategy, manifest.step) == (of_folder.strategy, of_folder.step)


def _load(path: str) -> bool:
    strategy = DDPStrategy(
        CPUAccelerator(), [torch.device("cpu")], LightningEnvironment(), timeout=timedelta(seconds=30)
    )
    strategy.setup_environment()
    expected = torch.load(path, weights_only=True)
    loads = (strategy.load_checkpoint, lambda path, state: files.load_checkpoint(strategy, path, state))
    results = []
    for load in loads:
        state = _train(_model()) | {"step": 0}
        load(path, state)
        results += [state["step"] == 3, _same(dict(state["model"].state_dict()), dict(expected["model"]))]
        results += [_same(state[key].state_dict(), expected[key]) for key in ("adam", "sgd")]
    return all(results)


def test_strategies_load_the_file(checkpoint: Path, tmp_path: Path) -> None:
    output = consolidate_checkpoint(checkpoint, tmp_path / "deep" / "merged.pt")
    assert output == tmp_path / "deep" / "merged.pt"
    assert on_ranks(1, _load, str(output)) == [True]


def test_a_relative_folder_with_a_slash_gets_its_file_beside_it(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint)
    assert consolidate_checkpoint("../c.ckpt/").resolve() == checkpoint.with_name("c.ckpt.consolidated")
    monkeypatch.chdir(checkpoint.parent)
    Path("c.ckpt.consolidated").unlink()
    consolidate_checkpoint("c.ckpt/")
    assert Path("c.ckpt.consolidated").is_file()


def test_a_folder_without_plain_values_is_one_of_torchs_own(checkpoint: Path) -> None:
    _forget_the_manifest(checkpoint)
    (checkpoint / "meta.pt").unlink()
    assert torch.load(consolidate_checkpoint(checkpoint), weights_only=True).keys() == {"model", "adam", "sgd"}


def test_objects_are_merged_if_they_are_trusted(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"where": Path("here")}, checkpoint / "meta.pt")
    _forget_the_manifest(checkpoint)
    assert main([str(checkpoint)]) == 1
    assert "pass `weights_only=False`. On the command line that is --trusted." in capfd.readouterr().err
    merged = torch.load(consolidate_checkpoint(checkpoint, weights_only=False), weights_only=False)
    assert merged["where"] == Path("here")
    checkpoint.with_name("c.ckpt.consolidated").unlink()
    assert main([str(checkpoint), "--trusted"]) == 0


def test_paths_may_be_urls_of_files_and_of_nothing_else(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert consolidate_checkpoint(f"file://{checkpoint}") == checkpoint.with_name("c.ckpt.consolidated")
    assert consolidate_checkpoint(checkpoint, f"file://{tmp_path}/out") == tmp_path / "out"
    assert main(["memory://bucket/c"]) == 1
    assert "'memory://bucket/c' is not on this machine. `fabric checkpoint convert" in capfd.readouterr().err
    assert main([str(checkpoint), "--output-file", "memory://bucket/c"]) == 1
    assert "`fabric checkpoint convert FOLDER memory://bucket/c` writes" in capfd.readouterr().err


def _forget_the_manifest(folder: Path) -> None:
    """As if it were older than manifests are."""
    (folder / "manifest.json").unlink()
    index = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(index.replace(HAS_MANIFEST.encode(), b" " * len(HAS_MANIFEST)))


def _no_metadata(folder: Path) -> None:
    (folder / ".metadata").unlink()


def _no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def _a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def _output_exists(folder: Path) -> None:
    folder.with_name("c.ckpt.consolidated").touch()


def _shard_is_gone(folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()


def _index_is_cut(folder: Path) -> None:
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:50])


def _shard_of_an_old_one_is_gone(folder: Path) -> None:
    _forget_the_manifest(folder)
    _shard_is_gone(folder)


def _index_of_an_old_one_is_cut(folder: Path) -> None:
    _forget_the_manifest(folder)
    _index_is_cut(folder)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_no_folder, "c.ckpt' does not exist"),
        (_no_metadata, "c.ckpt' is no sharded checkpoint. It has no `.metadata`. Pass the folder"),
        (_a_file, "c.ckpt' is no sharded checkpoint. It is a file, and may be consolidated already"),
        (_output_exists, "c.ckpt.consolidated' exists. Delete it, or choose another path with --output_file"),
        (_shard_is_gone, "c.ckpt' is damaged: its file '__1_0.distcp' is missing"),
        (_index_is_cut, "c.ckpt' is damaged: its file '.metadata' has 50 bytes"),
        (_shard_of_an_old_one_is_gone, "c.ckpt' is damaged: its file '__1_0.distcp' is missing"),
        (_index_of_an_old_one_is_cut, "c.ckpt' is damaged: its file '.metadata' cannot be read"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_1(
    checkpoint: Path, capfd: pytest.CaptureFixture[str], harm: Any, message: str
) -> None:
    harm(checkpoint)
    before = sorted(checkpoint.parent.iterdir())
    assert main([str(checkpoint)]) == 1
    printed = capfd.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert sorted(checkpoint.parent.iterdir()) == before


@pytest.mark.slow
def test_it_runs_as_a_module_and_says_where_the_file_is(checkpoint: Path, tmp_path: Path) -> None:
    module = "lightning.fabric.utilities.consolidate_checkpoint"
    command = [sys.executable, "-W", "error", "-m", module, str(checkpoint), "--output_file", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'o'}\n", "")
    assert (tmp_path / "o").is_file()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "exists" in again.stderr
