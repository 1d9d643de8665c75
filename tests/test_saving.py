"""`Fabric.save` and `load`: what is described and verified, and what is written while training goes on."""

import multiprocessing
import os
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning.fabric import Fabric
from lightning.fabric.checkpoint import DamagedCheckpointError, pickling, read_manifest
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.strategies import SingleDeviceStrategy
from lightning.fabric.testing import on_ranks, preload
from lightning.fabric.utilities.warnings import PossibleUserWarning

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
        except (OSError, RuntimeError) as error:  # on rank 0, on the other one
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


# -- what goes wrong, and what ends meanwhile


class SlowIO(TorchCheckpointIO):
    """Whose writing takes a while."""

    to_any_path = True

    def write_checkpoint(self, checkpoint: dict[str, Any], path: Path) -> None:
        time.sleep(0.5)
        super().write_checkpoint(checkpoint, path)


def _save_and_return(fabric: Fabric, path: str) -> None:
    fabric.save(path, {"x": 1}, blocking=False)


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_a_launch_that_ends_waits_for_what_is_being_saved(tmp_path: Path, strategy: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, plugins=[SlowIO()])
    fabric.launch(_save_and_return, str(tmp_path / "a.pt"))
    assert _fabric().load(tmp_path / "a.pt") == {"x": 1}


def _save_something_else(fabric: Fabric, path: str) -> None:
    fabric.save(path, {"x": lambda: 0}, blocking=False)


def test_a_launch_fails_with_what_is_being_saved(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, strategy="ddp_fork")
    with pytest.raises(RuntimeError, match=r"state\['x'\] does not pickle"):
        fabric.launch(_save_something_else, str(tmp_path / "a.pt"))


@pytest.mark.parametrize(("target", "code"), [(_save_and_return, 0), (_save_something_else, 1)])
def test_a_forked_process_ends_when_it_is_saved(tmp_path: Path, target: Any, code: int) -> None:
    fabric = _fabric(plugins=[SlowIO()])
    process = multiprocessing.get_context("fork").Process(target=target, args=(fabric, str(tmp_path / "a.pt")))
    process.start()
    process.join(60)
    assert process.exitcode == code
    assert (tmp_path / "a.pt").exists() == (code == 0)


def test_a_relative_path_is_of_the_time_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    fabric = _fabric(plugins=[SlowIO()])
    checkpoints = fabric.checkpoints("run")
    fabric.save("a.pt", {"x": 1}, blocking=False)
    os.chdir("elsewhere")
    checkpoints.save(1, {"x": 1}, blocking=False)
    checkpoints.wait()
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "elsewhere", "run"]
    assert os.listdir(".") == []


class FailsOnRank1:
    """State that one rank can neither give nor take."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.is_broken = True

    def state_dict(self) -> dict[str, Any]:
        if self.rank and self.is_broken:
            raise ValueError("out of order")
        return {"x": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state_dict()


def _with_one_rank_that_fails(folder: str) -> list[str]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    rank = fabric.global_rank
    part, checkpoints, path = FailsOnRank1(rank), fabric.checkpoints(f"{folder}/run"), f"{folder}/a.pt"
    part.is_broken = False
    fabric.save(path, {"part": part})
    checkpoints.save(1, {"part": part}, metrics={"loss": None if rank else 1.0})  # those of rank 0 count
    part.is_broken = True
    missing = {"other" if rank else "part": 1}
    errors = []
    for act in (
        lambda: fabric.save(path, {"part": part}),
        lambda: fabric.save(path, {"part": part}, blocking=False),
        lambda: fabric.save(None if rank else path, {}),  # type: ignore[arg-type]
        lambda: fabric.save(path, {"x": 1}, filter={"y": bool} if rank else None),  # type: ignore[dict-item]
        lambda: fabric.load(path, {"part": part}),
        lambda: fabric.load(path, missing),
        lambda: checkpoints.resume({"part": part}),
        lambda: checkpoints.resume(missing),
        lambda: checkpoints.resume(None if rank else {}),  # type: ignore[arg-type]
        lambda: checkpoints.save("two" if rank else 2, {}),  # type: ignore[arg-type]
    ):
        try:
            act()
            errors.append("none")
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    fabric.save(path, {"still": "in order"})
    return errors


def test_all_ranks_fail_with_one(tmp_path: Path) -> None:
    other, own = on_ranks(2, _with_one_rank_that_fails, str(tmp_path))
    for of_0, of_1 in zip(other, own, strict=True):
        assert of_0.startswith("RuntimeError: Rank 1 failed while ")
        assert of_0.endswith(of_1)


def _to_a_folder_of_its_own(folder: str) -> str:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp")
    fabric.launch()
    model, _ = _trained(fabric)
    with pytest.raises((OSError, RuntimeError)) as caught:
        fabric.save(f"{folder}/disk-of-{fabric.global_rank}/a", {"model": model})
    return str(caught.value)


def test_ranks_that_do_not_share_a_folder_are_told(tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / f"disk-of-{rank}").mkdir()
    for text in on_ranks(2, _to_a_folder_of_its_own, str(tmp_path)):
        assert "on a disk that they share" in text
    assert not [*tmp_path.glob("*/*"), *tmp_path.glob("*/.*")]


@pytest.mark.parametrize("blocking", [True, False])
def test_what_does_not_pickle_is_named(tmp_path: Path, blocking: bool) -> None:
    fabric = _fabric()
    with pytest.raises(Exception, match=r"state\['x'\] does not pickle: .*lambda"):
        fabric.save(tmp_path / "a.pt", {"ok": torch.ones(2), "x": {"y": lambda: 0}}, blocking=blocking)
        fabric.strategy.wait_for_saves()


def test_what_loading_refuses_is_said_when_it_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickling, "_refused_by_default", {})
    state = {"plain": [1, {"a": (None, 2.0, b"x", torch.Size([1]))}], "scores": [np.float64(1.0)]}
    with pytest.warns(PossibleUserWarning, match=r"state\['scores'\] has a numpy.float64.*weights_only=False"):
        _fabric().save(tmp_path / "a.pt", state)
    _fabric().save(tmp_path / "a.pt", state)  # once
    with pytest.raises(pickle.UnpicklingError):
        _fabric().load(tmp_path / "a.pt")


def test_a_loader_that_is_not_set_up_is_refused(tmp_path: Path) -> None:
    fabric, state = _fabric(), {"loader": DataLoader([1, 2])}
    with pytest.raises(TypeError, match=r"state\['loader'\] is a DataLoader that is not set up"):
        fabric.save(tmp_path / "a.pt", state)
    fabric.save(tmp_path / "a.pt", {"loader": fabric.setup_dataloaders(DataLoader([1, 2]))})
    with pytest.raises(TypeError, match=r"state\['loader'\] is a DataLoader that is not set up"):
        fabric.load(tmp_path / "a.pt", state)


def test_an_optimizer_with_its_parameters_in_another_order_is_refused(tmp_path: Path) -> None:
    fabric, layer = _fabric(), nn.Linear(4, 3)
    optimizer = torch.optim.SGD([layer.weight, layer.bias], lr=0.1, momentum=0.9)
    layer(torch.ones(4)).sum().backward()
    optimizer.step()
    fabric.save(tmp_path / "a.pt", {"optimizer": optimizer})
    other = torch.optim.SGD([layer.bias, layer.weight], lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"'momentum_buffer' of the shape \(3, 4\) for parameter 0, which has \(3,\)"):
        fabric.load(tmp_path / "a.pt", {"optimizer": other})
    assert not other.state


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("these are notes")
    with pytest.raises(RuntimeError, match=r"Cannot read '.*notes.txt'"):
        _fabric().load(tmp_path / "notes.txt")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_file_takes_the_place_of_a_checkpoint_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    torch.distributed.checkpoint.save({"x": torch.ones(2)}, checkpoint_id=folder, no_dist=True)
    (folder / "mine.txt").touch()
    with pytest.raises(IsADirectoryError, match="with other things in it"):
        _fabric().save(folder, {"x": 1})
    (folder / "mine.txt").unlink()
    _fabric().save(folder, {"x": 1})
    assert _fabric().load(folder) == {"x": 1}
