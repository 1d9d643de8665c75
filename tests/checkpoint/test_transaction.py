"""A path holds a whole checkpoint at any moment, whatever takes the place of what."""

import os

import pytest

from lightning.fabric.checkpoint import transaction as module
from lightning.fabric.checkpoint.manifest import attach, manifest_of, read_manifest
from lightning.fabric.checkpoint.transaction import Transaction, left_over, recover


def _make(path, content):
    """A file for a text, a folder for a list of texts."""
    if isinstance(content, str):
        path.write_text(content)
        return
    path.mkdir()
    for number, text in enumerate(content):
        (path / f"{number}.bin").write_text(text)


def _read(path):
    if not path.is_dir():
        return path.read_text()
    return [(path / name).read_text() for name in sorted(os.listdir(path)) if name.endswith(".bin")]


def _save(target, content):
    transaction = Transaction(target)
    _make(transaction.staged, content)
    transaction.commit(manifest_of(transaction.staged))


KINDS = ["text", ["some", "texts"]]


class TestCommit:
    @pytest.fixture(params=["exchange", "two renames"], autouse=True)
    def system(self, request, monkeypatch):
        if request.param == "two renames":
            monkeypatch.setattr(module, "_renameat2", lambda: None)

    @pytest.mark.parametrize("former", [None, *KINDS])
    @pytest.mark.parametrize("content", ["new text", ["new", "texts", "more"]])
    def test_puts_what_was_staged_in_place_of_anything(self, tmp_path, former, content):
        target = tmp_path / "checkpoint"
        if former is not None:
            _save(target, former)
        _save(target, content)
        assert _read(target) == content
        assert os.listdir(tmp_path) == ["checkpoint"]

    def test_through_a_link_replaces_what_it_points_to(self, tmp_path):
        _save(tmp_path / "real", ["old"])
        (tmp_path / "link").symlink_to(tmp_path / "real")
        _save(tmp_path / "link", ["new"])
        assert (tmp_path / "link").is_symlink()
        assert _read(tmp_path / "real") == ["new"]

    def test_a_failed_rename_leaves_what_was_there(self, tmp_path, monkeypatch):
        _save(tmp_path / "checkpoint", ["old"])
        transaction = Transaction(tmp_path / "checkpoint")  # nothing is staged, so that it cannot be renamed
        with pytest.raises(OSError, match="No such file"):
            transaction.commit(durable=False)
        assert _read(tmp_path / "checkpoint") == ["old"]


def test_abort_leaves_no_trace(tmp_path):
    _save(tmp_path / "checkpoint", ["old"])
    transaction = Transaction(tmp_path / "checkpoint")
    _make(transaction.staged, ["new"])
    transaction.abort()
    assert _read(tmp_path / "checkpoint") == ["old"]
    assert os.listdir(tmp_path) == ["checkpoint"]


class TestRecover:
    def _interrupted(self, tmp_path, name="checkpoint"):
        """As if killed between the two renames."""
        target = tmp_path / name
        _save(target, ["old"])
        former = module._beside(target, module._FORMER, "abcdefgh")
        os.rename(target, former)
        return target

    @pytest.mark.parametrize("name", ["checkpoint", "a [b] *?"])
    def test_puts_back_what_was_there(self, tmp_path, name):
        target = self._interrupted(tmp_path, name)
        recover(target)
        assert _read(target) == ["old"]

    def test_leaves_a_target_that_is_there(self, tmp_path):
        target = self._interrupted(tmp_path)
        _save(target, ["new"])
        recover(target)
        assert _read(target) == ["new"]

    def test_takes_nothing_that_is_not_whole(self, tmp_path):
        target = self._interrupted(tmp_path)
        former = left_over(target, module._FORMER)[0]
        (former / "manifest.json").write_text("{")
        recover(target)
        assert not target.exists()

    def test_of_nothing_does_nothing(self, tmp_path):
        recover(tmp_path / "missing" / "checkpoint")
        assert os.listdir(tmp_path) == []


def test_left_over_finds_what_a_killed_save_has_staged(tmp_path):
    transaction = Transaction(tmp_path / "checkpoint")
    _make(transaction.staged, ["half"])
    _make(tmp_path / ".checkpoint.other", "not ours")
    assert left_over(tmp_path / "checkpoint") == [transaction.staged]


def test_attach_is_part_of_the_commit(tmp_path):
    transaction = Transaction(tmp_path / "checkpoint")
    _make(transaction.staged, ["text"])
    manifest = manifest_of(transaction.staged, step=7)
    attach(transaction.staged, manifest)
    transaction.commit(manifest)
    assert read_manifest(tmp_path / "checkpoint") == manifest


class TestStale:
    def _stale(self, tmp_path):
        transaction = Transaction(tmp_path / "checkpoint")
        transaction.begin(is_folder=True)
        (transaction.staged / "half").write_text("of a file")
        transaction._unlock()  # as the system does when a process ends
        return transaction.staged

    def test_the_next_save_removes_what_a_killed_one_has_left(self, tmp_path):
        stale = self._stale(tmp_path)
        _save(tmp_path / "checkpoint", "text")
        assert stale.exists()  # of commits without a beginning nobody can tell
        transaction = Transaction(tmp_path / "checkpoint")
        transaction.begin(is_folder=False)
        assert not stale.exists()
        transaction.abort()
        assert os.listdir(tmp_path) == ["checkpoint"]

    def test_what_another_one_is_making_stays(self, tmp_path):
        first, second = Transaction(tmp_path / "checkpoint"), Transaction(tmp_path / "checkpoint")
        first.begin(is_folder=True)
        second.begin(is_folder=True)
        assert first.staged.is_dir()
        for transaction in (first, second):
            (transaction.staged / "0.bin").write_text("text")
            transaction.commit(manifest_of(transaction.staged))
        assert os.listdir(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("name", ["a" * 255, "字" * 85, "é" * 127])
def test_a_name_may_be_as_long_as_the_disk_takes(tmp_path, name):
    target = tmp_path / name
    _save(target, "text")
    Transaction(target).staged.touch()
    transaction = Transaction(target)
    transaction.begin(is_folder=False)
    _make(transaction.staged, "other")
    transaction.commit(manifest_of(transaction.staged))
    assert os.listdir(tmp_path) == [name], "and what was left over is found"
    assert _read(target) == "other"
