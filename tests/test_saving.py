"""`Fabric.save` and `load`: what is described and verified, and what is written while training goes on."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning.fabric import Fabric
from lightning.fabric.checkpoint import DamagedCheckpointError, read_manifest
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.strategies import SingleDeviceStrategy
from lightning.fabric.testing import on_ranks, preload

preload("torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint")


def _fabric(**options: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, **options)


def _trained(fabric: Fabric) -> tuple[Any, Any]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=0.1))
    _step(fabric, model, optimizer)
    return model, optimizer


def _step(fabric: Fabric, model: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    fabric.backward(model(torch.ones(3, 4)).pow(2).sum())
    optimizer.step()


def _flip(file: Path, content: bytes) -> None:
    """Change a byte of ``content``, which is in the file."""
    whole = bytearray(file.read_bytes())
    whole[whole.index(content)] ^= 1
    file.write_bytes(whole)


class TestWhatIsSaved:
    def test_says_what_it_is(self, tmp_path: Path) -> None:
        fabric = _fabric()
        fabric.save(tmp_path / "a.pt", {"x": torch.ones(3)})
        manifest = read_manifest(tmp_path / "a.pt")
        assert manifest is not None
        assert (manifest.strategy, manifest.world_size, manifest.step) == ("SingleDeviceStrategy", 1, None)
        assert manifest.versions["torch"] == torch.__version__
        assert manifest.files[""].checksum is not None
        assert torch.load(tmp_path / "a.pt")["x"].tolist() == [1, 1, 1]

    def test_without_digests_has_sizes(self, tmp_path: Path) -> None:
        _fabric().save(tmp_path / "a.pt", {"x": 1}, digests=False)
        manifest = read_manifest(tmp_path / "a.pt")
        assert manifest is not None
        assert manifest.files[""].checksum is None

    def test_where_torch_writes_no_checksums_has_some(self, tmp_path: Path) -> None:
        torch.serialization.set_crc32_options(False)
        try:
            _fabric().save(tmp_path / "a.pt", {"x": torch.ones(3)})
        finally:
            torch.serialization.set_crc32_options(True)
        assert _fabric().load(tmp_path / "a.pt")["x"].tolist() == [1, 1, 1]
        _flip(tmp_path / "a.pt", torch.ones(3).numpy().tobytes())
        with pytest.raises(DamagedCheckpointError):
            _fabric().load(tmp_path / "a.pt")

    def test_is_verified_before_anything_changes_unless_told_not_to(self, tmp_path: Path) -> None:
        fabric, model = _fabric(), nn.Linear(3, 1)
        saved = model.weight.detach().clone()
        fabric.save(tmp_path / "a.pt", {"model": model})
        _flip(tmp_path / "a.pt", saved.numpy().tobytes())
        nn.init.zeros_(model.weight)
        for load in (
            lambda: fabric.load(tmp_path / "a.pt", {"model": model}),
            lambda: fabric.load(tmp_path / "a.pt"),
            lambda: fabric.load_raw(tmp_path / "a.pt", model),
        ):
            with pytest.raises(DamagedCheckpointError, match=r"a\.pt' is damaged: the file has other content"):
                load()
        assert model.weight.tolist() == [[0, 0, 0]]
        fabric.load(tmp_path / "a.pt", {"model": model}, verify=False)
        assert not torch.equal(model.weight, saved)

    def test_goes_through_a_pipe_as_it_is(self, tmp_path: Path) -> None:
        os.symlink(os.devnull, tmp_path / "nowhere")
        _fabric().save(tmp_path / "nowhere", {"x": 1})
        assert os.listdir(tmp_path) == ["nowhere"]

    def test_does_not_replace_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        with pytest.raises(IsADirectoryError, match="there is a folder of that name"):
            _fabric().save(tmp_path / "a", {"x": 1})


class _Own(CheckpointIO):
    """As a user writes it, who knows nothing of staging."""

    paths: list[Any] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.paths.append(path)
        torch.save(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        self.paths.append(path)
        return torch.load(path)

    def remove_checkpoint(self, path: Any) -> None:
        raise NotImplementedError


class _Derived(TorchCheckpointIO):
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        _Own.paths.append(path)
        super().save_checkpoint(checkpoint, path, storage_options)


class TestOwnCode:
    @pytest.mark.parametrize("io", [_Own, _Derived])
    def test_a_checkpoint_io_gets_the_path_of_the_user(self, tmp_path: Path, io: Any) -> None:
        _Own.paths.clear()
        fabric = _fabric(plugins=io())
        fabric.save(tmp_path / "a.pt", {"x": 1})
        assert fabric.load(tmp_path / "a.pt") == {"x": 1}
        assert set(_Own.paths) == {tmp_path / "a.pt"}
        with pytest.raises(NotImplementedError, match="blocking=True"):
            fabric.save(tmp_path / "a.pt", {"x": 2}, blocking=False)

    def test_a_strategy_may_save_in_its_own_way(self, tmp_path: Path) -> None:
        class Loud(SingleDeviceStrategy):
            def save_checkpoint(self, path: Any, state: Any, storage_options: Any = None, filter: Any = None) -> None:
                super().save_checkpoint(path, {**state, "loud": True}, storage_options, filter)

        fabric = _fabric(strategy=Loud())
        fabric.save(tmp_path / "a.pt", {"x": 1})
        assert fabric.load(tmp_path / "a.pt") == {"x": 1, "loud": True}
        with pytest.raises(TypeError, match="options"):
            fabric.save(tmp_path / "a.pt", {"x": 1}, blocking=False)


class TestWhileTrainingGoesOn:
    def test_what_is_saved_is_what_was_there(self, tmp_path: Path) -> None:
        fabric = _fabric()
        model, optimizer = _trained(fabric)
        state = {"model": model, "optimizer": optimizer, "seen": [1]}
        fabric.save(tmp_path / "now.pt", state)
        fabric.save(tmp_path / "later.pt", state, blocking=False)
        state["seen"].append(2)
        for _ in range(20):
            _step(fabric, model, optimizer)
        fabric.save(tmp_path / "last.pt", state, blocking=False)
        loaded = fabric.load(tmp_path / "later.pt")  # waits for both
        _assert_equal(loaded, fabric.load(tmp_path / "now.pt"))
        assert loaded["seen"] == [1]
        assert fabric.load(tmp_path / "last.pt")["seen"] == [1, 2]

    def test_what_goes_wrong_is_raised_by_the_next_call(self, tmp_path: Path) -> None:
        fabric = _fabric()
        (tmp_path / "file").touch()
        fabric.save(tmp_path / "file" / "a.pt", {"x": 1}, blocking=False)
        with pytest.raises(OSError, match=r"Cannot save .*a\.pt"):
            fabric.save(tmp_path / "b.pt", {"x": 1})
        assert not (tmp_path / "b.pt").exists()
        fabric.save(tmp_path / "b.pt", {"x": 1}, blocking=False)
        assert fabric.load(tmp_path / "b.pt") == {"x": 1}


def _assert_equal(first: Any, second: Any) -> None:
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            _assert_equal(first[key], second[key])
    else:
        assert first == second


def _in_the_background(folder: str) -> dict[str, Any]:
    """On each of two ranks, for each strategy: what went wrong, and whether the file has what was there."""
    found = {}
    for strategy in ("ddp", "fsdp"):
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
        fabric.launch()
        model, optimizer = _trained(fabric)
        state = {"model": model, "optimizer": optimizer, "epoch": 1}
        fabric.save(f"{folder}/{strategy}-now", state)
        fabric.save(f"{folder}/{strategy}-later", state, blocking=False)
        for _ in range(20):  # with collectives of their own
            _step(fabric, model, optimizer)
        try:
            fabric.save(f"{folder}/file/a", state, blocking=False)
            fabric.load(f"{folder}/{strategy}-later", {"model": model})
        except OSError as error:
            found[strategy] = str(error)
        _step(fabric, model, optimizer)  # training can go on
        fabric.load(f"{folder}/{strategy}-later", state)
        fabric.save(f"{folder}/{strategy}-again", state)
    return found


def test_ranks_write_together_while_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for found in on_ranks(2, _in_the_background, str(tmp_path)):
        assert set(found) == {"ddp", "fsdp"}
        assert all("file" in text for text in found.values())
    fabric = _fabric()
    for strategy in ("ddp", "fsdp"):
        now, later, again = (fabric.load(tmp_path / f"{strategy}-{name}") for name in ("now", "later", "again"))
        _assert_equal(now, later)
        _assert_equal(now, again)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
