"""Which checkpoint of a folder is the latest good one, and which are kept."""

import os
import shutil
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning.fabric.checkpoint import directory as module
from lightning.fabric.checkpoint.directory import Best, CheckpointDirectory, Entry
from lightning.fabric.checkpoint.manifest import Manifest, manifest_of
from lightning.fabric.checkpoint.transaction import Transaction


def _save(directory, step, **metrics):
    directory.folder.mkdir(exist_ok=True)
    transaction = Transaction(directory.path_of(step))
    transaction.staged.mkdir()
    (transaction.staged / "part").write_text(f"content of {step}")
    transaction.commit(manifest_of(transaction.staged, step=step, metrics=metrics), durable=False)
    directory.set_latest(directory.path_of(step), durable=False)
    return directory.retain()


def _steps(directory):
    return [entry.step for entry in directory.entries()]


def test_keeps_the_last_and_the_best(tmp_path):
    directory = CheckpointDirectory(tmp_path / "run", keep_last=2, keep_best=Best("loss"))
    for step, loss in enumerate([0.5, 0.1, 0.4, 0.3, 0.2]):
        _save(directory, step, loss=loss)
    assert _steps(directory) == [4, 3, 1]
    assert directory.latest() == directory.path_of(4)
    assert sorted(os.listdir(tmp_path / "run")) == ["latest", "step-00000001", "step-00000003", "step-00000004"]


def test_keeps_all_unless_told(tmp_path):
    directory = CheckpointDirectory(tmp_path / "run")
    assert [_save(directory, step) for step in range(4)] == [[], [], [], []]
    assert _steps(directory) == [3, 2, 1, 0]


entries = st.lists(
    st.tuples(st.integers(0, 50), st.none() | st.integers(-3, 3), st.booleans()), unique_by=lambda row: row[0]
)


@given(entries, st.integers(1, 3), st.integers(1, 3), st.sampled_from(["min", "max"]))
def test_what_is_removed_is_neither_new_nor_good_nor_damaged(tmp_path_factory, rows, last, count, mode):
    directory = CheckpointDirectory(tmp_path_factory.getbasetemp(), last, Best("loss", mode, count))
    found = [
        Entry(
            directory.path_of(step),
            step,
            Manifest({}, metrics={} if loss is None else {"loss": loss}) if is_whole else None,
        )
        for step, loss, is_whole in sorted(rows, reverse=True)
    ]
    gone = directory.to_remove(found)
    whole = [entry for entry in found if entry.manifest is not None]
    kept = [entry for entry in whole if entry not in gone]
    assert all(entry.manifest is not None for entry in gone)
    assert kept[:last] == whole[:last]
    losses = [entry.manifest.metrics["loss"] for entry in whole if entry.manifest.metrics]
    best = sorted(losses, reverse=mode == "max")[:count]
    kept_losses = [entry.manifest.metrics["loss"] for entry in kept if entry.manifest.metrics]
    assert sorted(kept_losses, reverse=mode == "max")[: len(best)] == best
    assert len(kept) <= last + count


def test_the_newest_good_one_comes_before_damaged_ones(tmp_path):
    directory = CheckpointDirectory(tmp_path / "run")
    for step in range(3):
        _save(directory, step)
    (directory.path_of(2) / "part").write_text("CONTENT of 2")
    (directory.path_of(1) / "manifest.json").write_text("{}")
    found = [(entry.step, error and error.file) for entry, error in directory.good()]
    assert found == [(2, "part"), (1, "manifest.json"), (0, None)]


def test_one_that_was_being_replaced_is_put_back(tmp_path):
    directory = CheckpointDirectory(tmp_path / "run")
    _save(directory, 5)
    os.rename(directory.path_of(5), directory.folder / ".step-00000005.0a0b0c0d.former")
    assert [entry.step for entry, error in directory.good() if error is None] == [5]


@pytest.mark.parametrize("content", ["", "step-00000009", "../elsewhere", "/etc"])
def test_latest_that_names_no_checkpoint_is_none(tmp_path, content):
    directory = CheckpointDirectory(tmp_path)
    (tmp_path / "latest").write_text(content)
    assert directory.latest() is None


def test_of_metrics_that_are_not_numbers_none_is_best(tmp_path):
    directory = CheckpointDirectory(tmp_path / "run", keep_last=1, keep_best=Best("loss", "max", 2))
    for step, loss in enumerate([0.5, float("nan"), float("inf"), 0.5, float("nan"), -1.0]):
        _save(directory, step, loss=loss)
    assert _steps(directory) == [5, 3, 2]  # of equal ones the newer


def test_with_the_best_alone_the_newest_stays_too(tmp_path):
    directory = CheckpointDirectory(tmp_path / "run", keep_best=Best("loss"))
    for step, loss in enumerate([0.5, 0.1, 0.4, 0.3]):
        _save(directory, step, loss=loss)
    assert _steps(directory) == [3, 1]


def _save_at(directory, step, minute, monkeypatch):
    monkeypatch.setattr(
        directory, "_times", {**getattr(directory, "_times", {}), step: f"2026-01-01T00:{minute:02d}:00"}, raising=False
    )
    directory.folder.mkdir(exist_ok=True)
    transaction = Transaction(directory.path_of(step))
    transaction.staged.mkdir()
    (transaction.staged / "part").write_text(f"content of {step}")
    transaction.commit(replace(manifest_of(transaction.staged, step=step), time=directory._times[step]), durable=False)
    directory.set_latest(directory.path_of(step), durable=False)
    return directory.retain()


def test_what_a_run_that_went_back_has_left_behind_is_older_and_stays(tmp_path, monkeypatch):
    directory = CheckpointDirectory(tmp_path / "run", keep_last=2)
    for minute, step in enumerate([10, 20, 30, 12, 14, 16]):
        _save_at(directory, step, minute, monkeypatch)
    assert _steps(directory) == [16, 14, 30, 20]
    assert [entry.step for entry, _ in directory.good()] == [16, 14, 30, 20]
    _save_at(directory, 31, 9, monkeypatch)
    assert _steps(directory) == [31, 16]  # not 30, of the run that was left


def test_one_that_was_committed_when_the_process_was_killed_is_the_newest(tmp_path, monkeypatch):
    directory = CheckpointDirectory(tmp_path / "run")
    _save_at(directory, 1, 1, monkeypatch)
    _save_at(directory, 2, 2, monkeypatch)
    directory.set_latest(directory.path_of(1))
    assert _steps(directory) == [2, 1]


def test_without_latest_the_later_step_is_newer(tmp_path, monkeypatch):
    directory = CheckpointDirectory(tmp_path / "run")
    for minute, step in enumerate([3, 1]):
        _save_at(directory, step, minute, monkeypatch)
    assert _steps(directory) == [1, 3]
    for damage in (
        lambda latest: latest.unlink(),
        lambda latest: latest.write_bytes(b"\xff\xfe"),
        lambda latest: (latest.unlink(), latest.mkdir()),
    ):
        damage(directory.folder / "latest")
        assert _steps(directory) == [3, 1]


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    directory = CheckpointDirectory(tmp_path / "run", keep_last=1)
    directory.folder.mkdir()
    for name in ("notes.txt", "step-3", "step-00000001.bak", ".hidden", "step-0000000x"):
        (directory.folder / name).write_text("mine")
    directory.path_of(7).mkdir()  # of somebody's own, without a manifest
    _save(directory, 8)
    _save(directory, 9)
    assert {"notes.txt", "step-3", "step-00000001.bak", ".hidden", "step-0000000x", "step-00000007"} < {
        path.name for path in directory.folder.iterdir()
    }
    assert _steps(directory) == [9, 7]
    assert [entry.step for entry, error in directory.good() if error is None] == [9]


def test_what_killed_saves_left_is_deleted_by_the_next_one(tmp_path):
    directory = CheckpointDirectory(tmp_path / "run", keep_last=1)
    _save(directory, 1)
    for name in ("step-00000002.0a0b0c0d.staged", "step-00000000.removed", "step-00000001.0a0b0c0d.former"):
        (directory.folder / f".{name}").mkdir()
    alive = Transaction(directory.path_of(3))
    alive.begin(is_folder=True)
    _save(directory, 2)
    assert {path.name for path in directory.folder.iterdir()} == {"latest", "step-00000002", alive.staged.name}
    alive.abort()


def test_an_empty_folder_has_none(tmp_path):
    directory = CheckpointDirectory(tmp_path / "missing")
    assert (directory.entries(), directory.latest(), list(directory.good())) == ([], None, [])


def test_wrong_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`keep_last` must be at least 1"):
        CheckpointDirectory(tmp_path, keep_last=0)
    with pytest.raises(ValueError, match="'min' or the 'max', but got 'least'"):
        Best("loss", "least")
    with pytest.raises(ValueError, match="`count`"):
        Best("loss", count=0)


@pytest.mark.parametrize("count", [2.0, True, "3"])
def test_what_counts_nothing_is_refused(tmp_path, count):
    with pytest.raises(TypeError, match="`keep_last` must be an integer"):
        CheckpointDirectory(tmp_path, keep_last=count)
    with pytest.raises(TypeError, match="`count` of the best to keep must be an integer"):
        Best("loss", count=count)


def test_a_link_that_leads_nowhere_is_damaged_and_stays(tmp_path):
    directory = CheckpointDirectory(tmp_path / "run", keep_last=1)
    _save(directory, 1)
    directory.path_of(2).symlink_to(tmp_path / "unmounted" / "step-00000002")
    (broken, damage), (good, none) = directory.good()
    assert (broken.step, good.step, none) == (2, 1, None)
    assert "cannot be read: No such file or directory" in str(damage)
    _save(directory, 3)
    assert _steps(directory) == [3, 2]


def test_one_that_goes_meanwhile_is_not_there(tmp_path, monkeypatch):
    directory = CheckpointDirectory(tmp_path / "run")
    _save(directory, 1)
    _save(directory, 2)
    read = module.read_manifest

    def read_when_it_has_gone(path):
        if path.name == "step-00000001":
            shutil.rmtree(path)
            (path / "part").read_text()
        return read(path)

    monkeypatch.setattr(module, "read_manifest", read_when_it_has_gone)
    assert _steps(directory) == [2]
