"""Behind a URL, too, a checkpoint is the old one or the new one at any time, whatever the network does."""

import json
import os
import re
import tempfile
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from tests.checkpoint.faulty_filesystem import (
    DEATHS,
    FAILURES,
    LIES,
    SILENT,
    FaultyFileSystem,
    FaultyObjectStore,
    Killed,
)
from torch.distributed import HashStore

from lightning.fabric.checkpoint import remote
from lightning.fabric.checkpoint.background import StorePeers
from lightning.fabric.checkpoint.directory import Best
from lightning.fabric.checkpoint.manifest import (
    MANIFEST,
    DamagedCheckpointError,
    Manifest,
    manifest_of,
    read_manifest,
    verify,
)
from lightning.fabric.checkpoint.remote import RemoteDirectory, RemoteTransaction, fetched, read_remote_manifest
from lightning.fabric.checkpoint.saving import OneRank, Prepared, SaveOptions, Written, save
from lightning.fabric.utilities import remote_files


@pytest.fixture(params=[FaultyFileSystem, FaultyObjectStore], ids=["disk", "store"])
def system(request, monkeypatch, tmp_path):
    """A class of file systems, empty and whole; nothing waits; nothing stays on this machine."""
    request.param.clear()
    monkeypatch.setattr(remote_files, "_PAUSE", 0)
    monkeypatch.setattr(remote_files, "OBJECT_STORES", {FaultyObjectStore.protocol})
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield request.param
    assert os.listdir(tmp_path) == []


@pytest.fixture
def url(system):
    return f"{system.protocol}://runs/a"


def _file(step, rank=0):
    def write(staged):
        if rank == 0:
            torch.save({"step": step}, staged)
        return Written([""] if rank == 0 else [])

    return Prepared(write)


def _folder(step, rank=0, fails=False):
    """A folder to which each rank adds a file, and rank 0 an index of what they said."""

    def write(staged):
        if fails:
            raise OSError(28, "No space left on device")
        (staged / "inner").mkdir(exist_ok=True)
        (staged / "inner" / f"{rank}.bin").write_text(f"of rank {rank}, step {step}")
        return Written([f"inner/{rank}.bin"], result=rank * 10)

    def finish(staged, results):
        (staged / ".index").write_text(f"{results}, step {step}")

    return Prepared(write, finish, is_folder=True)


KINDS = {"file": _file, "folder": _folder}


def _save(url, prepared, step, peers=None, **options):
    save(prepared(step), url, SaveOptions(step=step, **options), peers or OneRank())


def _step_at(url):
    """Which step loads, with all its content verified."""
    with fetched(url) as path:
        manifest = read_manifest(path)
        verify(path, manifest)
        if not path.is_dir():
            assert torch.load(path, weights_only=True) == {"step": manifest.step}
            return manifest.step
        assert (path / ".index").read_text().endswith(f"step {manifest.step}")
        assert (path / "inner" / "0.bin").read_text().endswith(f"step {manifest.step}")
        return manifest.step


def _step_there(system):
    """The same, of what is there at this moment, without any operation on it."""
    content = system.content()
    if "/runs/a" in content:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder, "a")
            local.write_bytes(content["/runs/a"])
            manifest = read_manifest(local)
            verify(local, manifest)
        return manifest.step
    manifest = Manifest.from_bytes(content["/runs/a/manifest.json"])
    for name, record in manifest.files.items():
        data = content[f"/runs/a/{name}"]
        assert data.endswith(f"step {manifest.step}".encode())
        assert len(data) == record.size
    return manifest.step


def _on_threads(count, run):
    """Run ``run(peers)`` for each rank in a thread of its own; return the results, errors among them."""
    store, results = HashStore(), [None] * count

    def of_rank(rank):
        try:
            results[rank] = run(StorePeers(store, rank, count, "save-1", timedelta(seconds=20)))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=of_rank, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class TestSave:
    def test_a_file_has_its_manifest_in_it(self, url, system):
        _save(url, _file, 3, metrics={"loss": 0.5})
        assert list(system.content()) == ["/runs/a"]
        manifest = read_remote_manifest(url)
        assert (manifest.step, manifest.metrics, list(manifest.files)) == (3, {"loss": 0.5}, [""])
        assert _step_at(url) == 3

    def test_ranks_add_their_parts_and_rank_0_the_index(self, url, system):
        of_rank = lambda peers: save(_folder(3, peers.rank), url, SaveOptions(step=3), peers)
        assert _on_threads(3, of_rank) == [None] * 3
        names = {re.sub("save-[0-9a-f]{8}", "save-x", path) for path in system.content()}
        parts = {f"/runs/a/save-x/inner/{rank}.bin" for rank in range(3)}
        assert names == {"/runs/a/manifest.json", "/runs/a/save-x/.index", *parts}
        with fetched(url) as path:
            found = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
            assert found == {MANIFEST, ".index", "inner/0.bin", "inner/1.bin", "inner/2.bin"}
            assert read_manifest(path).world_size == 3
            assert (path / ".index").read_text() == "[0, 10, 20], step 3"

    @pytest.mark.parametrize("failing", [0, 2])
    def test_one_rank_that_fails_leaves_the_former_one_and_all_raise(self, url, system, failing):
        _save(url, _folder, 1)
        before = system.content()
        prepared = lambda rank: _folder(2, rank, fails=rank == failing)
        errors = _on_threads(3, lambda peers: save(prepared(peers.rank), url, SaveOptions(step=2), peers))
        assert type(errors[failing]) is OSError
        assert all(url in str(error) and "No space left" in str(error) for error in errors)
        assert {path: data for path, data in system.content().items() if path in before} == before
        assert _step_at(url) == 1

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_belongs_to_others_stays(self, kind, url, system):
        place = Path("/runs/a" if kind == "folder" else "/runs")
        fs = remote_files.Remote.of(url).fs
        _save(url, KINDS[kind], 1)
        for name in ("notes.txt", "save-notes/a", ".hidden"):
            fs.pipe_file(str(place / name), b"mine")
        _save(url, KINDS[kind], 2)
        assert sorted(path for path, data in system.content().items() if data == b"mine") == sorted(
            str(place / name) for name in ("notes.txt", "save-notes/a", ".hidden")
        )

    def test_over_one_that_was_copied_there_from_a_disk(self, url, system, tmp_path):
        local = tmp_path / "local"
        save(_folder(1), local, SaveOptions(step=1), OneRank())
        fs = remote_files.Remote.of(url).fs
        for name in (MANIFEST, ".index", "inner/0.bin"):
            fs.pipe_file(f"/runs/a/{name}", (local / name).read_bytes())
        assert _step_at(url) == 1
        _save(url, _folder, 2)
        assert _step_at(url) == 2
        assert not {"/runs/a/.index", "/runs/a/inner/0.bin"} & set(system.content())
        remote.shutil.rmtree(local)

    @pytest.mark.parametrize(("there", "new", "error"), [(_file, _folder, FileExistsError), (_folder, _file, OSError)])
    def test_neither_kind_takes_the_place_of_the_other(self, url, there, new, error):
        _save(url, there, 1)
        with pytest.raises(error, match=rf"{url}.*Save to another path"):
            _save(url, new, 2)
        assert _step_at(url) == 1

    @pytest.mark.parametrize("kind", KINDS)
    def test_to_a_path_with_letters_of_patterns(self, kind, system):
        url = f"{system.protocol}://runs/a[1]*?#"
        for step in (1, 2):
            _save(url, KINDS[kind], step)
            assert _step_at(url) == step
        assert len(system.content()) == (1 if kind == "file" else 3)

    def test_names_of_saves_are_digits(self, url):
        with pytest.raises(ValueError, match=r"hexadecimal digits, but got '\.\./a'"):
            RemoteTransaction(url, "../a")


_saved = {}  # what a save of step 1 leaves, by system and kind


def _operations_of_a_save(url, system, kind):
    _save(url, KINDS[kind], 1)
    system.faults.clear()
    _save(url, KINDS[kind], 2)
    operations = list(system.faults.operations)
    system.clear()
    return operations


@pytest.mark.parametrize("kind", KINDS)
class TestFaults:
    def _attempt(self, url, system, kind, fault):
        """Save over step 1 while something goes wrong; at every moment of it there is a whole checkpoint."""
        self._begin_with_step_1(url, system, kind)
        fault(system.faults)
        system.faults.after = lambda name, path: seen.append(_step_there(system)) if name in WRITES else None
        seen, error = [1], None
        try:
            _save(url, KINDS[kind], 2)
        except (OSError, Killed) as raised:
            error = raised
        system.faults.clear()
        assert seen in ([1] * len(seen), sorted(seen))
        assert _step_there(system) == seen[-1]
        return seen[-1], error

    def _begin_with_step_1(self, url, system, kind):
        saved = _saved.get((system, kind))
        system.clear()
        if saved is None:
            _save(url, KINDS[kind], 1)
            _saved[system, kind] = dict(system.store), list(system.pseudo_dirs)
            system.faults.clear()
        else:
            system.store.update(saved[0])
            system.pseudo_dirs[:] = saved[1]

    def _ends_well(self, url, system, kind):
        """The next save finds nothing in its way, and leaves nothing of those before."""
        _save(url, KINDS[kind], 3)
        assert _step_at(url) == 3
        folders = {path.split("/")[3] for path in system.content() if path.count("/") > 2}
        assert len(folders) == (0 if kind == "file" else 2)
        assert len(system.content()) == (1 if kind == "file" else 3)

    def test_one_fault_at_any_operation_is_overcome(self, url, system, kind):
        for number, operation in enumerate(_operations_of_a_save(url, system, kind)):
            for act in (*FAILURES, *SILENT):
                fault = lambda faults, number=number, act=act: faults.due.update({number: act})
                assert self._attempt(url, system, kind, fault) == (2, None), (act, operation)
            self._ends_well(url, system, kind)

    def test_two_faults_in_a_row_are_overcome(self, url, system, kind):
        for number, operation in enumerate(_operations_of_a_save(url, system, kind)):
            fault = lambda faults, number=number: faults.due.update({number: "fails", number + 1: "fails"})
            assert self._attempt(url, system, kind, fault) == (2, None), operation

    @pytest.mark.filterwarnings("ignore:Could not delete")
    @pytest.mark.parametrize("act", ["fails", "stops halfway", "fails late"])
    def test_faults_that_last_leave_the_old_one_or_the_new_one(self, url, system, kind, act):
        steps = []
        for number in range(len(_operations_of_a_save(url, system, kind))):
            fault = lambda faults, number=number: faults.due.update(dict.fromkeys(range(number, number + 300), act))
            step, error = self._attempt(url, system, kind, fault)
            steps.append((step, error is None))
            assert (error is None and step == 2) or url in str(error)
        self._ends_well(url, system, kind)
        assert {step for step, _ in steps} == {1, 2}
        assert not steps[0][1]

    @pytest.mark.parametrize("act", DEATHS)
    def test_a_kill_at_any_operation_leaves_the_old_one_or_the_new_one(self, url, system, kind, act):
        steps = set()
        for number, operation in enumerate(_operations_of_a_save(url, system, kind)):
            fault = lambda faults, number=number: faults.due.update({number: act})
            step, error = self._attempt(url, system, kind, fault)
            assert isinstance(error, Killed), operation
            assert _step_at(url) == step
            steps.add(step)
            self._ends_well(url, system, kind)
        assert steps == {1, 2}

    def test_a_first_save_that_is_killed_leaves_none(self, url, system, kind):
        system.faults.is_due = lambda name, path: "dies halfway" if name == "put" else None
        with pytest.raises(Killed):
            _save(url, KINDS[kind], 1)
        system.faults.clear()
        with pytest.raises(FileNotFoundError, match=f"no checkpoint at '{url}'"):
            _step_at(url)
        self._ends_well(url, system, kind)

    @pytest.mark.parametrize("looks", [1, 2, 4])
    def test_what_is_not_shown_at_once_is_waited_for(self, url, system, kind, looks):
        fault = lambda faults: setattr(faults, "looks", looks)
        assert self._attempt(url, system, kind, fault) == (2, None)

    def test_what_is_not_shown_for_long_is_an_error(self, url, system, kind):
        fault = lambda faults: setattr(faults, "looks", 1000)
        step, error = self._attempt(url, system, kind, fault)
        assert re.search(rf"Cannot write '{system.protocol}://runs/.*afterwards, .* not ", str(error))
        assert step in (1, 2)
        self._ends_well(url, system, kind)

    def test_what_may_not_be_written_is_said_at_once(self, url, system, kind, monkeypatch):
        def refuse(*args, **options):
            raise PermissionError("not yours")

        monkeypatch.setattr(system, "put_file", refuse)
        with pytest.raises(PermissionError, match=rf"Cannot write '{system.protocol}://runs/.*not yours"):
            _save(url, KINDS[kind], 1)
        assert system.content() == {}


WRITES = ("put", "copy", "delete", "rmdir")


class TestRanksAndFaults:
    def test_any_rank_may_die_or_fail_between_any_of_its_steps(self, url, system):
        count, outcomes = 0, set()
        for act in ("dies", "dies halfway"):
            for number in range(100):
                system.clear()
                _save(url, _folder, 1)
                system.faults.clear()
                system.faults.due = {number: act}
                has_ended = self._save_of_two(url, system)
                outcomes.add(_step_there(system))
                if has_ended:
                    break
                count += 1
        assert outcomes == {1, 2}
        assert count > 25

    def _save_of_two(self, url, system):
        """What `save` does on two ranks, one after the other, so that both can be killed at once."""
        ranks = [RemoteTransaction(url, "0a1b2c3d", leads=rank == 0) for rank in range(2)]
        try:
            files = {}
            for rank, transaction in enumerate(ranks):
                transaction.begin(is_folder=True)
                written = _folder(2, rank).write(transaction.staged)
                files |= manifest_of(transaction.staged).files
                transaction.deliver(written.files)
            _folder(2).finish(ranks[0].staged, [0, 10])
            files |= manifest_of(ranks[0].staged).files
            ranks[0].commit(Manifest(files, step=2))
        except Killed:
            system.faults.clear()
            return False
        finally:
            for transaction in ranks:
                transaction._remove_local()
        return True

    def test_a_rank_that_hears_no_more_deletes_nothing_that_is_committed(self, url):
        ranks = [RemoteTransaction(url, "0a1b2c3d", leads=rank == 0) for rank in range(2)]
        for transaction in ranks:
            transaction.begin(is_folder=True)
        _folder(2).write(ranks[0].staged)
        _folder(2).finish(ranks[0].staged, [])
        ranks[0].commit(manifest_of(ranks[0].staged, step=2))
        for transaction in ranks:
            transaction.abort()
        assert _step_at(url) == 2


@pytest.mark.parametrize("kind", KINDS)
class TestFetch:
    def test_one_fault_at_any_operation_is_overcome(self, url, system, kind):
        _save(url, KINDS[kind], 1)
        system.faults.clear()
        assert _step_at(url) == 1
        operations = list(system.faults.operations)
        for number, operation in enumerate(operations):
            for act in ("fails", *LIES):
                system.faults.clear()
                system.faults.due = {number: act}
                assert _step_at(url) == 1, (act, operation)

    def test_a_network_that_stays_down_is_an_error_that_names_the_url(self, url, system, kind):
        _save(url, KINDS[kind], 1)
        system.faults.clear()
        _step_at(url)
        for number in range(len(system.faults.operations)):
            system.faults.clear()
            system.faults.due = dict.fromkeys(range(number, 300), "fails")
            with pytest.raises(OSError, match=rf"{url}.*the network is down"):
                _step_at(url)

    def test_damage_that_stays_is_named(self, url, system, kind):
        _save(url, KINDS[kind], 1)
        for path in system.content():
            for position in (0, -1):
                system.flip(path, position)
                with pytest.raises(DamagedCheckpointError) as caught:
                    _step_at(url)
                assert (caught.value.path, caught.value.file) == (url, path.removeprefix("/runs/a").lstrip("/"))
                system.flip(path, position)
        assert _step_at(url) == 1

    def test_without_digests_sizes_are_compared(self, url, system, kind):
        _save(url, KINDS[kind], 1)
        path = next(path for path in system.content() if not path.endswith(MANIFEST))
        system.flip(path, 40 if kind == "file" else 0)
        with fetched(url, digests=False):
            pass
        system.store[path].truncate(len(system.content()[path]) - 1)
        with pytest.raises((DamagedCheckpointError, OSError)), fetched(url, digests=False) as local:
            torch.load(local, weights_only=True)

    def test_it_is_replaced_meanwhile(self, url, system, kind):
        _save(url, KINDS[kind], 1)
        system.faults.clear()
        is_due = ("get", "/runs/a") if kind == "file" else ("cat", "/runs/a/manifest.json")  # the second reads it

        def replaced(name, path):
            if (name, path) == is_due and system.faults.operations.count(is_due) == (1 if kind == "file" else 2):
                _save(url, KINDS[kind], 2)

        system.faults.after = replaced
        assert _step_at(url) == (1 if kind == "file" else 2)
        assert _step_at(url) == 2

    def test_ranks_of_a_machine_fetch_once(self, url, system, kind):
        _save(url, KINDS[kind], 1)
        system.faults.clear()

        def of_rank(peers):
            with fetched(url, peers=peers) as path:
                verify(path, read_manifest(path))
                return str(path)

        paths = _on_threads(3, of_rank)
        assert len(set(paths)) == 3
        assert all(path.endswith("/a") for path in paths)
        names = [name for name, _ in system.faults.operations]
        assert names.count("get") == (1 if kind == "file" else 2)

    def test_ranks_of_several_machines_fetch_on_each(self, url, system, kind, monkeypatch):
        machines = threading.local()
        monkeypatch.setattr(remote, "_machine", lambda: machines.name)
        _save(url, KINDS[kind], 1)
        system.faults.clear()

        def of_rank(peers):
            machines.name = "first" if peers.rank in (0, 2) else "second"
            with fetched(url, peers=peers) as path:
                return read_manifest(path).step

        assert _on_threads(4, of_rank) == [1] * 4
        names = [name for name, _ in system.faults.operations]
        assert names.count("get") == 2 * (1 if kind == "file" else 2)

    def test_all_ranks_raise_what_one_finds(self, url, system, kind):
        _save(url, KINDS[kind], 1)
        path = next(path for path in system.content() if not path.endswith(MANIFEST))

        def of_rank(peers):
            with fetched(url, peers=peers) as local:
                return local

        system.flip(path, -1)
        errors = _on_threads(3, of_rank)
        assert [type(error) for error in errors] == [DamagedCheckpointError] * 3
        system.faults.is_due = lambda name, path: "fails"
        errors = _on_threads(3, of_rank)
        assert [type(error) for error in errors] == [OSError, RuntimeError, RuntimeError]
        assert all(url in str(error) and "network is down" in str(error) for error in errors)


class TestFetchForeign:
    def test_a_file_of_torch(self, url, system, tmp_path):
        torch.save({"weight": torch.ones(2)}, tmp_path / "a.pt")
        remote_files.upload(tmp_path / "a.pt", remote_files.Remote.of(f"{url}.pt"))
        (tmp_path / "a.pt").unlink()
        assert read_remote_manifest(f"{url}.pt") is None
        with fetched(f"{url}.pt") as path:
            assert path.name == "a.pt"
            assert torch.load(path, weights_only=True)["weight"].tolist() == [1, 1]

    def test_a_folder(self, url, system):
        fs = remote_files.Remote.of(url).fs
        for name in (".metadata", "__0_0.distcp", "inner/b", "save-0a1b2c3d/of a save that was killed"):
            fs.pipe_file(f"/runs/a/{name}", name.encode())
        assert read_remote_manifest(url) is None
        with fetched(url) as path:
            found = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
            assert found == [".metadata", "__0_0.distcp", "inner/b"]
            assert (path / "inner" / "b").read_text() == "inner/b"

    def test_nothing_is_said(self, url):
        for read in (read_remote_manifest, _step_at):
            with pytest.raises(FileNotFoundError, match=f"There is no checkpoint at '{url}'"):
                read(url)

    @pytest.mark.parametrize("name", ["save-0a1b2c3d//etc/a", "save-0a1b2c3d/./b", "c//d"])
    def test_names_lead_into_the_copy(self, name, tmp_path):
        assert (tmp_path / remote._inner(name)).is_relative_to(tmp_path)
        assert remote._inner(name) in ("etc/a", "b", "c/d")

    def test_a_manifest_that_names_a_file_outside_is_refused(self, url, system):
        _save(url, _folder, 1)
        manifest = read_remote_manifest(url)
        record = next(iter(manifest.files.values()))
        data = replace(manifest, files={"save-0a1b2c3d/../../../b": record}).to_bytes()
        remote_files.Remote.of(url).fs.pipe_file("/runs/a/manifest.json", data)
        with pytest.raises(DamagedCheckpointError, match="not inside of the checkpoint"):
            _step_at(url)

    def test_a_listing_that_names_a_file_outside_is_refused(self, url, monkeypatch):
        remote_files.Remote.of(url).fs.pipe_file("/runs/a/b", b"")
        monkeypatch.setattr(remote, "files_in", lambda place: {"../b": 0})
        with pytest.raises(ValueError, match=r"'\.\./b', which would not be inside"):
            _step_at(url)

    def test_tensors_that_are_mapped_outlive_the_copy(self, url):
        save(
            Prepared(lambda staged: (torch.save(torch.arange(9.0), staged), Written([""]))[1]),
            url,
            SaveOptions(),
            OneRank(),
        )
        with fetched(url) as path:
            tensor = torch.load(path, mmap=True)
        assert not path.exists()
        assert tensor.tolist() == list(range(9))


class TestDirectory:
    @pytest.fixture
    def directory(self, system):
        return RemoteDirectory(f"{system.protocol}://runs", keep_last=2, keep_best=Best("loss"))

    def _save(self, directory, step, prepared=_folder, **metrics):
        _save(directory.path_of(step), prepared, step, metrics=metrics)
        directory.set_latest(directory.path_of(step))
        return directory.retain()

    def _steps(self, directory):
        return [entry.step for entry in directory.entries()]

    @pytest.mark.parametrize("prepared", [_file, _folder])
    def test_keeps_the_last_and_the_best(self, directory, system, prepared):
        gone = []
        for step, loss in enumerate([0.5, 0.1, 0.4, 0.3, 0.2]):
            gone += self._save(directory, step, prepared, loss=loss)
        assert self._steps(directory) == [4, 3, 1]
        assert gone == [directory.path_of(0), directory.path_of(2)]
        assert directory.latest() == directory.path_of(4)
        names = {path.split("/")[2] for path in system.content()}
        assert names == {"latest", "step-00000001", "step-00000003", "step-00000004"}

    def test_the_newest_good_one_is_fetched(self, directory, system):
        for step in range(4):
            _save(directory.path_of(step), _file if step == 1 else _folder, step)
        assert _step_at(directory.folder) == 3
        system.flip(next(path for path in system.content() if "step-00000003/save" in path))
        system.flip("/runs/step-00000002/manifest.json", 3)
        with pytest.warns(
            UserWarning, match=r"step-0000000[23].* is damaged.*It is passed over, and .*00001.*"
        ) as warned:
            assert _step_at(directory.folder) == 1
        assert len(warned) == 2
        found = {entry.step: entry.error for entry in directory.entries()}
        assert {step for step, error in found.items() if error is not None} == {2}
        system.store["/runs/step-00000001"].truncate(100)
        system.flip(next(path for path in system.content() if "step-00000000/save" in path))
        with pytest.raises(DamagedCheckpointError, match="none of its 4 checkpoints is good"):
            _step_at(directory.folder)

    def test_what_a_run_left_behind_is_older(self, directory):
        for day, step in enumerate((1, 5, 3), start=1):
            transaction = RemoteTransaction(directory.path_of(step), leads=True)
            transaction.begin(is_folder=False)
            _file(step).write(transaction.staged)
            transaction.commit(manifest_of(transaction.staged, step=step, time=f"2026-01-0{day}"))
        assert self._steps(directory) == [5, 3, 1]
        directory.set_latest(directory.path_of(3))
        assert self._steps(directory) == [3, 1, 5]
        assert _step_at(directory.folder) == 3

    def test_all_ranks_fall_back_to_the_same(self, directory, system):
        for step in range(2):
            _save(directory.path_of(step), _folder, step)
        system.flip(next(path for path in system.content() if "step-00000001/save" in path))

        def of_rank(peers):
            with fetched(directory.folder, peers=peers) as path:
                return read_manifest(path).step

        with pytest.warns(UserWarning, match="It is passed over"):
            assert _on_threads(2, of_rank) == [0, 0]

    def test_what_was_not_committed_is_none_and_goes(self, directory, system):
        _save(directory.path_of(1), _folder, 1)
        for step in (0, 2):
            system.faults.due = {len(system.faults.operations) + 3: "dies"}
            with pytest.raises(Killed):
                _save(directory.path_of(step), _folder, step)
            system.faults.clear()
        assert self._steps(directory) == [1]
        assert _step_at(directory.folder) == 1
        directory.retain()
        assert {path.split("/")[2] for path in system.content()} == {"step-00000001", "step-00000002"}

    def test_a_kill_while_deleting_leaves_whole_ones_only(self, directory, system):
        for step in range(3):
            _save(directory.path_of(step), _file if step == 1 else _folder, step, metrics={"loss": -step})
        before = dict(system.store), list(system.pseudo_dirs)
        system.faults.clear()
        directory.retain()
        for number in range(len(system.faults.operations)):
            system.clear()
            system.store.update(before[0])
            system.pseudo_dirs[:] = before[1]
            system.faults.due = {number: "dies late"}
            with pytest.raises(Killed):
                directory.retain()
            system.faults.clear()
            for entry in directory.entries():
                assert _step_at(str(entry.path)) == entry.step
            directory.retain()
            assert self._steps(directory) == [2, 1]
            assert {path.split("/")[2] for path in system.content()} == {"step-00000001", "step-00000002"}

    @pytest.mark.parametrize("content", [b"", b"step-00000009", b"../elsewhere", b"\xff"])
    def test_latest_that_names_no_checkpoint_is_none(self, directory, content):
        remote_files.Remote.of(directory.folder).fs.pipe_file("/runs/latest", content)
        assert directory.latest() is None

    def test_an_empty_one_has_none(self, directory):
        assert (directory.entries(), directory.latest(), directory.retain()) == ([], None, [])

    def test_wrong_numbers_are_refused(self):
        with pytest.raises(ValueError, match="`keep_last` must be at least 1"):
            RemoteDirectory("memory://runs", keep_last=0)


def test_what_a_plain_file_system_of_fsspec_gets(tmp_path, monkeypatch):
    """No fault, and nothing of ours in between."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for url in ("memory://plain/a", "simplecache::memory://plain/b"):
        for step in (1, 2):
            _save(url, _folder, step)
            assert _step_at(url) == step
            _save(f"{url}.pt", _file, step)
            assert _step_at(f"{url}.pt") == step
    fs = remote_files.Remote.of("memory://plain").fs
    manifest = json.loads(fs.cat_file("/plain/a/manifest.json"))
    assert set(fs.find("/plain/a")) == {f"/plain/a/{name}" for name in (MANIFEST, *manifest["files"])}
    fs.rm("/plain", recursive=True)
