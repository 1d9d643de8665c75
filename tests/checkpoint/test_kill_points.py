"""A save that is killed anywhere leaves the former checkpoint or the new one, whole, and no rank waits for ever.

Every test starts one process, which has all that a save needs ready, and forks from it, for each point at which there
is something to write: the processes that save, which are killed there; and one that looks at what they have left.
"""

import contextlib
import os
import shutil
import signal
import socket
import warnings
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice

import pytest
import torch
import torch.distributed as dist

from lightning.fabric import Fabric
from lightning.fabric.checkpoint import transaction
from lightning.fabric.checkpoint.directory import CheckpointDirectory
from lightning.fabric.checkpoint.manifest import DamagedCheckpointError, read_manifest, verify
from lightning.fabric.checkpoint.saving import OneRank, Prepared, SaveOptions, Written, save
from lightning.fabric.testing import Forked, fault_at, file_size_limit, on_ranks, preload, write_points

preload("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint")

pytestmark = pytest.mark.slow

OLD, NEW, NEXT = 1, 2, 3  # what all weights are
NOTES = "notes.txt"


# ---- what is saved, and how --------------------------------------------------------------------------------------


def _model(value, size=4):
    model = torch.nn.Linear(size, size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


@dataclass(frozen=True)
class Saving:
    """A way to save ``folder/checkpoint``; or, with ``keeps``, checkpoints in there, of which so many are kept."""

    at_least: int  # kill points
    ranks: int = 1
    strategy: str = "auto"
    size: int = 4
    blocking: bool = True
    bytes: int = 8  # in how many places a file is cut off
    keeps: int | None = None
    exchanges: bool = True  # whether the system can let two folders change places
    overwrites: bool = True
    notes: bool = False  # whether somebody keeps a file of his own in the folder

    def fabric(self):
        options = {"timeout": timedelta(seconds=2)} if self.strategy == "fsdp" and not self.blocking else {}
        if self.strategy == "fsdp":
            from lightning.fabric.strategies import FSDPStrategy

            strategy = FSDPStrategy(**options)
        else:
            strategy = self.strategy
        fabric = Fabric(accelerator="cpu", devices=self.ranks, strategy=strategy)
        fabric.launch()
        return fabric

    def state(self, fabric, value):
        return {"model": fabric.setup_module(_model(value, self.size)), "step": value}

    def save(self, fabric, folder, value):
        state, options = self.state(fabric, value), {"blocking": self.blocking}
        if self.keeps is None:
            fabric.save(folder / "checkpoint", state, **options)
        else:
            fabric.checkpoints(folder / "checkpoint", keep_last=self.keeps).save(value, state, **options)
        fabric.strategy.wait_for_saves()

    def save_alone(self, fabric, folder, value):
        """From a process without ranks to shard anything, and without threads."""
        if self.strategy == "auto":
            replace(self, blocking=True).save(fabric, folder, value)
            return folder / "checkpoint"
        target, options = folder / "checkpoint", SaveOptions(step=value)
        if self.keeps is not None:
            directory = CheckpointDirectory(target, keep_last=self.keeps)
            target = directory.path_of(value)
            options = replace(options, committed=lambda: (directory.set_latest(target), directory.retain()))
        save(Prepared(_write_a_part, is_folder=True, foreign=_notes_in), target, options, OneRank())
        return target

    def load(self, fabric, folder):
        """Return the value that the checkpoint has everywhere; None if there is none."""
        state = {"model": _model(0, self.size), "step": 0}
        if self.keeps is not None:
            assert fabric.checkpoints(folder / "checkpoint").resume(state) == state["step"]
        else:
            try:
                fabric.load(folder / "checkpoint", state)
            except FileNotFoundError:
                return None
        weights = {value for each in state["model"].parameters() for value in each.detach().unique().tolist()}
        assert weights == {state["step"]}, f"the weights are {weights}, the step is {state['step']}"
        return state["step"]


def _notes_in(folder):
    return [path for path in folder.iterdir() if path.name == NOTES]


def _write_a_part(staged):
    (staged / "part").write_text("one more")
    return Written(["part"])


SAVINGS = {
    "a file": Saving(at_least=15),
    "the first file": Saving(at_least=15, overwrites=False),
    "a file of several pieces": Saving(at_least=18, size=1450),
    "a file, later": Saving(at_least=15, blocking=False),
    "a file, and retention": Saving(at_least=20, keeps=1),
    "a file later, and retention": Saving(at_least=20, keeps=1, blocking=False),
    "shards": Saving(at_least=80, ranks=2, strategy="fsdp"),
    "shards, later": Saving(at_least=60, ranks=2, strategy="fsdp", blocking=False, bytes=2),
    "shards, and retention": Saving(at_least=60, ranks=2, strategy="fsdp", keeps=1, bytes=1),
    "shards by two renames": Saving(at_least=30, strategy="fsdp", exchanges=False),
    "shards beside notes": Saving(at_least=30, strategy="fsdp", notes=True),
}


@dataclass(frozen=True)
class Kill:
    """Before the ``number``-th write of ``rank``, or at its ``byte`` of a file; with ``all``, nobody survives that."""

    rank: int
    number: int | None = None
    byte: int | None = None
    all: bool = False

    def __call__(self, folder):
        if self.number is not None:
            return fault_at(self.number, folder)
        return file_size_limit(self.byte, "kill")

    @property
    def code(self):
        return -signal.SIGXFSZ if self.number is None else -signal.SIGKILL


# ---- processes ---------------------------------------------------------------------------------------------------


class Ranks:
    """Forked processes, which save together."""

    def __init__(self, saving, fn, *args):
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.processes = [
                Forked(_as_rank, rank, server.fileno(), saving, fn, *args) for rank in range(saving.ranks)
            ]

    def outcomes(self, kill=None):
        """Wait for all; those that ``kill`` leaves alive may not take long."""
        if kill is None:
            return [process.wait(30) for process in self.processes]
        killed = self.processes[kill.rank].wait(30)
        if kill.all:
            for process in self.processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        return [killed if rank == kill.rank else process.wait(30) for rank, process in enumerate(self.processes)]


def _as_rank(rank, listening, saving, fn, *args):
    size = f"{saving.ranks}"
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    if not saving.exchanges:
        transaction._renameat2 = lambda: None
    if saving.strategy == "auto":
        return fn(saving, rank, *args)
    if saving.ranks > 1:  # torch has much to say of lost connections
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    # everybody connects at once: who listens is there already
    port = socket.socket(fileno=os.dup(listening)).getsockname()[1]
    store = dist.TCPStore(
        "127.0.0.1", port, saving.ranks, rank == 0, timedelta(seconds=20), master_listen_fd=os.dup(listening)
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=saving.ranks, timeout=timedelta(seconds=20))
    return fn(saving, rank, *args)


def _save(saving, rank, folder, value, kill=None):
    fabric = saving.fabric()
    strikes = kill is not None and kill.rank == rank
    with kill(folder) if strikes else contextlib.nullcontext():
        saving.save(fabric, folder, value)


def _recorded(saving, rank, folder, value):
    with write_points(folder) as points:
        _save(saving, rank, folder, value)
    return points


# ---- what is left ------------------------------------------------------------------------------------------------


def _look(saving, fabric, folder, allowed):
    """Return the value that is found: what is there loads, is one of ``allowed``; and the next save clears up."""
    target = folder / "checkpoint"
    committed = _committed(target if saving.keeps else folder)
    assert committed >= (None not in allowed), f"{committed} committed checkpoints: {_names(folder)}"
    if saving.keeps:
        latest = CheckpointDirectory(target).latest()
        assert latest is not None, f"`latest` names none: {_names(folder)}"
        verify(latest, read_manifest(latest))

    found = saving.load(fabric, folder)
    assert found in allowed, f"{found} is loaded: {_names(folder)}"

    saved = saving.save_alone(fabric, folder, NEXT)
    left = {f"checkpoint/step-{NEXT:08d}", "checkpoint/latest"} if saving.keeps else {"checkpoint"}
    below = {f"{name}/{path.name}" for name in left if (folder / name).is_dir() for path in (folder / name).iterdir()}
    more = set(_names(folder)) - left - below - {"checkpoint"}
    assert not more, f"after one more save there is still {sorted(more)}"
    if saving.notes:
        assert (saved / NOTES).read_text() == "mine", "the notes are gone"
    return found


def _killed_while_loading(saving, fabric, folder):
    """Kill what reads wherever it writes, to put back what a killed save has left out of its place."""
    if saving.exchanges:
        return 0  # nothing is ever out of its place
    copy = folder.with_name("loaded")
    shutil.copytree(folder, copy)
    with write_points(copy) as points:
        saving.load(fabric, copy)
    shutil.rmtree(copy)
    for number in range(len(points)):
        outcome = Forked(_load_and_die, saving, fabric, folder, number).wait(30)
        assert outcome.code == -signal.SIGKILL, f"{outcome} of loading, at {points[number]}"
    return len(points)


def _load_and_die(saving, fabric, folder, number):
    with fault_at(number, folder):
        saving.load(fabric, folder)


def _committed(folder):
    """How many whole checkpoints there are, in place or set aside by a save that was going to take the place."""
    count = 0
    for path in folder.iterdir():
        if path.name.endswith((".staged", ".removed")):
            continue
        try:
            if (manifest := read_manifest(path)) is None:
                continue
            verify(path, manifest)
        except DamagedCheckpointError:
            assert path.name.startswith("."), f"{path.name} looks committed, but is damaged"
            continue
        count += 1
    return count


def _names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# ---- everywhere --------------------------------------------------------------------------------------------------


def _kill_everywhere(folder, saving):
    """Return how many kill points there were, and how many of them left the new checkpoint."""
    _warm_up(saving)
    fabric = Fabric(accelerator="cpu", devices=1)
    before = folder / "before"
    before.mkdir()
    if saving.overwrites:
        _done(Ranks(saving, _save, before, OLD))
    if saving.notes:
        (before / "checkpoint" / NOTES).write_text("mine")
    allowed = {OLD if saving.overwrites else None, NEW}
    found = []
    for kills in _batches(_kills(saving, folder, before)):
        found += _killed_and_looked_at(folder, saving, fabric, before, kills, allowed)
    return len(found), found.count(NEW)


def _batches(kills):
    """Several at a time: most of it is waiting."""
    return iter(lambda: list(islice(kills, 8)), [])


def _killed_and_looked_at(folder, saving, fabric, before, kills, allowed):
    folders = [folder / f"{number}" for number in range(len(kills))]
    for own in folders:
        shutil.copytree(before, own)
    saves = [Ranks(saving, _save, own, NEW, kill) for own, kill in zip(folders, kills, strict=True)]
    for ranks, kill in zip(saves, kills, strict=True):
        outcomes = ranks.outcomes(kill)
        assert outcomes[kill.rank].code == kill.code, (kill, outcomes)
        for rank, outcome in enumerate(outcomes):
            assert kill.all or rank == kill.rank or _tells(outcome.error, kill.rank), (kill, outcome)
    found = []
    for own, kill in zip(folders, kills, strict=True):
        try:
            found += [None] * _killed_while_loading(saving, fabric, own)
            found.append(_look(saving, fabric, own, allowed))
        except Exception as error:
            raise AssertionError(f"after {kill}: {error}") from error
        shutil.rmtree(own)
    return found


def _kills(saving, folder, before):
    own = folder / "recorded"
    shutil.copytree(before, own)
    outcomes = _done(Ranks(saving, _recorded, own, NEW))
    for rank, outcome in enumerate(outcomes):
        sizes = [path.stat().st_size for path in own.rglob("*" if rank == 0 else f"__{rank}_*") if path.is_file()]
        for everybody in (False, True)[: saving.ranks]:
            for number in range(len(outcome.value)):
                yield Kill(rank, number, all=everybody)
            for byte in _bytes_of(max(sizes), saving.bytes):
                yield Kill(rank, byte=byte, all=everybody)


def _bytes_of(size, count):
    """Places in a file: also around the end of the first piece of which there is a checksum."""
    piece = 4 << 20
    places = {size - 1, *(size * part // count for part in range(count)), piece - 1, piece, piece + 1}
    return sorted(place for place in places if place < size)


def _done(ranks, *about):
    outcomes = ranks.outcomes()
    for outcome in outcomes:
        if outcome.error is not None:
            raise AssertionError(f"{about}: {outcome.error!r}") from outcome.error
    return outcomes


def _tells(error, rank):
    """Whether an error is about a rank that is gone."""
    text = str(error).lower()
    return isinstance(error, (RuntimeError, OSError)) and (
        any(words in text for words in (f"rank {rank}", "connection closed", "connection reset", "timed out"))
    )


def _warm_up(saving):
    """Import all that a save needs, without a thread that a fork would miss."""
    if saving.strategy == "auto":
        return

    dist.init_process_group("fake", rank=0, world_size=1, store=dist.HashStore())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fabric = Fabric(accelerator="cpu", devices=1, strategy="fsdp")
        fabric.launch()
        fabric.setup_module(_model(0))
    dist.destroy_process_group()


# ---- the disk ----------------------------------------------------------------------------------------------------


def _points_of_saving(saving, folder):
    fabric = Fabric(accelerator="cpu", devices=1)
    for value in (OLD, NEW):
        with write_points(folder) as points:
            saving.save_alone(fabric, folder, value)
    return points


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_all_is_on_the_disk_before_it_takes_its_place(strategy, tmp_path):
    """A power cut may undo what was not brought to the disk by force, in any order."""
    points = _points_of_saving(Saving(0, strategy=strategy), tmp_path)
    (commit,) = (number for number, point in enumerate(points) if point.event in ("rename", "exchange"))
    last = {point.path: point.event for point in points[:commit] if point.path != "."}  # which was there before
    assert {*last.values()} == {"fsync"}, last
    assert points[commit].path in last
    assert ("fsync", ".") in [(point.event, point.path) for point in points[commit:]]  # so that the new name is kept


# ---- the figure --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tally():
    counts = []
    yield counts
    print(f"\n{sum(counts)} kill points, and after each a checkpoint that loads")


def test_there_are_200_kill_points():
    assert sum(saving.at_least for saving in SAVINGS.values()) >= 200


@pytest.mark.parametrize("name", SAVINGS)
def test_killed_anywhere(name, tmp_path, tally):
    ((count, are_new),) = on_ranks(1, _kill_everywhere, tmp_path, SAVINGS[name], timeout=100)
    print(f"{count} kill points while saving {name}: {count - are_new} left the former state, {are_new} the new one")
    tally.append(count)
    assert count >= SAVINGS[name].at_least
    assert 0 < are_new < count
