"""Several ranks save one checkpoint: whole or not at all, and all of them learn how it went."""

import os
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore

from lightning.fabric.checkpoint.background import Background, StorePeers
from lightning.fabric.checkpoint.manifest import read_manifest, verify
from lightning.fabric.checkpoint.saving import OneRank, Prepared, SaveOptions, Written, save
from lightning.fabric.checkpoint.snapshot import Snapshot, detached


def _file(content):
    def write(staged):
        torch.save(content, staged)
        return Written([""])

    return Prepared(write)


def _part(rank, fails=False):
    """A folder to which each rank adds a file, and rank 0 an index of what they said."""

    def write(staged):
        if fails:
            raise OSError(28, "No space left on device")
        (staged / f"{rank}.bin").write_text(f"of rank {rank}")
        return Written([f"{rank}.bin"], result=rank * 10)

    def finish(staged, results):
        (staged / "index").write_text(str(results))

    return Prepared(write, finish, is_folder=True)


def _on_threads(count, run):
    """Run ``run(peers)`` for each rank in a thread of its own; return the results, errors among them."""
    store, results = HashStore(), [None] * count

    def of_rank(rank):
        try:
            results[rank] = run(StorePeers(store, rank, count, "save-1", timedelta(seconds=5)))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=of_rank, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_one_rank_saves_a_file_with_its_manifest(tmp_path):
    save(_file({"epoch": 1}), tmp_path / "new" / "a.pt", SaveOptions(step=4), OneRank(), "Mine")
    manifest = read_manifest(tmp_path / "new" / "a.pt")
    assert (manifest.strategy, manifest.step, manifest.world_size) == ("Mine", 4, 1)
    assert "torch" in manifest.versions
    verify(tmp_path / "new" / "a.pt", manifest)
    assert torch.load(tmp_path / "new" / "a.pt", weights_only=True) == {"epoch": 1}


def test_ranks_add_their_parts_and_rank_0_the_index(tmp_path):
    target = tmp_path / "a"
    assert _on_threads(3, lambda peers: save(_part(peers.rank), target, SaveOptions(), peers)) == [None] * 3
    manifest = read_manifest(target)
    assert set(manifest.files) == {"0.bin", "1.bin", "2.bin", "index"}
    assert manifest.world_size == 3
    verify(target, manifest)
    assert (target / "index").read_text() == "[0, 10, 20]"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("failing", [0, 2])
def test_one_that_fails_leaves_the_former_one_and_all_raise(tmp_path, failing):
    target = tmp_path / "a"
    _on_threads(3, lambda peers: save(_part(peers.rank), target, SaveOptions(step=1), peers))
    errors = _on_threads(
        3, lambda peers: save(_part(peers.rank, peers.rank == failing), target, SaveOptions(step=2), peers)
    )
    assert type(errors[failing]) is OSError
    for rank in {0, 1, 2} - {failing}:
        assert f"Rank {failing} failed while saving" in str(errors[rank])
        assert "No space left" in str(errors[rank])
    manifest = read_manifest(target)
    assert manifest.step == 1
    verify(target, manifest)
    assert os.listdir(tmp_path) == ["a"]


def test_a_rank_that_does_not_come_is_named(tmp_path):
    peers = StorePeers(HashStore(), 0, 2, "save-1", timedelta(seconds=0.2))
    with pytest.raises(TimeoutError, match=r"Rank 1 did not come to save its part within 0.2 s"):
        save(_part(0), tmp_path / "a", SaveOptions(), peers)
    assert os.listdir(tmp_path) == []


def test_rank_0_leaves_when_all_have_heard():
    left = []

    def run(peers):
        if peers.rank == 1:
            time.sleep(0.2)
            left.append(1)
        peers.leave()
        left.append(peers.rank)

    assert _on_threads(2, run) == [None, None]
    assert left[-1] == 0 or left[-2:] == [0, 1]
    assert left[0] == 1


def test_a_rank_that_is_gone_is_not_waited_for_at_the_end():
    StorePeers(HashStore(), 0, 2, "save-1", timedelta(seconds=0.1)).leave()


def test_without_checksums_sizes_are_recorded(tmp_path):
    save(_part(0), tmp_path / "a", SaveOptions(digests=False, durable=False), OneRank())
    assert {record.checksum for record in read_manifest(tmp_path / "a").files.values()} == {None}


class TestBackground:
    def test_does_one_job_after_the_other(self):
        background, may_go_on, done = Background(), threading.Event(), []
        background.start(lambda: (may_go_on.wait(10), done.append(0)))
        assert not background.is_idle
        second = threading.Thread(target=background.start, args=(lambda: done.append(1),))
        second.start()
        assert done == []
        may_go_on.set()
        second.join()
        background.wait()
        assert done == [0, 1]
        assert background.is_idle

    def test_an_error_is_raised_by_the_next_call_and_once(self):
        background, done = Background(), []

        def fail():
            raise ValueError("a disk on fire")

        background.start(fail)
        with pytest.raises(ValueError, match="on fire"):
            background.start(lambda: done.append("never"))
        background.start(lambda: done.append("went on"))
        background.wait()
        assert done == ["went on"]

    def test_an_error_at_the_end_is_shown_and_ends_the_process_with_code_1(self):
        code = """if True:
            import time
            from lightning.fabric.checkpoint.background import Background
            def fail():
                time.sleep(0.1)
                raise OSError("a disk on fire")
            Background().start(fail)
        """
        ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 1
        assert "A checkpoint could not be saved: OSError: a disk on fire" in ended.stderr
        assert "Traceback" not in ended.stderr

    def test_after_an_error_at_the_end_others_still_have_their_turn(self):
        code = """if True:
            import atexit
            from lightning.fabric.checkpoint.background import Background
            def fail():
                raise OSError("a disk on fire")
            atexit.register(print, "said goodbye")
            Background().start(fail)
        """
        ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 1
        assert ended.stdout == "said goodbye\n"


class TestSnapshot:
    def test_is_what_the_values_were_and_uses_its_memory_again(self):
        snapshot, addresses = Snapshot(), set()
        for value in (1.0, 2.0, 3.0):
            state = {"a": torch.full((3,), value), "step": [1, 2]}
            snapshot.begin()
            copy = detached(state, snapshot.copy)
            snapshot.end()
            state["a"].zero_()
            state["step"].append(3)
            assert copy["a"].tolist() == [value] * 3
            assert copy["step"] == [1, 2]
            addresses.add(copy["a"].data_ptr())
        assert len(addresses) <= 2

    def test_keeps_what_tensors_share_and_their_layout(self):
        whole = torch.arange(12.0).reshape(3, 4)
        snapshot = Snapshot()
        snapshot.begin()
        copies = [snapshot.copy(tensor) for tensor in (whole, whole[1], whole.t(), torch.empty(0, 3))]
        snapshot.end()
        assert [copy.stride() for copy in copies] == [(4, 1), (1,), (1, 4), (3, 1)]
        whole.zero_()
        copies[0][1, 0] = 100.0
        assert copies[1][0] == copies[2][0, 1] == 100.0
        assert copies[0][2].tolist() == [8, 9, 10, 11]
        assert copies[3].shape == (0, 3)

    def test_a_model_keeps_the_versions_of_its_parts_and_parameters_stay_parameters(self):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        snapshot = Snapshot()
        snapshot.begin()
        copy = detached({"model": model.state_dict(), "parameter": model[0].weight}, snapshot.copy)
        assert copy["model"]._metadata == model.state_dict()._metadata
        assert isinstance(copy["parameter"], torch.nn.Parameter)
        assert copy["parameter"].data_ptr() == copy["model"]["0.weight"].data_ptr() != model[0].weight.data_ptr()

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.tensor([1 + 2j]).conj(),
            torch.tensor([1 + 2j]).conj().imag,
            torch.ones(2, 2).to_sparse(),
        ],
        ids=["conjugate", "negative", "sparse"],
    )
    def test_keeps_tensors_that_are_more_than_their_memory(self, tensor):
        snapshot = Snapshot()
        snapshot.begin()
        copied = snapshot.copy(tensor)
        snapshot.end()
        assert copied.dtype == tensor.dtype
        assert str(copied) == str(tensor)

    def test_keeps_parameters_that_have_no_size_yet(self):
        layer, snapshot = torch.nn.LazyLinear(2), Snapshot()
        snapshot.begin()
        copied = detached({"weight": layer.weight}, snapshot.copy)["weight"]
        snapshot.end()
        layer(torch.ones(1, 3))
        assert torch.nn.parameter.is_lazy(copied)
