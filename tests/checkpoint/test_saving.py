"""Several ranks save one checkpoint: whole or not at all, and all of them learn how it went."""

import os
import threading
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore

from lightning.fabric.checkpoint.background import Background, StorePeers
from lightning.fabric.checkpoint.manifest import read_manifest, verify
from lightning.fabric.checkpoint.saving import Facts, OneRank, Prepared, Written, save


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
    save(_file({"epoch": 1}), tmp_path / "new" / "a.pt", Facts(strategy="Mine", step=4), OneRank())
    manifest = read_manifest(tmp_path / "new" / "a.pt")
    assert (manifest.strategy, manifest.step, manifest.world_size) == ("Mine", 4, 1)
    assert "torch" in manifest.versions
    verify(tmp_path / "new" / "a.pt", manifest)
    assert torch.load(tmp_path / "new" / "a.pt", weights_only=True) == {"epoch": 1}


def test_ranks_add_their_parts_and_rank_0_the_index(tmp_path):
    target = tmp_path / "a"
    assert _on_threads(3, lambda peers: save(_part(peers.rank), target, Facts(), peers)) == [None] * 3
    manifest = read_manifest(target)
    assert set(manifest.files) == {"0.bin", "1.bin", "2.bin", "index"}
    assert manifest.world_size == 3
    verify(target, manifest)
    assert (target / "index").read_text() == "[0, 10, 20]"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("failing", [0, 2])
def test_one_that_fails_leaves_the_former_one_and_all_raise(tmp_path, failing):
    target = tmp_path / "a"
    _on_threads(3, lambda peers: save(_part(peers.rank), target, Facts(step=1), peers))
    errors = _on_threads(3, lambda peers: save(_part(peers.rank, peers.rank == failing), target, Facts(step=2), peers))
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
        save(_part(0), tmp_path / "a", Facts(), peers)
    assert os.listdir(tmp_path) == []


def test_without_checksums_sizes_are_recorded(tmp_path):
    save(_part(0), tmp_path / "a", Facts(checksums=False, durable=False), OneRank())
    assert {record.checksum for record in read_manifest(tmp_path / "a").files.values()} == {None}


class TestBackground:
    def test_does_jobs_in_order(self):
        background, done = Background(), []
        for number in range(3):
            background.submit(lambda number=number: done.append(number))
        background.wait()
        assert done == [0, 1, 2]
        assert background.is_idle

    def test_waits_for_room(self):
        background, may_go_on, begun = Background(pending=1), threading.Event(), []
        for number in range(2):
            background.submit(lambda number=number: (begun.append(number), may_go_on.wait(10)))
        third = threading.Thread(target=background.submit, args=(lambda: begun.append(2),))
        third.start()
        third.join(0.05)
        is_waiting = third.is_alive() or 1 not in begun  # the second job may have left the queue already
        may_go_on.set()
        third.join()
        background.wait()
        assert is_waiting
        assert begun == [0, 1, 2]

    def test_an_error_is_raised_by_the_next_call_and_once(self):
        background, done = Background(), []

        def fail():
            raise ValueError("a disk on fire")

        background.submit(fail)
        with pytest.raises(ValueError, match="on fire"):
            background.wait()
        background.submit(lambda: done.append("went on"))
        background.wait()
        assert done == ["went on"]
