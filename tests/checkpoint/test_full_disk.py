"""A full disk: every rank says so, training goes on, the former checkpoint is whole, and nothing is left behind."""

import atexit
import contextlib
import errno
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lightning.fabric import Fabric
from lightning.fabric.checkpoint import transaction
from lightning.fabric.checkpoint.manifest import read_manifest, verify
from lightning.fabric.checkpoint.saving import OneRank, Prepared, SaveOptions, Written, save
from lightning.fabric.checkpoint.transaction import recover
from lightning.fabric.testing import Forked, fail, fault_at, file_size_limit, on_ranks, preload, write_points

preload("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint")

KIB = 1 << 10
FREE = 64 * KIB  # on a full disk: less than a checkpoint takes


# ---- disks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SmallDisk:
    """A file system of four MiB, mounted at ``folder``."""

    folder: Path

    @contextlib.contextmanager
    def full(self, fabric):
        """For all ranks."""
        ballast = self.folder / "ballast"
        if fabric.is_global_zero:
            ballast.write_bytes(bytes(shutil.disk_usage(self.folder).free - FREE))
        fabric.barrier()
        yield
        fabric.barrier()
        if fabric.is_global_zero:
            ballast.unlink()
        fabric.barrier()


@dataclass(frozen=True)
class Limit:
    """No file in ``folder`` may be large, if some ranks write it."""

    folder: Path
    ranks: tuple[int, ...] = (0, 1)

    @contextlib.contextmanager
    def full(self, fabric):
        with file_size_limit(FREE) if fabric.global_rank in self.ranks else contextlib.nullcontext():
            yield
        fabric.barrier()


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    for become_root in ([], ["sudo", "-n"]):
        with contextlib.suppress(FileNotFoundError):
            mount = [*become_root, "mount", "-t", "tmpfs", "-o", "size=4m,mode=1777", "tmpfs", folder]
            if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
                yield SmallDisk(folder)
                subprocess.run([*become_root, "umount", "-l", folder], check=True)
                return
    pytest.skip("mounting a small file system is not permitted here")


# ---- on the ranks ------------------------------------------------------------------------------------------------


def _model(value):
    model = torch.nn.Linear(200, 200)  # 160 kB
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def _run(disk, strategy, devices=2):
    """Save before, while and after the disk is full; return what was raised."""
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy)
    fabric.launch()
    model = fabric.setup_module(_model(1))
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    path = disk.folder / strategy
    fabric.save(path, {"model": model, "step": 1})

    with disk.full(fabric):
        errors = [_error_of(fabric.save, path, {"model": model, "step": 2}) for _ in range(2)]
        fabric.barrier()
        assert sorted(os.listdir(disk.folder)) in ([strategy], ["ballast", strategy])
        fabric.barrier()
        assert _step_at(fabric, path) == 1
        _train(fabric, model, optimizer)

        # in the background: what goes wrong is said when the next one is saved, and is over then
        assert _error_of(fabric.save, path, {"model": model, "step": 3}, blocking=False) is None
        _train(fabric, model, optimizer)
        errors.append(_error_of(fabric.save, path, {"model": model, "step": 4}, blocking=False))
        fabric.barrier()
        assert _step_at(fabric, path) == 1

    for step, blocking in ((5, True), (6, False)):
        fabric.save(path, {"model": model, "step": step}, blocking=blocking)
        assert _step_at(fabric, path) == step
    fabric.barrier()
    assert os.listdir(disk.folder) == [strategy]
    fabric.barrier()
    if fabric.is_global_zero:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    fabric.barrier()
    return [f"{type(error).__name__}: {error}" for error in errors]


def _error_of(act, *args, **options):
    try:
        act(*args, **options)
    except Exception as error:
        return error
    return None


def _step_at(fabric, path):
    state = {"model": fabric.setup_module(_model(0)), "step": 0}
    fabric.load(path, state)
    return state["step"]


def _train(fabric, model, optimizer):
    before = [parameter.detach().clone() for parameter in model.parameters()]
    fabric.backward(model(torch.ones(2, 200)).sum())
    optimizer.step()
    optimizer.zero_grad()
    assert not torch.equal(next(iter(before)), next(iter(model.parameters())).detach())


def _run_all(runs):
    return [_run(disk, strategy) for disk, strategy in runs]


# ---- what they say -----------------------------------------------------------------------------------------------


def _assert_clear(of_ranks, failing):
    """Every rank has an error for each save; those of ``failing`` the disk's, the others one that names such a rank."""
    for rank, errors in enumerate(of_ranks):
        assert len(errors) == 3
        for error in errors:
            assert "No space left on device" in error or "File too large" in error, error
            if rank not in failing:
                assert any(f"Rank {other} failed" in error for other in failing), error


@pytest.mark.slow
def test_a_small_disk(small_disk):
    of_ranks = on_ranks(2, _run_all, [(small_disk, "ddp"), (small_disk, "fsdp")])
    _assert_clear([errors for errors, _ in of_ranks], failing=[0])
    for error in of_ranks[0][0]:
        assert str(small_disk.folder) in error
    _assert_clear([errors for _, errors in of_ranks], failing=[0, 1])


@pytest.mark.slow
def test_the_disk_of_one_rank(tmp_path):
    runs = {}
    for strategy, failing in (("ddp", 0), ("fsdp", 1)):
        (tmp_path / strategy).mkdir()
        runs[failing] = (Limit(tmp_path / strategy, (failing,)), strategy)
    of_ranks = on_ranks(2, _run_all, [*runs.values()])
    for number, failing in enumerate(runs):
        _assert_clear([errors[number] for errors in of_ranks], failing=[failing])


# ---- an error of the disk, anywhere ------------------------------------------------------------------------------


def _write_parts(value):
    def write(staged):
        for name in ("a", "b"):
            (staged / name).write_text(f"{value}")
        return Written(["a", "b"])

    return Prepared(write, is_folder=True)


def _write_file(value):
    def write(staged):
        torch.save(value, staged)
        return Written([""])

    return Prepared(write)


@pytest.mark.parametrize("prepared", [_write_parts, _write_file])
@pytest.mark.parametrize("exchanges", [True, False])
def test_an_error_anywhere_leaves_the_former_one_or_the_new_one(tmp_path, prepared, exchanges, monkeypatch):
    if not exchanges:
        monkeypatch.setattr(transaction, "_renameat2", lambda: None)
    target = tmp_path / "run" / "checkpoint"
    save(prepared(0), target, SaveOptions(step=0), OneRank())
    with write_points(tmp_path) as points:
        save(prepared(0), target, SaveOptions(step=0), OneRank())
    failed = 0
    for number in range(len(points)):
        step = 2 * number + 1
        with fault_at(number, tmp_path, fail()):
            error = _error_of(save, prepared(step), target, SaveOptions(step=step), OneRank())
        recover(target)
        manifest = read_manifest(target)
        verify(target, manifest)
        if error is None:  # it did not matter
            assert manifest.step == step, points[number]
        else:
            assert (type(error), error.errno) == (OSError, errno.ENOSPC)
            assert str(target) in str(error)
            assert manifest.step in (step - 1, step), points[number]
            failed += 1
        save(prepared(step + 1), target, SaveOptions(step=step + 1), OneRank())
        assert os.listdir(target.parent) == ["checkpoint"], points[number]
    assert failed > len(points) // 2


# ---- the end of a process ----------------------------------------------------------------------------------------


def _end_while_full(folder):
    return [Forked(_save_and_end, folder, f"{folder / f'{number}.txt'}").wait().code for number in range(2)]


def _save_and_end(folder, output):
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 2)
    fabric = Fabric(accelerator="cpu", devices=1)
    with file_size_limit(FREE if output.endswith("0.txt") else 1 << 30):
        fabric.save(folder / "checkpoint", {"model": fabric.setup_module(_model(1))}, blocking=False)
        atexit._run_exitfuncs()  # as an interpreter does at its end, which a fork does not see


def test_the_end_of_a_process_says_it_too(tmp_path):
    assert on_ranks(1, _end_while_full, tmp_path) == [[1, 0]]
    said, nothing = (tmp_path / "0.txt").read_text(), (tmp_path / "1.txt").read_text()
    assert "checkpoint could not be saved" in said
    assert str(tmp_path / "checkpoint") in said
    assert nothing == ""
