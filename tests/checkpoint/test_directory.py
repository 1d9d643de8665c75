"""Which checkpoint of a folder is the latest good one, and which are kept."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
