"""The manager of checkpoints: a run that was interrupted ends like one that was not."""

import os
import random
import time
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning.fabric import Fabric
from lightning.fabric.checkpoint import manifest
from lightning.fabric.checkpoint.directory import Best, CheckpointDirectory
from lightning.fabric.checkpoint.manifest import DamagedCheckpointError
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.precision import MixedPrecision
from lightning.fabric.testing import on_ranks, preload
from lightning.fabric.utilities.random_state import is_same, random_state
from lightning.fabric.utilities.sharded_folder import read_all

preload("torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.distributed.tensor.parallel")

EPOCHS = 2
SAMPLES = 7  # an incomplete batch at the end


class Noisy(Dataset):
    """Samples with an augmentation drawn by all three libraries."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        return torch.full((4,), float(index)) + noise


@dataclass(frozen=True)
class Run:
    """One way to train."""

    strategy: str = "auto"
    devices: int = 1
    num_workers: int = 0
    persistent: bool = False
    blocking: bool = True
    scaled: bool = False

    def setup(self):
        plugins = []
        if self.scaled:
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=2)
            plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
        fabric = Fabric(accelerator="cpu", strategy=self.strategy, devices=self.devices, plugins=plugins)
        fabric.launch()
        fabric.seed_everything(7 + fabric.global_rank, verbose=False)
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)
        model, optimizer = fabric.setup(model, optimizer)
        torch.manual_seed(100 + fabric.global_rank)
        loader = DataLoader(
            Noisy(),
            batch_size=2,
            shuffle=True,
            num_workers=self.num_workers,
            persistent_workers=self.persistent,
            multiprocessing_context="fork" if self.num_workers else None,
        )
        loader = fabric.setup_dataloaders(loader)
        state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader, "epoch": 0}
        return fabric, {**state, "seen": []}

    def train(self, folder, save_at=None, stop_at=None):
        """Resume, train, save at one step; stop at another as if killed."""
        fabric, state = self.setup()
        checkpoints = fabric.checkpoints(folder)
        step = checkpoints.resume(state) or 0
        for epoch in range(state["epoch"], EPOCHS):
            state["epoch"] = epoch
            for batch in state["loader"]:
                state["seen"] = [*state["seen"], batch[:, 0].tolist()]
                loss = state["model"](batch * (1 + random.random() + np.random.rand())).square().mean()
                fabric.backward(loss)
                state["optimizer"].step()
                state["optimizer"].zero_grad()
                state["scheduler"].step()
                step += 1
                if step == save_at:
                    checkpoints.save(step, state, blocking=self.blocking)
                if step == stop_at:
                    checkpoints.wait()
                    return None
            state["epoch"] = epoch + 1
        checkpoints.save(1000, state, blocking=self.blocking)
        checkpoints.wait()
        path = checkpoints.latest
        everything = read_all(path, weights_only=True) if path.is_dir() else torch.load(path, weights_only=True)
        return {**everything, "random now": random_state()}


def _differences(first, second, path=""):
    if isinstance(first, dict):
        keys = first.keys() | second.keys()
        return [text for key in keys for text in _differences(first.get(key), second.get(key), f"{path}/{key}")]
    return [] if is_same(first, second) else [path]


def _interrupted_and_not(run, folder, steps, last):
    """Return, for each of the ``steps`` to be interrupted at, what is different in the end."""
    folder = f"{folder}/{run}"
    whole = run.train(f"{folder}/whole")
    assert len(whole["seen"]) == last
    assert whole["loader"]["epoch"] == EPOCHS - 1
    found = {}
    for step in steps:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            run.train(f"{folder}/{step}", save_at=step, stop_at=min(step + 1, last))
            found[step] = _differences(whole, run.train(f"{folder}/{step}"))
    return found


SINGLE = [
    Run(),
    Run(scaled=True, blocking=False),
    Run(num_workers=2),
    Run(num_workers=2, persistent=True, blocking=False),
]


@pytest.mark.parametrize("run", SINGLE, ids=str)
def test_an_interrupted_run_ends_like_another(run, tmp_path):
    """Interrupted in the first epoch, after its last batch, and in the second."""
    assert _interrupted_and_not(run, tmp_path, [3, 4, 6], 8) == {3: [], 4: [], 6: []}


SEVERAL = [
    Run("ddp", 2, scaled=True),
    Run("ddp", 2, num_workers=2, blocking=False),
    Run("fsdp", 2, num_workers=2),
    Run("fsdp", 2, blocking=False),
]


def _on_two_ranks(folder):
    return {run: _interrupted_and_not(run, folder, [1, 2], 4) for run in SEVERAL}


@pytest.mark.slow
def test_an_interrupted_run_on_two_ranks_ends_like_another(tmp_path):
    for found in on_ranks(2, _on_two_ranks, str(tmp_path)):
        assert found == {run: {1: [], 2: []} for run in SEVERAL}


# -- other numbers of ranks


def _drawn():
    return [random.random(), np.random.rand(), torch.rand(()).item()]


def _fabric(devices=1, **options):
    fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", **options)
    fabric.launch()
    return fabric


def _on_other_ranks(devices, folder):
    """Resume what was saved on another number of ranks; return what is drawn, and the rest of the loader's epoch."""
    fabric = _fabric(devices)
    fabric.seed_everything(1, verbose=False)
    loader = fabric.setup_dataloaders(DataLoader(range(40), batch_size=2, shuffle=True))
    state = {"loader": loader, "epoch": 0, "seen": []}
    checkpoints = fabric.checkpoints(folder)
    step = checkpoints.resume(state)
    drawn, seen = _drawn(), []
    for batch in loader:
        seen += batch.tolist()
        if len(seen) == 4:
            fabric.seed_everything(10 + fabric.global_rank, verbose=False)
            checkpoints.save(100 if step is None else step + 1, {**state, "epoch": 3})
            break
    return step, state["epoch"], drawn, _drawn(), seen


def test_goes_on_with_more_and_fewer_ranks(tmp_path):
    folder = str(tmp_path / "run")
    saved = on_ranks(2, _on_other_ranks, 2, folder)
    more = on_ranks(3, _on_other_ranks, 3, folder)
    assert [(step, epoch) for step, epoch, *_ in more] == [(100, 3)] * 3
    assert [drawn for _, _, drawn, _, _ in more][:2] == [later for _, _, _, later, _ in saved]
    assert len({str(drawn) for _, _, drawn, _, _ in more}) == 3
    fewer = on_ranks(2, _on_other_ranks, 2, folder)
    assert [drawn for _, _, drawn, _, _ in fewer] == [later for _, _, _, later, _ in more][:2]
    seen = [index for ranks in (saved, more, fewer) for *_, mine in ranks for index in mine]
    assert len(set(seen)) == len(seen) == 4 * (2 + 3 + 2)  # of this epoch, nothing twice
    assert CheckpointDirectory(tmp_path / "run").entries()[0].manifest.world_size == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        *_, rest = _on_other_ranks(1, folder)  # which has another sampler, but goes on in the order of this epoch
    assert len(rest) == 4
    assert not set(rest) & set(seen)


def _with_own_orders(folder):
    """Go on after each kind of save; return how many batches were left, and what was warned of."""
    fabric = _fabric(2)
    checkpoints = fabric.checkpoints(folder + "/run")
    plain, run = folder + "/plain", folder + "/run"
    found = []
    for shuffle, save, load in [
        (True, lambda state: fabric.save(plain, state), lambda state: fabric.load(plain, state)),
        (True, lambda state: checkpoints.save(1, state), lambda state: fabric.load(run, state)),
        (True, lambda state: checkpoints.save(1, state), checkpoints.resume),
        (False, lambda state: fabric.save(plain, state), lambda state: fabric.load(plain, state)),
    ]:
        made = (DataLoader(range(8), batch_size=2, shuffle=shuffle) for _ in range(2))
        loader, other = (fabric.setup_dataloaders(each, use_distributed_sampler=False) for each in made)
        next(iter(loader))
        save({"loader": loader})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load({"loader": other})
            found.append((len(list(other)), [str(warning.message) for warning in caught]))
    return found


def test_ranks_with_orders_of_their_own_do_the_same_with_one_rank_s_position(tmp_path):
    first, second = on_ranks(2, _with_own_orders, str(tmp_path))
    assert [left for left, _ in first] == [left for left, _ in second] == [4, 4, 3, 3]
    assert [len(warned) for _, warned in first] == [1, 1, 0, 0]
    for _, (message,) in first[:2]:
        assert "each rank has an order of its own" in message
        assert "fabric.checkpoints(...)" in message


def _failing(folder):
    fabric = _fabric(2)
    checkpoints = fabric.checkpoints(folder)
    found = []
    for step, state in [(fabric.global_rank, {}), (1, {"loader": _Refusing(fabric)})]:
        try:
            checkpoints.save(step, state)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    checkpoints.save(2, {"x": 1})
    return found, [entry.step for entry in checkpoints], checkpoints.latest.name


def _Refusing(fabric):
    loader = fabric.setup_dataloaders(DataLoader(range(4)))
    if fabric.global_rank == 1:
        vars(loader)["_to_resume"] = 5  # so that its state cannot be had
    return loader


def test_what_fails_on_one_rank_is_raised_on_all_and_saves_nothing(tmp_path):
    (first, *rest), (second, *_) = on_ranks(2, _failing, str(tmp_path))
    assert "All ranks must save the same `step`, but they have [0, 1]" in first[0]
    assert "All ranks must save the same `step`" in second[0]
    assert first[1].startswith("RuntimeError: Rank 1 failed while saving step 1")
    assert second[1].startswith("TypeError")
    assert rest == [[2], "step-00000002"]


# -- which checkpoint, and which are kept


def _model_state(fabric):
    model = fabric.setup(nn.Linear(2, 2))
    return {"model": model, "count": 0}


def _fill(state, value):
    with torch.no_grad():
        state["model"].weight.fill_(value)
    return {**state, "count": value}


@pytest.fixture
def fabric():
    return _fabric()


def test_an_empty_folder_has_nothing_to_resume(fabric, tmp_path):
    checkpoints = fabric.checkpoints(tmp_path / "missing")
    state = {"count": 3}
    assert checkpoints.resume(state) is None
    assert (state, checkpoints.latest, checkpoints.entries(), list(checkpoints)) == ({"count": 3}, None, [], [])
    assert repr(checkpoints) == f"Checkpoints('{tmp_path}/missing')"
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("keep_best", [("loss", "min"), ("loss", "min", 1), Best("loss")])
def test_keeps_the_last_and_the_best(fabric, tmp_path, keep_best):
    checkpoints = fabric.checkpoints(tmp_path, keep_last=2, keep_best=keep_best)
    losses = [0.5, torch.tensor(0.1), np.float64(0.4), float("nan"), torch.tensor([0.2])]
    for step, loss in enumerate(losses):
        checkpoints.save(step, {"step": step}, {"loss": loss, "other": 1}, blocking=step % 2 == 0)
    checkpoints.wait()
    assert [entry.step for entry in checkpoints] == [4, 3, 1]
    assert checkpoints.entries()[2].manifest.metrics == pytest.approx({"loss": 0.1, "other": 1})
    assert checkpoints.latest == tmp_path / "step-00000004"
    assert fabric.load(checkpoints.latest)["step"] == 4


def test_latest_moves_after_the_commit_and_the_old_ones_go_last(fabric, tmp_path, monkeypatch):
    seen = []
    for name in ("set_latest", "retain"):
        original = getattr(CheckpointDirectory, name)

        def noting(self, *args, name=name, original=original):
            seen.append((name, sorted(entry.step for entry in self.entries()), self.latest()))
            return original(self, *args)

        monkeypatch.setattr(CheckpointDirectory, name, noting)
    checkpoints = fabric.checkpoints(tmp_path, keep_last=1)
    for blocking in (True, False):
        checkpoints.save(int(not blocking), {"x": 1}, blocking=blocking)
    checkpoints.wait()
    first, second = (tmp_path / f"step-0000000{step}" for step in (0, 1))
    assert seen == [
        ("set_latest", [0], None),
        ("retain", [0], first),
        ("set_latest", [0, 1], first),
        ("retain", [0, 1], second),
    ]


def test_damaged_ones_are_passed_over_by_name(fabric, tmp_path):
    state = _model_state(fabric)
    checkpoints = fabric.checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, _fill(state, step))
    content = bytearray(checkpoints.latest.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoints.latest.write_bytes(content)
    (tmp_path / "step-00000002").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="step-00000003.*passed over"),
        pytest.warns(UserWarning, match="step-00000002.*passed over"),
    ):
        assert checkpoints.resume(state) == 1
    assert (state["count"], state["model"].weight.unique().tolist()) == (1, [1.0])
    (tmp_path / "step-00000001").write_bytes(b"")
    with pytest.raises(DamagedCheckpointError, match="none of its 3 checkpoints is good"):
        checkpoints.resume(state)


def test_one_of_a_later_version_is_not_passed_over(fabric, tmp_path, monkeypatch):
    checkpoints = fabric.checkpoints(tmp_path)
    checkpoints.save(1, {"count": 1})
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_FORMAT", 2)
        checkpoints.save(2, {"count": 2})
    with pytest.raises(manifest.NewerCheckpointError, match="step-00000002' is of a later version"):
        checkpoints.resume({"count": 0})


def test_one_that_the_disk_does_not_give_is_passed_over_by_name(fabric, tmp_path, monkeypatch):
    checkpoints = fabric.checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"count": step})
    read = os.preadv

    def read_unless_broken(descriptor, *args):
        if os.path.samestat(os.fstat(descriptor), (tmp_path / "step-00000002").stat()):
            raise OSError(5, "Input/output error")
        return read(descriptor, *args)

    monkeypatch.setattr(os, "preadv", read_unless_broken)
    with pytest.warns(UserWarning, match="step-00000002.*Input/output error.*passed over"):
        assert checkpoints.resume({"count": 0}) == 1


class SlowIO(TorchCheckpointIO):
    to_any_path = True

    def write_checkpoint(self, checkpoint, path):
        time.sleep(0.5)
        super().write_checkpoint(checkpoint, path)


def test_one_that_is_being_saved_is_waited_for(tmp_path):
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[SlowIO()])
    checkpoints = fabric.checkpoints(tmp_path)
    checkpoints.save(1, {"count": 1}, blocking=False)
    assert checkpoints.resume(state := {"count": 0}) == 1
    assert state == {"count": 1}


class LegacyIO(TorchCheckpointIO):
    to_any_path = True

    def write_checkpoint(self, checkpoint, path):
        torch.save(checkpoint, path, _use_new_zipfile_serialization=False)


def test_what_can_hold_no_manifest_is_refused_when_it_is_saved(tmp_path):
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[LegacyIO()])
    with pytest.raises(ValueError, match="has to have a manifest"):
        fabric.checkpoints(tmp_path / "run").save(1, {"count": 1})
    assert os.listdir(tmp_path / "run") == []
    fabric.save(tmp_path / "a.pt", {"count": 1})
    assert fabric.load(tmp_path / "a.pt") == {"count": 1}


@pytest.mark.parametrize("content", ["step-00000009", "?", ""])
def test_latest_may_name_what_is_gone(fabric, tmp_path, content):
    checkpoints = fabric.checkpoints(tmp_path)
    checkpoints.save(1, {"count": 1})
    checkpoints.save(2, {"count": 2})
    (tmp_path / "latest").write_text(content)
    (tmp_path / "notes.txt").write_text("mine")
    assert checkpoints.latest is None
    assert checkpoints.resume(state := {"count": 0}) == 2
    assert state == {"count": 2}


def test_a_step_that_was_saved_is_replaced(fabric, tmp_path):
    checkpoints, others = fabric.checkpoints(tmp_path, keep_last=1), fabric.checkpoints(tmp_path, keep_last=1)
    for value, each in enumerate((checkpoints, others, checkpoints)):
        each.save(4, {"value": value})
    others.save(5, {"value": 5})
    assert [entry.step for entry in checkpoints] == [5]
    others.save(5, {"value": 6})
    assert checkpoints.resume(state := {"value": 0}) == 5
    assert state == {"value": 6}


def test_going_on_from_the_beginning_beside_later_steps_is_said(fabric, tmp_path):
    fabric.checkpoints(tmp_path).save(300, {"value": 300})
    forgetful = fabric.checkpoints(tmp_path, keep_last=1)
    with pytest.warns(UserWarning, match="has checkpoints of later steps than 1, up to 300.*call `resume` before"):
        forgetful.save(1, {"value": 1})
    forgetful.save(2, {"value": 2})
    assert 300 in [entry.step for entry in forgetful]


def test_old_checkpoints_that_cannot_be_deleted_are_a_warning(fabric, tmp_path, monkeypatch):
    checkpoints = fabric.checkpoints(tmp_path, keep_last=1)

    def refuse(self):
        raise PermissionError("not yours")

    monkeypatch.setattr(CheckpointDirectory, "retain", refuse)
    with pytest.warns(UserWarning, match="could not be deleted: not yours"):
        checkpoints.save(1, {})
    assert checkpoints.latest.name == "step-00000001"


def test_a_metric_that_is_missing_is_said(fabric, tmp_path):
    checkpoints = fabric.checkpoints(tmp_path, keep_best=("val_loss", "min"))
    checkpoints.save(1, {})
    with pytest.warns(UserWarning, match=r"kept by the metric 'val_loss', but `metrics` has \['loss'\]"):
        checkpoints.save(2, {}, {"loss": 1})


def test_what_is_not_the_managers_can_be_resumed_but_has_no_random_states(fabric, tmp_path):
    fabric.save(tmp_path / "step-00000007", {"value": 7})
    with pytest.warns(UserWarning, match="step 7 was not saved by `fabric.checkpoints"):
        assert fabric.checkpoints(tmp_path).resume(state := {"value": 0}) == 7
    assert state == {"value": 7}


def test_other_programs_read_it(fabric, tmp_path):
    state = _model_state(fabric)
    checkpoints = fabric.checkpoints(tmp_path)
    checkpoints.save(1, _fill(state, 2))
    rest = fabric.load(checkpoints.latest, {"model": state["model"]}, weights_only=True)
    assert rest["count"] == 2
    assert rest["_fabric"]["world_size"] == 1
    assert torch.load(checkpoints.latest, weights_only=True)["model"]["weight"].unique().tolist() == [2.0]
    with pytest.raises(KeyError, match="'other'"):
        checkpoints.resume({"other": 1})
    assert checkpoints.resume({"other": 1}, strict=False) == 1


def test_a_loader_goes_on_through_plain_save_and_load(fabric, tmp_path):
    loader, other = (fabric.setup_dataloaders(DataLoader(range(6), batch_size=2)) for _ in range(2))
    next(iter(loader))
    fabric.save(tmp_path / "plain", {"loader": loader})
    fabric.load(tmp_path / "plain", {"loader": other}, weights_only=True)
    assert [batch.tolist() for batch in other] == [[2, 3], [4, 5]]


def test_behind_a_url(fabric):
    pytest.importorskip("fsspec")
    checkpoints = fabric.checkpoints("memory://manager/run", keep_last=2)
    assert checkpoints.resume({}) is None
    for step in range(4):
        checkpoints.save(step, {"count": step})
    assert [entry.step for entry in checkpoints] == [3, 2]
    assert checkpoints.latest == "memory://manager/run/step-00000003"
    assert checkpoints.resume(state := {"count": 0}) == 3
    assert state == {"count": 3}


def test_the_seed_of_new_ranks_stays_that_of_the_run(fabric, tmp_path):
    checkpoints = fabric.checkpoints(tmp_path)
    checkpoints.save(1, {})
    checkpoints.save(2, {})
    again = fabric.checkpoints(tmp_path)
    again.resume({})
    again.save(3, {})
    seeds = {fabric.load(entry.path)["_fabric"]["seed"] for entry in again}
    assert len(seeds) == 1
    fabric.seed_everything(42, verbose=False)
    again.save(4, {})
    assert fabric.load(again.latest)["_fabric"]["seed"] == 42


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "`step` must be 0 or more, but got -1", (-1, {})),
        (TypeError, "`step` must be an integer, but got 1.5", (1.5, {})),
        (ValueError, "The key '_fabric' of the state is for", (1, {"_fabric": 1})),
        (TypeError, "`metrics` must be a dict", (1, {}, 0.5)),
        (TypeError, r"metrics\['loss'\] must be a number", (1, {}, {"loss": "low"})),
        (TypeError, r"metrics\['loss'\] must be a number", (1, {}, {"loss": torch.ones(2)})),
        (TypeError, "`save` needs a dict such as .*, but got 5", (1, 5)),
    ],
)
def test_wrong_arguments_are_refused(fabric, tmp_path, error, match, arguments):
    with pytest.raises(error, match=match):
        fabric.checkpoints(tmp_path / "run").save(*arguments)
    assert not (tmp_path / "run").exists()


def test_wrong_options_are_refused(fabric, tmp_path):
    with pytest.raises(ValueError, match="The key '_fabric'"):
        fabric.checkpoints(tmp_path).resume({"_fabric": 1})
    with pytest.raises(ValueError, match="`keep_last` must be at least 1"):
        fabric.checkpoints(tmp_path, keep_last=0)
    with pytest.raises(ValueError, match="'min' or the 'max'"):
        fabric.checkpoints(tmp_path, keep_best=("loss", "least"))
    with pytest.raises(TypeError, match="`keep_best` is the name of a metric with 'min' or 'max'.*'loss'"):
        fabric.checkpoints(tmp_path, keep_best="loss")
