"""A file behind a URL is whole or not there, whatever the network does; errors name the URL."""

import os
import tempfile

import pytest
import torch
from tests.checkpoint.faulty_filesystem import (
    DEATHS,
    FAILURES,
    SILENT,
    FaultyFileSystem,
    FaultyObjectStore,
    Killed,
)

from lightning.fabric.utilities import remote_files
from lightning.fabric.utilities.cloud_io import _atomic_save, _load
from lightning.fabric.utilities.remote_files import Remote, delete_folder, for_each, is_inside, retried


@pytest.fixture(params=[FaultyFileSystem, FaultyObjectStore], ids=["disk", "store"])
def system(request, monkeypatch, tmp_path):
    request.param.clear()
    monkeypatch.setattr(remote_files, "_PAUSE", 0)
    monkeypatch.setattr(remote_files, "OBJECT_STORES", {FaultyObjectStore.protocol})
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield request.param
    assert os.listdir(tmp_path) == []


class TestAtomicSave:
    """Of ``torch.save`` to a URL."""

    @pytest.fixture
    def url(self, system):
        return f"{system.protocol}://runs/a.ckpt"

    def _attempt(self, url, system, faults):
        """Save 2 over 1 while something goes wrong, looking after every change; return what is there, and the error."""
        system.clear()
        _atomic_save(torch.tensor(1), url)
        old = system.content()["/runs/a.ckpt"]
        system.faults.clear()
        system.faults.due = faults
        seen, error = [], None
        system.faults.after = lambda name, path: seen.append(system.content()["/runs/a.ckpt"])
        try:
            _atomic_save(torch.tensor(2), url)
        except (OSError, Killed) as raised:
            error = raised
        count = len(system.faults.operations)
        system.faults.clear()
        found = int(_load(url))
        assert all(data == old or data == system.content()["/runs/a.ckpt"] for data in seen)
        return found, error, count

    def test_overcomes_one_fault_at_any_operation(self, url, system):
        _, _, count = self._attempt(url, system, {})
        for number in range(count):
            for act in (*FAILURES, *SILENT):
                assert self._attempt(url, system, {number: act})[:2] == (2, None)
                assert list(system.content()) == ["/runs/a.ckpt"]

    def test_leaves_the_old_or_the_new_one_if_the_fault_lasts(self, url, system):
        _, _, count = self._attempt(url, system, {})
        found = set()
        for number in range(count):
            for act in FAILURES:
                step, error, _ = self._attempt(url, system, dict.fromkeys(range(number, number + 100), act))
                assert step == 2 or (url in str(error) and "network is down" in str(error))
                found.add(step)
        assert found == {1, 2}

    @pytest.mark.parametrize("act", DEATHS)
    def test_leaves_the_old_or_the_new_one_when_killed(self, url, system, act):
        _, _, count = self._attempt(url, system, {})
        found = {self._attempt(url, system, {number: act})[0] for number in range(count)}
        assert found == ({2} if (act, system.shows_halves) == ("dies late", False) else {1, 2})

    def test_where_no_file_may_replace_another_says_so(self, url, system, monkeypatch):
        if not system.shows_halves:
            pytest.skip("an object store replaces")

        def refuse(self, source, target):
            raise FileExistsError(target)

        monkeypatch.setattr(system, "mv", refuse)
        with pytest.raises(
            NotImplementedError, match=rf"Cannot write '{url}': this file system does not let a file take"
        ):
            _atomic_save(torch.tensor(1), url)
        assert system.content() == {}

    def test_uses_the_rename_of_those_that_have_one(self, url, system, monkeypatch):
        moved = []

        def move(self, source, target):
            moved.append(target)
            self.store[target] = self.store.pop(source)

        monkeypatch.setattr(system, "mv", move)
        _atomic_save(torch.tensor(1), url)
        assert moved == (["/runs/a.ckpt"] if system.shows_halves else [])
        assert int(_load(url)) == 1


class TestRetried:
    @pytest.fixture(autouse=True)
    def _no_pause(self, monkeypatch):
        monkeypatch.setattr(remote_files, "_PAUSE", 0)

    def _failing(self, times, error):
        calls = []

        def act():
            calls.append(1)
            if len(calls) <= times:
                raise error
            return len(calls)

        return act, calls

    def test_tries_four_times(self):
        assert retried(self._failing(3, ConnectionError("down"))[0], "read 'a://b'") == 4
        act, calls = self._failing(4, ConnectionError("down"))
        with pytest.raises(OSError, match="^Cannot read 'a://b': ConnectionError: down$"):
            retried(act, "read 'a://b'")
        assert len(calls) == 4

    @pytest.mark.parametrize("kind", [FileNotFoundError, PermissionError, NotImplementedError])
    def test_what_lasts_is_raised_at_once(self, kind):
        act, calls = self._failing(9, type("Special", (kind,), {})("so"))
        with pytest.raises(kind, match="^Cannot read 'a://b': so$"):
            retried(act, "read 'a://b'")
        assert len(calls) == 1


def test_the_first_error_of_several_is_raised():
    done = []

    def act(number):
        if number == 2:
            raise ValueError(f"number {number}")
        done.append(number)

    with pytest.raises(ValueError, match="number 2"):
        for_each(act, range(5))
    assert {0, 1} <= set(done)


def test_a_folder_goes_with_all_in_it_and_nothing_beside_it(system):
    root = Remote.of(f"{system.protocol}://runs")
    for name in ("a/b", "a/c/d[1]", "a*/b", "ab"):
        root.fs.makedirs(f"/runs/{name}".rpartition("/")[0], exist_ok=True)
        root.fs.pipe_file(f"/runs/{name}", b"")
    delete_folder(root / "a")
    assert set(system.content()) == {"/runs/a*/b", "/runs/ab"}
    assert "/runs/a" not in system.pseudo_dirs
    delete_folder(root / "a")


@pytest.mark.parametrize(
    ("name", "inside"),
    [("a", True), ("a/b", True), ("../a", False), ("a/../../b", False), ("/a", False), ("a\\b", False)],
)
def test_names_that_lead_outside(name, inside):
    assert is_inside(name) is inside
