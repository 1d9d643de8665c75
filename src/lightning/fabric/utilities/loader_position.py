"""Where an iteration over a data loader is, and how to go on from there in another process.

What a batch contains depends on the order of the samples, which a sampler draws at the beginning of an epoch, and on
random numbers that the data set draws, here or in worker processes. So a position is: the states of the generators at
the beginning of the epoch, how many batches were handed out since, and the states of the workers' generators then. To
go on, the sampler is run again from the beginning, under the states of the beginning, and indices are skipped. Samples
are not loaded again, except for what cannot be skipped: data sets without indices.
"""

import copy
import pickle
import weakref
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    Sampler,
    get_worker_info,
)

from lightning.fabric.utilities.data import _samplers, _set_sampler_epoch, has_iterable_dataset, sized_len
from lightning.fabric.utilities.distributed import _distributed_is_initialized
from lightning.fabric.utilities.random_state import is_same, packed, unpacked
from lightning.fabric.utilities.rank_zero import rank_zero_only, rank_zero_warn
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states

_TORCH_SIZE = torch.get_rng_state().numel()
_HEAD = _TORCH_SIZE + 4
_SLOT_SIZE = _HEAD + (12 << 10)  # bytes; python's and numpy's, pickled, have 6 KB
_SPARE = 4  # how many batches a worker may be ahead of what is asked for, besides those that it prefetches


class Position:
    """Of one iteration: what its state is made of, kept at the cost of an addition per batch."""

    __slots__ = ("has_new_workers", "is_over", "iterator", "place", "recorder", "start", "yielded")

    def __init__(
        self, start: "Past", recorder: "Recorder | None", has_new_workers: bool, place: "_Place | None" = None
    ) -> None:
        self.start = start
        self.recorder = recorder
        self.has_new_workers = has_new_workers  # which draws a seed
        self.place = place or _Place()  # where it began
        self.yielded = self.place.batches
        self.is_over = False
        self.iterator: Callable[[], Any] = _nothing

    def watch(self, iterator: Iterator[Any]) -> None:
        """Look at torch's iterator, whose life is up to those who iterate."""
        if hasattr(iterator, "_dataset_fetcher"):
            self.iterator = weakref.ref(iterator)

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        return None, {**{name: getattr(self, name) for name in self.__slots__}, "iterator": _nothing}

    def is_drained(self) -> bool:
        """Whether the stream of samples has ended, though the last batch was yielded and not yet the end."""
        return bool(getattr(getattr(self.iterator(), "_dataset_fetcher", None), "ended", False))


def _nothing() -> None:
    return None


def begin(loader: Any, last: Position | None) -> tuple[Position, Iterator[Any]]:
    """Begin an epoch, after the iteration ``last``."""
    start, alive = Past.now(loader), _has_living_workers(loader)
    if alive or not _is_indexed(loader) or not loader.num_workers:
        recorder = last.recorder if alive and last is not None else None
        if last is not None and recorder is not None:
            recorder.next_epoch(last)
        return Position(start, recorder, not alive), iter(loader)
    recorder = Recorder(loader)
    with _attributes(loader, collate_fn=_Recording(loader.collate_fn, recorder)):
        return Position(start, recorder, has_new_workers=True), iter(loader)


def state_of(loader: Any, position: Position | None, epoch: int | None) -> dict[str, Any]:
    """Return what :func:`restore` and :func:`resume` need, as tensors and plain values.

    ``position``: of the last iteration; None if there was none. ``epoch``: of it; None if there was none.
    """
    workers, stateful = None, _stateful_part(loader)
    state = {
        "epoch": epoch,
        "rank": rank_zero_only.rank,
        "generators": [each.get_state() for each in _generators(loader)],
        "own": None if stateful is None else stateful.state_dict(),
        "samplers": _states_of_samplers(loader),
        "layout": _layout(loader),
        **_BEGINNING,
    }
    if position is None:
        return state
    alive = _has_living_workers(loader)
    if position.recorder is not None and (alive or not position.is_over) and _is_in_order(loader):
        workers = position.recorder.states(position)
    elif _is_indexed(loader) and loader.num_workers and not position.is_over:
        workers = "their random states were not kept"
    if position.is_over:
        return {**state, "has_new_workers": not alive, "workers": workers}
    return {
        **state,
        "layout": {**state["layout"], **(position.place.order or {})},
        "is_over": False,
        "is_drained": position.is_drained(),
        "yielded": position.yielded,
        "passed_over": position.place.samples,
        "start": position.start.to_plain(),
        "has_new_workers": position.has_new_workers,
        "workers": workers,
    }


_BEGINNING: dict[str, Any] = {
    "is_over": True,
    "is_drained": False,
    "yielded": 0,
    "passed_over": 0,
    "start": None,
    "has_new_workers": True,
    "workers": None,
}


def is_state(value: Any) -> bool:
    """Whether ``value`` is what :func:`state_of` returns."""
    return isinstance(value, Mapping) and {*_BEGINNING, "layout"} <= value.keys()


def for_all_ranks(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of one rank, to be given to all of them: each has to do the same with it, that rank as well."""
    return {**state, "is_for_all_ranks": True}


def restore(loader: Any, state: Mapping[str, Any]) -> bool:
    """Put back at once what can be; return whether the next iteration has to be begun by :func:`resume`."""
    if state["epoch"] is not None:
        _set_sampler_epoch(loader, state["epoch"])
    if state["rank"] == rank_zero_only.rank:
        for generator, saved in zip(_generators(loader), state["generators"], strict=False):
            generator.set_state(saved)
    if state["own"] is not None and (stateful := _stateful_part(loader)) is not None:
        stateful.load_state_dict(state["own"])
    if _is_own(state) or state["layout"]["shuffle"] is not None:  # else it is where other ranks are not
        # in the middle of an epoch it is begun again, and indices are skipped
        states = state["samplers"] if state["is_over"] else state["start"]["samplers"]
        for sampler, saved in zip(_stateful_samplers(loader), states, strict=False):
            sampler.load_state_dict(copy.deepcopy(saved))
    return not (state["is_over"] and state["has_new_workers"])


def resume(loader: Any, state: Mapping[str, Any]) -> tuple[Position, Iterator[Any]]:
    """Go on where ``state`` was taken. What is drawn to get there leaves no trace in the random states of now."""
    if _has_living_workers(loader):
        vars(loader)["_iterator"] = None  # they are somewhere else in the data
    place = _place(loader, state)
    if isinstance(place, str):
        rank_zero_warn(
            f"The loader cannot go on in the middle of epoch {state['epoch']}, but begins that epoch again, so that "
            f"samples are repeated: {place}."
        )
        return begin(loader, None)
    past = _saved_past(loader, state) or Past.now(loader)
    if state["own"] is not None and _stateful_part(loader) is not None:
        position = Position(past.copy(), None, True, place)
        with past:
            return position, iter(()) if state["is_drained"] else iter(loader)
    if not _is_indexed(loader):
        return _drop(loader, state, past, place)
    return _skip(loader, state, past, place)


def _saved_past(loader: Any, state: Mapping[str, Any]) -> "Past | None":
    if state["start"] is None or not _is_of_this_rank(state):
        return None
    return Past.from_plain(state["start"], loader)


# -- what a loader is like


def _is_indexed(loader: Any) -> bool:
    """Whether batches are made of samples by index, in the way of torch's own loader."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and type(loader)._get_iterator is DataLoader._get_iterator
        and not has_iterable_dataset(loader)
    )


def _has_living_workers(loader: Any) -> bool:
    return bool(getattr(loader, "persistent_workers", False)) and getattr(loader, "_iterator", None) is not None


def _is_in_order(loader: Any) -> bool:
    return bool(getattr(loader, "in_order", True) or loader.num_workers < 2)


def _stateful_part(loader: Any) -> Any:
    """What knows by itself where it is: the loader, or its iterable data set where that is not copied to workers."""
    parts = [loader]
    if has_iterable_dataset(loader) and not getattr(loader, "num_workers", 0):
        parts.append(loader.dataset)
    return next(filter(_is_stateful, parts), None)


def _is_stateful(part: Any) -> bool:
    return callable(getattr(part, "state_dict", None)) and callable(getattr(part, "load_state_dict", None))


def _stateful_samplers(loader: Any) -> list[Any]:
    return list(filter(_is_stateful, _samplers(loader)))


def _states_of_samplers(loader: Any) -> list[Any]:
    return [copy.deepcopy(each.state_dict()) for each in _stateful_samplers(loader)]


def _is_of_this_rank(state: Mapping[str, Any]) -> bool:
    return bool(state["rank"] == rank_zero_only.rank)


def _is_own(state: Mapping[str, Any]) -> bool:
    """Whether this is not another rank's state, nor one that other ranks were given too."""
    is_given_to_others = state.get("is_for_all_ranks", False) and _world_size() > 1
    return _is_of_this_rank(state) and not is_given_to_others


def _world_size() -> int:
    return dist.get_world_size() if _distributed_is_initialized() else 1


_KEEP_EVERY_RANK = (
    "Save with `fabric.checkpoints(...)`, which keeps the position of every rank, and load with its `resume`"
)


@dataclass(frozen=True)
class _Place:
    """How far an epoch has come: so many ``samples``, and then so many ``batches`` of this loader on this rank.

    Where the samples were of all ranks, ``order`` says how they are ordered, in the words of :func:`_layout`; what is
    left of them is dealt out to the ranks that there are.
    """

    samples: int = 0
    batches: int = 0
    order: Mapping[str, Any] | None = None


def _place(loader: Any, state: Mapping[str, Any]) -> _Place | str:
    """Where the loader is to go on, or why it cannot."""
    before, now = state["layout"], _layout(loader)
    is_dealt = before["shuffle"] is not None or _is_sequential(before)
    order = {name: before[name] for name in ("samplers", "shuffle")} if is_dealt and state["passed_over"] else None
    place = _Place(state["passed_over"], state["yielded"], order)
    if state["is_over"] or (state["own"] is not None and _stateful_part(loader) is not None):
        return place
    if before["samples"] != now["samples"]:
        return f"its data set has {now['samples']} samples, and had {before['samples']}"
    if len(state["generators"]) != (number := len(_generators(loader))):
        return f"it and its samplers have {number} generators of their own, and had {len(state['generators'])}"
    is_alike = all(before[name] == now[name] for name in ("samplers", "shuffle", "replicas"))
    if now["shuffle"] is None and before["world_size"] != now["world_size"]:
        is_alike = False
    if not is_alike and not (is_dealt and _can_deal(before, now)):
        return (
            f"it has the samplers {now['samplers']} on {now['world_size']} rank(s), and had {before['samplers']} on "
            f"{before['world_size']}"
        )
    if not is_dealt and not _is_own(state):
        return (
            f"each rank has an order of its own, and the checkpoint has the position of rank {state['rank']} alone. "
            f"{_KEEP_EVERY_RANK}"
        )
    is_alike = is_alike or (order is not None and before["replicas"] == now["replicas"])
    if is_alike and before["batch_size"] == now["batch_size"]:
        return place
    if before["batch_size"] is None or now["batch_size"] is None:
        return "its batches are made by a sampler of the user's, and the number of ranks has changed"
    return _converted(place, before, is_dealt)


def _converted(place: _Place, before: Mapping[str, Any], is_dealt: bool) -> _Place:
    """The place, where batches have another size or samples are shared by another number of ranks."""
    seen = place.batches * before["batch_size"]  # by each rank
    if not is_dealt:
        return _Place(place.samples + seen)
    each = -(-(before["samples"] - place.samples) // before["replicas"])
    samples = min(place.samples + min(seen, each) * before["replicas"], before["samples"])
    return _Place(samples, order={name: before[name] for name in ("samplers", "shuffle")})


def _can_deal(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the order of all ranks' samples can be had here."""
    if now["shuffle"] is not None and all(before[name] == now[name] for name in ("samplers", "shuffle")):
        return True
    is_plain = "DistributedSampler" in before["samplers"] or _is_sequential(before)
    return is_plain and set(now["samplers"]) <= {*_PLAIN_SAMPLERS, "DistributedSampler", "RandomSampler"}


def _rest_of_rank(loader: Any, place: _Place, epoch: int) -> list[int]:
    """What is left of the epoch for this rank, of what all ranks together have not seen."""
    order, shared = place.order or {}, _shared_sampler(loader)
    if shared is not None and _layout(loader)["shuffle"] == order["shuffle"]:
        alone = copy.copy(shared)
        alone.num_samples = alone.total_size = len(alone.dataset)
    else:
        shuffle, seed = order["shuffle"] or (False, 0)
        alone = DistributedSampler(loader.dataset, 1, 0, shuffle, seed)
    alone.num_replicas, alone.rank, alone.epoch = 1, 0, epoch
    every = list(alone)
    rest = every[place.samples :]
    ranks, rank = (1, 0) if shared is None else (shared.num_replicas, shared.rank)
    each = len(rest) // ranks if shared is not None and shared.drop_last else -(-len(rest) // ranks)
    rest += (every * ranks)[: max(0, each * ranks - len(rest))]  # as the sampler does at the end of any epoch
    return rest[rank : each * ranks : ranks]


_PLAIN_SAMPLERS = ("SequentialSampler", "BatchSampler")


def _is_sequential(layout: Mapping[str, Any]) -> bool:
    return set(layout["samplers"]) <= set(_PLAIN_SAMPLERS)


def _shared_sampler(loader: Any) -> Any:
    return next((each for each in _samplers(loader) if isinstance(each, DistributedSampler)), None)


def _layout(loader: Any) -> dict[str, Any]:
    """How samples are dealt out: where that is equal, as many batches are the same samples."""
    samplers = _samplers(loader)
    shared = _shared_sampler(loader)
    index_sampler = _index_sampler(loader)
    return {
        "samplers": [type(each).__name__ for each in samplers],
        "shuffle": None if shared is None else [shared.shuffle, shared.seed],
        "replicas": 1 if shared is None else shared.num_replicas,
        "batch_size": index_sampler.batch_size if type(index_sampler) is BatchSampler else None,
        "samples": sized_len(getattr(loader, "dataset", None)),
        "world_size": _world_size(),
        "num_workers": getattr(loader, "num_workers", 0),
    }


def _index_sampler(loader: Any) -> Any:
    batch_sampler = getattr(loader, "batch_sampler", None)
    return getattr(loader, "sampler", None) if batch_sampler is None else batch_sampler


@contextmanager
def _attributes(loader: Any, **values: Any) -> Iterator[None]:
    """Inside, the loader has these; what it makes inside keeps them. It refuses to have some of them set."""
    own = vars(loader)
    before = {name: own[name] for name in values}
    own.update(values)
    try:
        yield
    finally:
        own.update(before)


# -- going on


def _drop(loader: Any, state: Mapping[str, Any], past: "Past", place: _Place) -> tuple[Position, Iterator[Any]]:
    """Begin the epoch again, and load and drop the batches that there were: nobody else knows what comes after them."""
    position = Position(past.copy(), None, state["has_new_workers"], place)
    if not state["has_new_workers"]:
        _warn_of_workers("`persistent_workers=True` keeps them from epoch to epoch")
    with past if state["has_new_workers"] else Past.now(loader):
        iterator = iter(loader)
        is_here = not getattr(loader, "num_workers", 0)
        drawing = getattr(loader, "dataset", loader) if is_here else None
        _pass_over(iterator, place.batches, drawing, "methods `state_dict` and `load_state_dict`")
    return position, iterator


def _skip(loader: Any, state: Mapping[str, Any], past: "Past", place: _Place) -> tuple[Position, Iterator[Any]]:
    """Begin the epoch again, without the indices of the batches that there were."""
    start, workers, recorder = past.copy(), loader.num_workers, None
    states = _states_of_workers(loader, state)
    # batches of a round that not all workers have finished are made again: each worker begins where its states are from
    again = place.batches % workers if workers and states is not None else 0
    skipping = _Skipping(_index_sampler(loader), place.batches - again, past)
    if place.samples:
        batches = loader.batch_sampler
        samples: Any = _Skipping(batches.sampler, place.samples, past)
        if place.order is not None:
            samples = _rest_of_rank(loader, place, state["epoch"])
        skipping.instead = BatchSampler(samples, batches.batch_size, batches.drop_last)
    changes: dict[str, Any] = {"batch_sampler" if loader.batch_sampler is not None else "sampler": skipping}
    if workers:
        recorder = Recorder(loader, origin=place.batches - again, initial=states)
        changes["collate_fn"] = _Recording(loader.collate_fn, recorder)
        if states:
            changes["worker_init_fn"] = _Beginning(loader.worker_init_fn, states)
    with past if state["has_new_workers"] else Past.now(loader), _attributes(loader, **changes):
        iterator = iter(loader)
    skipping.has_begun()
    with past:
        _pass_over(iterator, again)
    if state["is_over"]:  # it was not to get there that this was drawn
        past.adopt()
    return Position(start, recorder, state["has_new_workers"], place), iterator


def _states_of_workers(loader: Any, state: Mapping[str, Any]) -> list[Any] | None:
    """Return the states that workers begin with; []: those that follow from their seeds; None: they cannot be had."""
    states, before = state["workers"], state["layout"]["num_workers"]
    if not loader.num_workers or not _is_of_this_rank(state):
        return None
    if not _is_in_order(loader):
        rank_zero_warn(
            "The workers of the loader hand out batches as they are ready (`in_order=False`), so nobody knows which of "
            "this epoch there were. It goes on after as many; some samples may be repeated or left out."
        )
        return None
    if isinstance(states, str) or loader.num_workers != before:
        _warn_of_workers(
            states if isinstance(states, str) else f"there are {loader.num_workers} workers, and were {before}"
        )
        return None
    return states or []


def _warn_of_workers(why: str) -> None:
    rank_zero_warn(
        "The loader goes on with the right samples, but random numbers that its workers draw are not those of a run "
        f"without the interruption: {why}."
    )


class _Skipping(Sampler[Any]):
    """``sampler`` without its first ``count`` items, once; they are drawn in the ``past``."""

    def __init__(self, sampler: Any, count: int, past: "Past") -> None:
        self.sampler = sampler
        self.instead: Any = None  # what is drawn from once
        self._count = count
        self._past: Past | None = past
        self._is_beginning = True

    def has_begun(self) -> None:
        """What is drawn from now on is not of the past. And the next epoch of the same workers has all items."""
        self._past = None
        self._is_beginning = False

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        if self._past is None:
            return iter(self.sampler)
        with self._past:
            return self._rest(iter(self.sampler if self.instead is None else self.instead), self._past)

    def _rest(self, items: Iterator[Any], past: "Past") -> Iterator[Any]:
        with past:
            _pass_over(items, self._count, _innermost(self.sampler))
        while self._is_beginning:  # workers are given their first batches at once
            with past:
                item = next(items, _END)
            if item is _END:
                return
            yield item
        yield from items


_END = object()


def _innermost(sampler: Any) -> Any:
    while (inner := getattr(sampler, "sampler", None)) is not None:
        sampler = inner
    return sampler


def _pass_over(items: Iterator[Any], count: int, drawing: Any = None, or_else: str = "") -> None:
    """Drop ``count`` items. Warn if ``drawing`` them takes random numbers all along, which training does as well."""
    if next(islice(items, min(count, 1)), _END) is _END:
        return
    before = None if drawing is None else _collect_rng_states(False)
    for _ in islice(items, count - 1):
        pass
    if before is not None and not is_same(packed(before), packed(_collect_rng_states(False))):
        rank_zero_warn(
            f"{type(drawing).__name__} draws random numbers all through the epoch, and shares the generator with "
            "everything else. So what it yields after an interruption in the middle of an epoch may differ from what "
            "it would yield without one. Give it a generator of its own" + (f", or {or_else}." if or_else else ".")
        )


# -- random states


class Past:
    """Random states of another time: inside of ``with past:`` they are the current ones, and go on from there.

    Those of the process, and of the generators that a loader and its samplers have. ``samplers`` are the states that
    samplers had then by their own account; nobody puts these back here.
    """

    def __init__(
        self, states: dict[str, Any], generators: list[Generator], their_states: list[Tensor], samplers: list[Any]
    ) -> None:
        self._states = states
        self._samplers = samplers
        self._generators = generators
        self._their_states = their_states
        self._depth = 0

    @classmethod
    def now(cls, loader: Any) -> "Past":
        generators = _generators(loader)
        their_states = [each.get_state() for each in generators]
        return cls(_collect_rng_states(False), generators, their_states, _states_of_samplers(loader))

    def copy(self) -> "Past":
        return Past(self._states, self._generators, self._their_states, self._samplers)

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._swap()

    def __exit__(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._swap()

    def _swap(self) -> None:
        now, theirs = _collect_rng_states(False), [each.get_state() for each in self._generators]
        self.adopt()
        self._states, self._their_states = now, theirs

    def adopt(self) -> None:
        """Let these be the current ones."""
        _set_rng_states(self._states)
        for generator, state in zip(self._generators, self._their_states, strict=True):
            generator.set_state(state)

    def to_plain(self) -> dict[str, Any]:
        return {
            "process": packed(self._states),
            "generators": list(self._their_states),
            "samplers": self._samplers,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], loader: Any) -> "Past":
        states = unpacked(plain["process"])
        return cls(states, _generators(loader), list(plain["generators"]), plain["samplers"])


def _generators(loader: Any) -> list[Generator]:
    """Those of the loader and its samplers, each once."""
    found = (getattr(each, "generator", None) for each in (loader, *_samplers(loader)))
    return list({id(each): each for each in found if isinstance(each, Generator)}.values())


# -- random states of workers


class Recorder:
    """Keeps the random states of a loader's workers after each of their last batches, in memory that is shared."""

    def __init__(self, loader: Any, origin: int = 0, initial: list[Any] | None = None) -> None:
        num_workers = loader.num_workers
        self.slots = loader.prefetch_factor + _SPARE
        self.memory = torch.zeros(num_workers, self.slots, _SLOT_SIZE, dtype=torch.uint8).share_memory_()
        self.counts = torch.zeros(num_workers, dtype=torch.int64).share_memory_()  # batches made by each
        self.initial = initial or None  # states that workers have begun with; None: by their seeds
        self.begun: list[int] | None = [0] * num_workers  # batches made by each before this epoch; None: not known
        self.origin = origin  # where in the epoch the workers have begun, a multiple of their number

    def next_epoch(self, last: Position) -> None:
        """Workers that stay alive begin another epoch."""
        dealt = self._dealt(last.yielded - self.origin)
        known = self.begun is not None and last.is_over  # else they were ahead by nobody knows how much
        self.begun = [before + more for before, more in zip(self.begun or dealt, dealt, strict=True)] if known else None
        self.origin = 0

    def _dealt(self, batches: int) -> list[int]:
        workers = len(self.counts)
        return [(batches - worker + workers - 1) // workers for worker in range(workers)]

    def states(self, position: Position) -> list[Any] | str | None:
        """Return the states with which workers go on, each from a round of batches that all workers have begun.

        None: those that follow from their seeds. A text: why they are not known.
        """
        if self.begun is None:
            return "an epoch was left before its end, and `persistent_workers=True`"
        workers = len(self.counts)
        made = self._dealt(position.yielded - self.origin)
        if not position.is_over:
            made = [(position.yielded - self.origin) // workers] * workers
        made = [before + more for before, more in zip(self.begun, made, strict=True)]
        if not any(made):
            return self.initial
        found = [self._read(worker, count) for worker, count in enumerate(made)]
        return "they could not be kept" if None in found else found

    def _read(self, worker: int, count: int) -> Any:
        if count == 0 and self.initial is not None:
            return self.initial[worker]
        if count == 0 or not 0 <= int(self.counts[worker]) - count < self.slots:
            return None
        slot = self.memory[worker, (count - 1) % self.slots]
        end = _HEAD + int.from_bytes(bytes(slot[_TORCH_SIZE:_HEAD].tolist()), "little")
        if end == _HEAD:
            return None
        version, words, gauss, numpy_state = pickle.loads(bytes(slot[_HEAD:end].tolist()))
        states = {"torch": slot[:_TORCH_SIZE].clone(), "python": (version, tuple(array("I", words)), gauss)}
        return packed(states if numpy_state is None else {**states, "numpy": numpy_state})

    def write(self, worker: int) -> None:
        """In the worker, after each batch: a tenth of a millisecond, half of it numpy's."""
        count = int(self.counts[worker])
        slot = self.memory[worker, count % self.slots]
        states = _collect_rng_states(include_cuda=False)
        version, words, gauss = states["python"]
        data = pickle.dumps((version, array("I", words).tobytes(), gauss, states.get("numpy")), pickle.HIGHEST_PROTOCOL)
        if len(data) > _SLOT_SIZE - _HEAD:  # a generator of somebody's
            data = b""
        slot[:_TORCH_SIZE] = states["torch"]
        rest = bytearray(len(data).to_bytes(_HEAD - _TORCH_SIZE, "little") + data)
        slot[_TORCH_SIZE : _TORCH_SIZE + len(rest)] = torch.frombuffer(rest, dtype=torch.uint8)
        self.counts[worker] = count + 1


class _Recording:
    """The loader's ``collate_fn``, after which the worker's random states are kept."""

    def __init__(self, collate: Callable[[Any], Any], recorder: Recorder) -> None:
        self._collate = collate
        self._memory = recorder

    def __call__(self, samples: Any) -> Any:
        batch = self._collate(samples)
        if (worker := get_worker_info()) is not None:
            self._memory.write(worker.id)
        return batch


class _Beginning:
    """The loader's ``worker_init_fn``, after which the worker takes over the states of one that is gone."""

    def __init__(self, init: Callable[[int], None] | None, states: list[Any]) -> None:
        self._init = init
        self._states = states

    def __call__(self, worker: int) -> None:
        if self._init is not None:
            self._init(worker)
        _set_rng_states(unpacked(self._states[worker]))
