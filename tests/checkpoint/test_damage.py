"""Damage of any file of a checkpoint is noticed when it is loaded, by its name; of several, the last good one is."""

import itertools
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning.fabric import Fabric
from lightning.fabric.checkpoint.directory import CheckpointDirectory
from lightning.fabric.checkpoint.manifest import MANIFEST, DamagedCheckpointError
from lightning.fabric.testing import flip, on_ranks, preload

preload("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint")


# ---- what is damaged ---------------------------------------------------------------------------------------------


def _model(value):
    """All of its weights differ, so that no file has the content of another one."""
    model = torch.nn.Linear(4, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(value + torch.arange(parameter.numel()).reshape(parameter.shape))
    return model


def _one():
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    return fabric


def _save_shards(folder):
    """On two ranks: shards of three steps; then what both say of some kinds of damage."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp")
    fabric.launch()
    directory = CheckpointDirectory(folder)
    for step in (1, 2, 3):
        model = fabric.setup_module(_model(step))
        fabric.save(directory.path_of(step), {"model": model, "step": step})
    return [
        _load_damaged(fabric, folder.parent, directory.path_of(3), file, model) for file in _files(directory.path_of(3))
    ]


def _load_damaged(fabric, folder, saved, file, model):
    copy = folder / f"damaged {file}"
    if fabric.is_global_zero:
        shutil.copytree(saved, copy)
        flip(copy / file, 10)
    fabric.barrier()
    try:
        fabric.load(copy, {"model": model, "step": 0})
    except DamagedCheckpointError as error:
        return file, error.file
    return file, "nothing"


def _files(path):
    """Every file of a checkpoint, by its path inside of it; of one in a file, that."""
    if path.is_file():
        return [""]
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders ``files`` and ``shards`` with three checkpoints each, and what two ranks say of damaged ones."""
    folder = tmp_path_factory.mktemp("made")
    fabric = _one()
    for step in (1, 2, 3):
        fabric.save(CheckpointDirectory(folder / "files").path_of(step), {"model": _model(step), "step": step})
    found = on_ranks(2, _save_shards, folder / "shards")
    return folder, found


@pytest.fixture(params=["files", "shards"])
def steps(request, made, tmp_path):
    """A folder of three checkpoints, to be damaged."""
    shutil.copytree(made[0] / request.param, tmp_path / "run")
    return CheckpointDirectory(tmp_path / "run")


@pytest.fixture
def saved(steps):
    """A checkpoint, to be damaged."""
    return steps.path_of(3)


def _expect_damage(path, file, **options):
    with pytest.raises(DamagedCheckpointError) as caught:
        _one().load(path, **options)
    assert (caught.value.file, caught.value.path) == (file, os.fspath(path))
    assert str(path) in str(caught.value)
    assert file in str(caught.value)


def _cut(path, left):
    data = path.read_bytes()
    path.write_bytes(data[:left])


def _append(path):
    with path.open("ab") as file:
        file.write(b"x")


CUTS = {
    "the first byte flipped": lambda path: flip(path, 0),
    "the last byte flipped": lambda path: flip(path, -1),
    "a byte in the middle flipped": lambda path: flip(path, path.stat().st_size // 2),
    "nothing left": lambda path: _cut(path, 0),
    "one byte left": lambda path: _cut(path, 1),
    "half of it left": lambda path: _cut(path, path.stat().st_size // 2),
    "the last byte gone": lambda path: _cut(path, -1),
    "a byte more": _append,
    "all bytes zero": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


# ---- one checkpoint ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", CUTS.values(), ids=CUTS)
def test_every_file_is_compared(saved, damage):
    for file in _files(saved):
        whole = (saved / file).read_bytes()
        damage(saved / file)
        _expect_damage(saved, file)
        (saved / file).write_bytes(whole)
    _one().load(saved)  # nothing else was wrong


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_byte_of_any_file_is_compared(made, tmp_path_factory, data):
    kind = data.draw(st.sampled_from(["files", "shards"]))
    path = CheckpointDirectory(made[0] / kind).path_of(3)
    file = data.draw(st.sampled_from(_files(path)))
    offset = data.draw(st.integers(0, (path / file).stat().st_size - 1))
    flip(path / file, offset)
    try:
        _expect_damage(path, file)
    finally:
        flip(path / file, offset)


def test_a_missing_file_is_named(made, tmp_path):
    saved = made[0] / "shards" / "step-00000003"
    for number, file in enumerate(set(_files(saved)) - {MANIFEST}):
        own = tmp_path / f"{number}"
        shutil.copytree(saved, own)
        (own / file).unlink()
        _expect_damage(own, file)


def test_the_manifest_is_missed_too(made, tmp_path):
    shutil.copytree(made[0] / "shards" / "step-00000003", tmp_path / "own")
    (tmp_path / "own" / MANIFEST).unlink()
    _expect_damage(tmp_path / "own", MANIFEST)


def test_files_that_changed_places_are_named(made, tmp_path):
    saved = made[0] / "shards" / "step-00000003"
    files = _files(saved)
    for number, (first, second) in enumerate(itertools.combinations(files, 2)):
        own = tmp_path / f"{number}"
        shutil.copytree(saved, own)
        os.rename(own / first, own / "other")
        os.rename(own / second, own / first)
        os.rename(own / "other", own / second)
        with pytest.raises(DamagedCheckpointError) as caught:
            _one().load(own)
        assert caught.value.file in (first, second)


def test_a_file_of_another_checkpoint_is_named(made, tmp_path):
    """As old as this one, as large, and whole: but not what was saved here."""
    shards = made[0] / "shards"
    shutil.copytree(shards / "step-00000003", tmp_path / "mixed")
    names = [name for name in _files(tmp_path / "mixed") if name.endswith(".distcp")]
    assert len(names) == 2
    for name in names:
        shutil.copy2(shards / "step-00000002" / name, tmp_path / "mixed" / name)
        _expect_damage(tmp_path / "mixed", name)
        shutil.copy2(shards / "step-00000003" / name, tmp_path / "mixed" / name)


def test_all_ranks_name_the_same_file(made):
    _, (found, also_found) = made
    assert found == also_found
    assert len(found) >= 5
    assert all(file == named for file, named in found)


def test_sizes_are_compared_even_without_checksums(saved):
    for file in _files(saved):
        whole = (saved / file).read_bytes()
        _cut(saved / file, -1)
        _expect_damage(saved, file, verify=False)
        (saved / file).write_bytes(whole)


# ---- many --------------------------------------------------------------------------------------------------------


def _step_of(directory, *warned):
    """The step that is loaded; with a warning for each of ``warned``, and no other one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = _one().load(directory.folder)["step"]
    texts = [str(each.message) for each in caught]
    assert len(texts) == len(warned), texts
    for text, (path, file) in zip(texts, warned, strict=True):
        assert re.search(f"{re.escape(str(path))}.*{re.escape(file)}", text), text
    return step


def test_the_last_good_one_is_loaded(steps):
    assert _step_of(steps) == 3
    damaged = []
    for step in (3, 2):
        for file in _files(steps.path_of(step)):
            whole = (steps.path_of(step) / file).read_bytes()
            for damage in CUTS.values():
                damage(steps.path_of(step) / file)
                assert _step_of(steps, *damaged, (steps.path_of(step), file)) == step - 1
                (steps.path_of(step) / file).write_bytes(whole)
        damaged.append((steps.path_of(step), _files(steps.path_of(step))[0]))
        flip(steps.path_of(step) / damaged[-1][1], 20)


def test_a_missing_file_of_the_last_one_leads_to_the_one_before(made, tmp_path):
    for number, file in enumerate(_files(made[0] / "shards" / "step-00000003")):
        directory = CheckpointDirectory(tmp_path / f"{number}")
        shutil.copytree(made[0] / "shards", directory.folder)
        (directory.path_of(3) / file).unlink()
        assert _step_of(directory, (directory.path_of(3), file)) == 2


def test_where_none_is_good_the_newest_is_named(steps):
    for step in (1, 2, 3):
        file = _files(steps.path_of(step))[0]
        flip(steps.path_of(step) / file, 20)
    with pytest.raises(DamagedCheckpointError, match="none of its 3 checkpoints is good") as caught:
        _one().load(steps.folder)
    assert caught.value.file == "/".join(["step-00000003", *filter(None, [_files(steps.path_of(3))[0]])])


def test_a_file_that_is_a_link_to_a_whole_one_is_fine(made, tmp_path):
    """As those who save space by links between checkpoints have it."""
    saved = made[0] / "shards" / "step-00000003"
    shutil.copytree(saved, tmp_path / "linked")
    for file in _files(saved):
        (tmp_path / "linked" / file).unlink()
        Path(tmp_path / "linked" / file).symlink_to(saved / file)
    assert _one().load(tmp_path / "linked")["step"] == 3
