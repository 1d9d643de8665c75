"""Initial values as a recording: a module is made without memory, and filled later, tensor by tensor, on any device.

    with recording_init():
        model = BigModel()            # on the meta device: no memory
    ...                               # decide where its parameters go
    fill_from_recordings({parameter: keep_my_part, ...}, device)

What fills the tensors is recorded as the operations on memory ("steps") that torch would have run, and played back
with the random numbers that it would have drawn: the values, and the state in which the generator of random numbers is
left, are to the bit those of making the module for real.

Playing back runs only the steps that the wanted values depend on. Of what is overwritten before it is read, only the
random numbers are drawn. A wanted tensor is handed over after its last use and not kept, so that there is memory for
few of them at a time.

How the order of random numbers is kept: while recording, nothing is drawn. Instead each recorded draw puts the
generator into a new state of its own, which stands for the true one, "the state after so many draws". Where the program
itself sets the state (``manual_seed``, ``fork_rng``), the state found there tells which one was meant. Recordings that
follow each other before any is played back are one: the second goes on with the random numbers that the first ends
with.
"""

import hashlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning.fabric.utilities.types import _DEVICE

_META = torch.device("meta")
_FILLS = frozenset(  # what these write does not depend on what was there
    f"{name}_"
    for name in ("zero", "fill", "copy", "normal", "uniform", "random", "bernoulli", "exponential", "geometric")
) | {"log_normal_", "cauchy_"}
_BUCKET_BYTES = 25 * 2**20  # what ranks agree on at once; it needs as much memory again
_ALLOCATIONS = frozenset(("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"))


def recording_init(device: _DEVICE = "cpu") -> AbstractContextManager[None]:
    """Return a context: tensors made inside are on the meta device, and how they would be filled is recorded.

    Inside, a value that is asked for (``item()``, ``tolist()``, ``if tensor.any():``) is computed there and then. What
    is made from numpy arrays, or explicitly on a device, is made for real. Contexts may be nested.

    A recording needs memory for its steps, and for real tensors that are copied from. It goes once it was played back
    and the tensors made inside are gone, which is noticed at the next recording or filling.

    Args:
        device: where the tensors would be, if they were made for real: it decides whose random numbers are drawn.

    """
    return _recording(torch.device(device))


def fill_from_recordings(
    wanted: Mapping[Tensor, Callable[[Tensor], object]],
    device: _DEVICE,
    agree: Callable[[Tensor], Tensor] = lambda state: state,
) -> set[Tensor]:
    """Compute the values of the recorded meta tensors among ``wanted``, and hand each to its callback.

    Tensors are known by identity, or by the memory that they share. The callback may keep its tensor, which is on
    ``device``, for it has that memory to itself (shared only by tensors that are views of each other). A tensor that
    was never written is zero. All this is done without gradients; a callback must not draw random numbers.

    The random numbers are those of the state at the entry of ``recording_init``, whatever was drawn since. If nobody
    has drawn since its exit, the generator is left as if the module had been made for real, else as it was found.

    Args:
        wanted: meta tensor to callback.
        device: where the callbacks want the values. They are computed on the device that ``recording_init`` was told.
        agree: called with integer tensors on the CPU, one after the other: states of random number generators, bytes
            of values. Returns those to use. For ranks that shall have the same values it is a broadcast; then
            every rank passes tensors of the same modules, and keeps its own generator's state if that was another.

    Returns:
        The tensors of which there is no recording.

    Raises:
        RuntimeError: if what was recorded differs from what others recorded, by ``agree``, in more than values.

    """
    forget_what_is_gone()
    left = set(wanted)
    for recording in list(_RECORDINGS):
        mine = {tensor: wanted[tensor] for tensor in left if recording.knows(tensor)}
        if mine:
            left -= mine.keys()
            recording.fill(mine, torch.device(device), agree)
    return left


def is_recorded(tensor: Tensor) -> bool:
    """Whether :func:`fill_from_recordings` knows how ``tensor`` would have been filled."""
    return any(recording.knows(tensor) for recording in _RECORDINGS)


def recorded_source(module: nn.Module, name: str) -> Tensor | None:
    """Return the recorded meta tensor that was ``module``'s parameter or buffer ``name`` when it was made.

    Differs from the present one if the module was converted to another dtype since. None if nothing is recorded.
    """
    tensor = _MADE.get(module, {}).get(name)
    return tensor if tensor is not None and is_recorded(tensor) else None


# ---- steps -----------------------------------------------------------------------------------------------------------


class _View(NamedTuple):
    """A tensor as a look at memory."""

    memory: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    conj: bool
    neg: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "_View":
        return cls(
            _memory(tensor),
            tuple(tensor.size()),
            tensor.stride(),
            int(tensor.storage_offset()),
            tensor.dtype,
            tensor.is_conj(),
            tensor.is_neg(),
        )

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        tensor = torch.empty(0, dtype=self.dtype, device=storage.device)
        tensor.set_(storage, self.offset, self.size, self.stride)
        tensor = tensor.conj() if self.conj else tensor
        return torch._neg_view(tensor) if self.neg else tensor


class _Draw(NamedTuple):
    """A draw of random numbers: the how manyth of which generator; and the state that the program set right before."""

    stream: int
    number: int
    before: "Tensor | int | None"  # int: that after so many draws


class _Output(NamedTuple):
    """Where a result goes: its position among the results, and its memory, which is all its own."""

    position: int
    view: _View


@dataclass(frozen=True)
class _Step:
    """One recorded call. In its arguments a meta tensor is a ``_View``."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: frozenset[int]
    writes: Mapping[int, bool]  # memory to whether none of its former content is left
    outputs: tuple[_Output, ...]
    draw: _Draw | None
    only_draws: bool  # the number of random numbers depends on no tensor's values
    default_dtype: torch.dtype

    @property
    def touched(self) -> frozenset[int]:
        return self.reads | self.writes.keys()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor covers its memory: no gap, no overlap, nothing left over."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return the tree of tuples, lists and dicts with ``function`` applied to its leaves."""
    if isinstance(tree, tuple) and not isinstance(tree, _View):
        return tuple(_map(function, item) for item in tree)
    if isinstance(tree, list):
        return [_map(function, item) for item in tree]
    if isinstance(tree, dict):
        return {key: _map(function, item) for key, item in tree.items()}
    return function(tree)


def _leaves(tree: Any) -> list[Any]:
    leaves: list[Any] = []
    _map(leaves.append, tree)
    return leaves


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(tree) if isinstance(leaf, Tensor)]


# ---- random numbers --------------------------------------------------------------------------------------------------


def default_generator(device: torch.device) -> torch.Generator:
    """Return what draws the random numbers of ``device`` where no generator is given."""
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    module.init()
    return module.default_generators[device.index if device.index is not None else module.current_device()]


def _same(one: torch.Generator, other: torch.Generator) -> bool:
    return one._cdata == other._cdata  # type: ignore[attr-defined]  # each operator is passed a new object


def _digest(state: Tensor) -> bytes:
    return hashlib.blake2b(state.numpy().tobytes(), digest_size=16).digest()


class _Stream:
    """The random numbers of one generator in a recording: how many draws there were, and which state means which."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.start = generator.get_state()
        self.draws = 0
        self.end: Tensor | int = 0  # the state at the exit of the recording
        self.exit = b""  # what stands for it
        # our states, and the number of draws that each stands for. A state that is not ours stands for itself: so what
        # ranks find does not depend on their seeds
        self.meant: dict[bytes, int] = {}
        self.true: dict[int, Tensor] = {}  # states that are known

    def set_by_program(self) -> Tensor | int | None:
        """Return the state that somebody set since the last draw, if so; it is one of ours if there is a number."""
        state = self.generator.get_state()
        number = self.meant.get(_digest(state))
        if number is not None:
            return None if number == self.draws else number
        return state if self.draws or not torch.equal(state, self.start) else None

    def draw(self, index: int) -> _Draw:
        """Note a draw, and put the generator into a state that stands for the one after it."""
        before = self.set_by_program()
        self.draws += 1
        _move_on(self.generator)
        self.meant[_digest(self.generator.get_state())] = self.draws
        return _Draw(index, self.draws, before)

    def finish(self) -> None:
        state = self.set_by_program()
        self.end = self.draws if state is None else state
        self.exit = _digest(self.generator.get_state())


def _agree_on(tensors: list[Tensor], agree: Callable[[Tensor], Tensor]) -> None:
    """Replace the contents of ``tensors`` by those that ranks agree on, in as few steps as memory permits."""
    if not tensors:
        return
    own_sizes = torch.tensor([tensor.nbytes for tensor in tensors])
    sizes = agree(own_sizes.clone()).to("cpu")  # a broadcast may be in place
    buckets = _buckets(sizes.tolist())
    if not torch.equal(sizes, own_sizes):
        for _ in buckets:
            agree(torch.empty(0, dtype=torch.uint8))  # ranks that do agree wait for it
        raise RuntimeError(
            "The model that this rank made is not initialised as that of rank 0: values that its `__init__` asks for, "
            "of random numbers for one, led to other steps. Seed all ranks alike before the model is made, with "
            "`seed_everything(...)`."
        )
    for bucket in buckets:
        flat = [tensor.detach().to("cpu").reshape(-1).view(torch.uint8) for tensor in tensors[bucket]]
        common = agree(torch.cat(flat)).to("cpu").split([part.numel() for part in flat])
        for tensor, part in zip(tensors[bucket], common, strict=True):
            tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))  # where it is alone it is aligned


def _buckets(sizes: list[int]) -> list[slice]:
    """Return the ranges of those that are sent together."""
    starts, total = [0], 0
    for index, size in enumerate(sizes):
        if total + size > _BUCKET_BYTES and index > starts[-1]:
            starts.append(index)
            total = 0
        total += size
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def _move_on(generator: torch.Generator) -> None:
    """Put ``generator`` into a state that a program would not come to by drawing."""
    if generator.device.type == "cuda":
        generator.set_offset(generator.get_offset() + 4 * 1_000_003)
    else:
        torch.empty(509, dtype=torch.int64, device=generator.device).random_(generator=generator)


# ---- a recording -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Recording:
    device: torch.device
    steps: list[_Step] = field(default_factory=list)
    streams: list[_Stream] = field(default_factory=list)
    memories: dict[int, StorageWeakRef] = field(default_factory=dict)  # keeps addresses from being used again
    nbytes: dict[int, int] = field(default_factory=dict)
    unknown: set[int] = field(default_factory=set)  # memories whose content comes from outside
    agreed: bool = False
    own_states: bool = True  # no other rank's
    running: bool = False  # some thread is inside
    _compacted: int = 0

    def knows(self, tensor: Tensor) -> bool:
        """Whether the recording tells the values of ``tensor``."""
        if not tensor.is_meta or is_lazy(tensor) or type(tensor) not in (Tensor, nn.Parameter):
            return False
        memory = _memory(tensor)
        return memory in self.memories and memory not in self.unknown

    # -- recording

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``func``, one of torch's operators, and note how to do it with values."""
        tensors = _tensors((args, kwargs))
        if not all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors):
            return func(*args, **kwargs)
        if not any(tensor.is_meta for tensor in tensors) and kwargs.get("device") != _META:
            self._before_real_call(func, args, kwargs)
            return func(*args, **kwargs)
        can_know = all(self.knows(tensor) for tensor in tensors if tensor.is_meta)
        if can_know and _needs_values(func, args, kwargs):
            return self._with_values(func, args, kwargs, _facts(func).makes_new)
        args, kwargs = self._real_to_meta(args, kwargs)
        try:
            result = func(*args, **kwargs)
        except NotImplementedError:  # an operator that the meta device does not have
            if not can_know:
                raise
            return self._with_values(func, args, kwargs, True)
        if not _facts(func).only_looks and any(tensor.is_meta for tensor in _tensors(result)):
            self._note(func, args, kwargs, result)
        return result

    def note_init(self, function: Callable[..., Any], tensor: Tensor, arguments: Mapping[str, Any]) -> None:
        """Note a call of a function that fills ``tensor`` and, on the meta device, does nothing."""
        view, whole = self._seen(tensor), _is_dense(tensor)
        draw = self._draw(arguments.get("generator"))
        self._append(function, (view,), dict(arguments), set(), {view.memory: whole}, (), draw, True)

    def constant(self, real: Tensor) -> Tensor:
        """Return a meta tensor with the values of ``real``, which nobody else may write to."""
        meta = torch.empty_strided(real.size(), real.stride(), dtype=real.dtype, device=_META)
        self._seen(meta, made=True)
        self._copy(real, meta)
        return meta

    def _copy(self, real: Tensor, meta: Tensor) -> None:
        view, whole = self._seen(meta), _is_dense(meta)
        self._append(torch.ops.aten.copy_.default, (view, real), {}, set(), {view.memory: whole}, (), None, False)

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        known = {_memory(tensor) for tensor in _tensors((args, kwargs)) if tensor.is_meta}
        outputs = tuple(
            _Output(position, self._seen(leaf, made=True))
            for position, leaf in enumerate(_leaves(result))
            if isinstance(leaf, Tensor) and _memory(leaf) not in known
        )
        if _facts(func).allocates:
            return
        writes, reads = {output.view.memory: True for output in outputs}, set[int]()
        for tensors, is_written, fills in _arguments(func, args, kwargs):
            if not fills:
                reads |= {_memory(tensor) for tensor in tensors}
            if is_written:
                writes |= {_memory(tensor): fills and _is_dense(tensor) for tensor in tensors}
        if not writes:
            return  # another look at the same memory
        draw = self._draw(_generator_of(args, kwargs)) if _facts(func).draws else None
        views = _map(lambda leaf: self._seen(leaf) if _is_meta(leaf) else leaf, (args, kwargs))
        self._append(func, views[0], views[1], reads, writes, outputs, draw, not reads)

    def _append(
        self,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        reads: set[int],
        writes: dict[int, bool],
        outputs: tuple[_Output, ...],
        draw: _Draw | None,
        only_draws: bool,
    ) -> None:
        if reads & self.unknown:
            self.unknown |= writes.keys()
        else:
            self.unknown -= {memory for memory, whole in writes.items() if whole}
        dtype = torch.get_default_dtype()
        self.steps.append(_Step(call, args, kwargs, frozenset(reads), writes, outputs, draw, only_draws, dtype))

    def _seen(self, tensor: Tensor, made: bool = False) -> _View:
        view, storage = _View.of(tensor), tensor.untyped_storage()
        if view.memory not in self.memories:
            self.memories[view.memory] = StorageWeakRef(storage)
            if not made:
                self.unknown.add(view.memory)
        self.nbytes[view.memory] = max(storage.nbytes(), self.nbytes.get(view.memory, 0))
        return view

    def _draw(self, generator: torch.Generator | None) -> _Draw:
        index = self._stream(generator if generator is not None else default_generator(self.device))
        return self.streams[index].draw(index)

    def _stream(self, generator: torch.Generator) -> int:
        for index, stream in enumerate(self.streams):
            if _same(stream.generator, generator):
                return index
        self.streams.append(_Stream(generator))
        return len(self.streams) - 1

    def _real_to_meta(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Take real tensors, which meta tensors do not mix with, for constants."""

        def to_meta(leaf: Any) -> Any:
            return self.constant(leaf.detach().clone()) if isinstance(leaf, Tensor) and not leaf.is_meta else leaf

        return _map(to_meta, (args, kwargs))

    def finish(self) -> None:
        for stream in self.streams:
            stream.finish()

    def left(self) -> set[int]:
        """Return the memories that some tensor still has."""
        return {memory for memory, reference in self.memories.items() if not reference.expired()}

    def compact(self) -> None:
        """Drop steps whose results nobody can ask for. Draws stay: any state may be gone back to."""
        if len(self.steps) < 2 * self._compacted + 100:  # seldom, for it looks at all of them
            return
        states = {(step.draw.stream, step.draw.number) for step in self.steps if step.draw is not None}
        left = self.left()
        self.steps = [step for step, _ in self._plan(left, states).steps]
        self._compacted = len(self.steps)
        left.update(*(step.touched for step in self.steps))
        self.memories = {memory: reference for memory, reference in self.memories.items() if memory in left}
        self.nbytes = {memory: size for memory, size in self.nbytes.items() if memory in left}
        self.unknown &= left

    # -- values while recording

    def _before_real_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let a real draw come after the recorded ones: bring its generator into the true state."""
        if not _facts(func).draws:
            return
        tensors = _tensors((args, kwargs))
        device = tensors[0].device if tensors else torch.device(kwargs.get("device") or "cpu")
        generator = _generator_of(args, kwargs) or default_generator(device)
        index = self._stream(generator)
        state = self.streams[index].set_by_program()
        number = self.streams[index].draws if state is None else state
        if isinstance(number, int):
            generator.set_state(self._true_state(index, number))

    def _with_values(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], to_meta: bool) -> Any:
        """Run ``func`` with the values of meta tensors; with ``to_meta`` what comes out is a meta tensor again."""
        values = {id(tensor): self.value(tensor) for tensor in _tensors((args, kwargs)) if tensor.is_meta}
        real_args, real_kwargs = _map(lambda leaf: values.get(id(leaf), leaf), (args, kwargs))
        if not to_meta:
            return func(*real_args, **real_kwargs)
        self._before_real_call(func, real_args, real_kwargs)
        result = func(*real_args, **real_kwargs)
        known = {id(values[id(tensor)]): tensor for tensor in _written(func, args, kwargs)}
        for tensor in known.values():
            self._copy(values[id(tensor)], tensor)

        def from_real(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return known[id(leaf)] if id(leaf) in known else self.constant(leaf)

        return _map(from_real, result)

    def value(self, tensor: Tensor) -> Tensor:
        """Return what ``tensor`` holds at this point of the recording."""
        found: list[Tensor] = []
        view = self._seen(tensor)
        before = [stream.generator.get_state() for stream in self.streams]
        try:
            self._play(self._plan({view.memory}, ()), {view.memory: [_Request(view, found.append, self.device)]})
        finally:
            for stream, state in zip(self.streams, before, strict=True):
                stream.generator.set_state(state)
        return found[0]

    # -- playing back

    def fill(
        self,
        wanted: Mapping[Tensor, Callable[[Tensor], object]],
        device: torch.device,
        agree: Callable[[Tensor], Tensor],
    ) -> None:
        """Hand every tensor of ``wanted`` to its callback; the rest is promised in ``fill_from_recordings``."""
        self._agree(agree)
        requests: dict[int, list[_Request]] = {}
        for tensor, callback in wanted.items():
            view = self._seen(tensor)
            requests.setdefault(view.memory, []).append(_Request(view, callback, device))
        states = [stream.generator.get_state() for stream in self.streams]
        untouched = {i for i, stream in enumerate(self.streams) if _digest(states[i]) == stream.exit}
        leave = {i: self.streams[i].end for i in untouched if self.own_states}
        noted = {(i, end) for i, end in leave.items() if isinstance(end, int)}
        try:
            self._play(self._plan(requests.keys(), noted), requests)
            for i, end in leave.items():
                states[i] = self._true_state(i, end) if isinstance(end, int) else end
        finally:
            for stream, state in zip(self.streams, states, strict=True):
                stream.generator.set_state(state)
        _forget_made(requests.keys())

    def _agree(self, agree: Callable[[Tensor], Tensor]) -> None:
        """Replace what this recording starts from, once, by what ranks agree on: states of generators, and constants.

        Constants may be values that were asked for while recording, which each rank computed from its own state.
        """
        if self.agreed:
            return
        for stream in self.streams:
            stream.true.clear()
        states = [state for stream in self.streams for state in (stream.start, stream.end) if isinstance(state, Tensor)]
        states += [s.draw.before for s in self.steps if s.draw is not None and isinstance(s.draw.before, Tensor)]
        constants = [leaf for step in self.steps for leaf in _tensors((step.args, step.kwargs)) if leaf.numel()]
        before = [state.clone() for state in states]
        _agree_on([*states, *constants], agree)
        self.own_states = all(map(torch.equal, states, before))
        self.agreed = True

    def _true_state(self, index: int, number: int) -> Tensor:
        """Return the state of a generator after so many draws; it has to be set anew afterwards."""
        true = self.streams[index].true
        if number not in true:
            self._play(self._plan((), {(index, number)}), {})
        return true[number]

    def _plan(self, memories: Iterable[int], noted: Iterable[tuple[int, int]]) -> "_Plan":
        """Choose, from the last step to the first, what the contents of ``memories`` and the states depend on."""
        needed, noted = set(memories), set(noted)
        drawing: set[int] = set()  # generators whose state at this point matters
        steps: list[tuple[_Step, bool]] = []
        for step in reversed(self.steps):
            draw = step.draw
            if draw is not None and (draw.stream, draw.number) in noted:
                drawing.add(draw.stream)
            live = not needed.isdisjoint(step.writes)
            if not live and (draw is None or draw.stream not in drawing):
                continue
            only_draws = not live and step.only_draws
            steps.append((step, only_draws))
            if not only_draws:
                needed -= {memory for memory, whole in step.writes.items() if whole}
                needed |= step.reads | {memory for memory, whole in step.writes.items() if not whole}
            if draw is not None:
                (drawing.add if draw.before is None else drawing.discard)(draw.stream)
                if isinstance(draw.before, int):
                    noted.add((draw.stream, draw.before))
        starts = drawing | {i for i, number in noted if number == 0}
        return _Plan(steps[::-1], starts, noted)

    @torch.no_grad()
    def _play(self, plan: "_Plan", requests: Mapping[int, list["_Request"]]) -> None:
        """Run the plan. Generators are left where the last draw left them."""
        last = {memory: at for at, (step, dry) in enumerate(plan.steps) if not dry for memory in step.touched}
        player = _Player(self.device, self.nbytes)
        for i in plan.starts:
            stream = self.streams[i]
            stream.true[0] = stream.start
            stream.generator.set_state(stream.start)
        for at, (step, only_draws) in enumerate(plan.steps):
            if step.draw is None:
                player.run(step, only_draws)
            else:
                self._play_draw(step, step.draw, only_draws, player, plan)
            if not only_draws:
                for memory in step.touched:
                    if last[memory] == at:
                        player.hand_over(memory, requests.get(memory, ()))
        for memory in requests.keys() - last.keys():  # never written
            player.hand_over(memory, requests[memory])

    def _play_draw(self, step: _Step, draw: _Draw, only_draws: bool, player: "_Player", plan: "_Plan") -> None:
        stream = self.streams[draw.stream]
        if draw.before is not None:
            stream.generator.set_state(stream.true[draw.before] if isinstance(draw.before, int) else draw.before)
        player.run(step, only_draws)
        if (draw.stream, draw.number) in plan.noted:
            stream.true[draw.number] = stream.generator.get_state()


@dataclass(frozen=True)
class _Plan:
    steps: list[tuple[_Step, bool]]  # with whether it is only for the random numbers
    starts: set[int]  # generators that start as the recording did
    noted: set[tuple[int, int]]  # states, as generator and number of draws, that are needed later


class _Request(NamedTuple):
    view: _View
    callback: Callable[[Tensor], object]
    device: torch.device


class _Player:
    """Runs steps on real memory, which lives from the first step that needs it until it is handed over."""

    def __init__(self, device: torch.device, nbytes: Mapping[int, int]) -> None:
        self._device = device
        self._nbytes = nbytes
        self._real: dict[int, torch.UntypedStorage] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8, device=device)

    def run(self, step: _Step, only_draws: bool) -> None:
        def to_real(leaf: Any) -> Any:
            if isinstance(leaf, _View):
                return leaf.on(self._draw_into(leaf.memory) if only_draws else self._memory(leaf.memory, step))
            return self._device if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf

        with _as_if_alone(step.default_dtype):
            args, kwargs = _map(to_real, (step.args, step.kwargs))
            if isinstance(step.call, torch._ops.OpOverload):
                result = step.call(*args, **kwargs)
            else:  # a function that makes tensors of its own
                with torch._C._EnableTorchFunction(), self._device:
                    result = step.call(*args, **kwargs)
            if step.outputs and not only_draws:
                leaves = _leaves(result)
                for output in step.outputs:
                    self._keep(leaves[output.position], output.view, step)

    def hand_over(self, memory: int, requests: Iterable[_Request]) -> None:
        storage = self._real.pop(memory, None)
        for request in requests:
            with _as_if_alone():
                storage = self._zeros(memory) if storage is None else storage
                value = request.view.on(storage).to(request.device)
            request.callback(value)

    def _memory(self, memory: int, step: _Step) -> torch.UntypedStorage:
        if memory not in self._real:
            overwritten = step.writes.get(memory, False) and memory not in step.reads
            self._real[memory] = self._allocate(memory) if overwritten else self._zeros(memory)
        return self._real[memory]

    def _draw_into(self, memory: int) -> torch.UntypedStorage:
        if self._scratch.numel() < self._nbytes[memory]:  # memory that is used again is much faster than new memory
            self._scratch = torch.empty(0)
            self._scratch = torch.empty(self._nbytes[memory], dtype=torch.uint8, device=self._device)
        return self._scratch.untyped_storage()

    def _keep(self, result: Tensor, view: _View, step: _Step) -> None:
        storage, inputs = result.untyped_storage(), [self._real[m]._cdata for m in step.reads if m in self._real]
        fits = storage.nbytes() >= self._nbytes[view.memory] and storage._cdata not in inputs
        if fits and _View.of(result) == view._replace(memory=storage._cdata):
            self._real[view.memory] = storage
        else:  # the meta device foretold another layout
            self._real[view.memory] = self._zeros(view.memory)
            view.on(self._real[view.memory]).copy_(result)

    def _zeros(self, memory: int) -> torch.UntypedStorage:
        return torch.zeros(self._nbytes[memory], dtype=torch.uint8, device=self._device).untyped_storage()

    def _allocate(self, memory: int) -> torch.UntypedStorage:
        return torch.empty(self._nbytes[memory], dtype=torch.uint8, device=self._device).untyped_storage()


@contextmanager
def _as_if_alone(dtype: torch.dtype | None = None) -> Iterator[None]:
    """Inside, no mode sees what torch runs, and the default dtype is ``dtype``, unless None."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype or before)
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            yield
    finally:
        torch.set_default_dtype(before)


# ---- operators -------------------------------------------------------------------------------------------------------


def _is_meta(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_meta


class _Facts(NamedTuple):
    """What the schema and the tags of an operator say."""

    arguments: tuple[tuple[str, bool, bool], ...]  # name, whether it is written, whether all of it is
    allocates: bool  # and does nothing else
    draws: bool
    only_looks: bool  # changes shape, strides and the like
    needs_values: bool
    makes_new: bool  # in a size that depends on values


@cache
def _facts(func: Any) -> _Facts:
    name = func._schema.name.removeprefix("aten::")
    arguments = []
    for argument in func._schema.arguments:
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        arguments.append((argument.name, is_written, is_written and (argument.is_out or name in _FILLS)))
    makes_new = torch.Tag.dynamic_output_shape in func.tags
    return _Facts(
        arguments=tuple(arguments),
        allocates=name in _ALLOCATIONS,
        draws=torch.Tag.nondeterministic_seeded in func.tags,
        only_looks=torch.Tag.inplace_view in func.tags,
        needs_values=makes_new or torch.Tag.data_dependent_output in func.tags,
        makes_new=makes_new,
    )


def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[list[Tensor], bool, bool]]:
    """Yield the tensors in each argument that was passed, whether they are written, and whether all of them is."""
    for number, (name, is_written, fills) in enumerate(_facts(func).arguments):
        value = args[number] if number < len(args) else kwargs.get(name)
        if isinstance(value, Tensor | list | tuple):
            yield _tensors(value), is_written, fills


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [t for tensors, is_written, _ in _arguments(func, args, kwargs) if is_written for t in tensors]


def _needs_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the operator, called with meta tensors, has something to do outside of the meta device."""
    if func is torch.ops.aten._to_copy.default:
        return args[0].is_meta and kwargs.get("device", _META) not in (_META, None)
    return _facts(func).needs_values or any(not tensor.is_meta for tensor in _written(func, args, kwargs))


def _generator_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Generator | None:
    return next((leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, torch.Generator)), None)


# ---- modes -----------------------------------------------------------------------------------------------------------

_RECORDINGS: list[_Recording] = []  # in the order in which they were made
_MADE: "WeakKeyDictionary[nn.Module, dict[str, Tensor]]" = WeakKeyDictionary()  # as at the exit of the recording
_HERE = threading.local()


@contextmanager
def _recording(device: torch.device) -> Iterator[None]:
    if getattr(_HERE, "recording", None) is not None:
        with _META:
            yield
        return
    forget_what_is_gone()
    recording, modules = _open_recording(device), WeakSet[nn.Module]()
    recording.running = True
    _HERE.recording = recording
    try:
        with _noticing(modules), _Operators(recording), _META, _Functions(recording):
            yield
    finally:
        _HERE.recording = None
        recording.running = False
        recording.finish()
        for module in modules:
            named = {**module._parameters, **module._buffers}
            made = {
                name: tensor.detach()
                for name, tensor in named.items()
                if tensor is not None and recording.knows(tensor)
            }
            _MADE.setdefault(module, {}).update(made)


def _open_recording(device: torch.device) -> _Recording:
    """Return the recording to go on with: while none of it was played back it is as if there had been no exit."""
    for recording in reversed(_RECORDINGS):
        if recording.device == device and not recording.agreed and not recording.running:
            return recording
    _RECORDINGS.append(_Recording(device))
    return _RECORDINGS[-1]


@contextmanager
def _noticing(modules: "WeakSet[nn.Module]") -> Iterator[None]:
    """Inside, every module that gets a parameter or buffer is added to ``modules``."""
    here = threading.get_ident()

    def notice(module: nn.Module, name: str, tensor: Any) -> None:
        if threading.get_ident() == here:
            modules.add(module)

    handles = register_module_parameter_registration_hook(notice), register_module_buffer_registration_hook(notice)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Operators(TorchDispatchMode):
    """Shows the recording every operator that is run."""

    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():
            return self._recording.call(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Sees to the functions that lose data on the meta device without an operator having been run."""

    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self._recording = recording
        self._special: dict[Any, Callable[..., Any]] = {
            torch.tensor: self._make,
            torch.as_tensor: self._make,
            torch.asarray: self._make,
            Tensor.new_tensor: self._make_like,
            Tensor.numpy: self._to_numpy,
            Tensor.is_meta.__get__: self._ask_is_meta,  # type: ignore[attr-defined]
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        special = self._special.get(func)
        if special is None:
            return func(*args, **(kwargs or {}))
        return special(func, *args, **(kwargs or {}))

    def _make(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        data = args[0] if args else next(iter(kwargs.values()))
        if kwargs.get("device") is not None or (func is not torch.tensor and _is_meta(data)):
            return func(*args, **kwargs)
        requires_grad = kwargs.pop("requires_grad", False)
        real = func(*args, **{**kwargs, "device": "cpu"})
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            meta = self._recording.constant(real if func is torch.tensor else real.clone())
        return meta.requires_grad_(requires_grad)

    def _make_like(self, func: Callable[..., Any], like: Tensor, data: Any, **kwargs: Any) -> Any:
        if not like.is_meta or kwargs.get("device") is not None:
            return func(like, data, **kwargs)
        return self._make(torch.tensor, data, **{**kwargs, "dtype": kwargs.get("dtype") or like.dtype})

    def _to_numpy(self, func: Callable[..., Any], tensor: Tensor, **kwargs: Any) -> Any:
        return func(tensor.cpu(), **kwargs)

    def _ask_is_meta(self, func: Callable[..., Any], tensor: Tensor) -> bool:
        """Some functions of ``torch.nn.init`` ask, and leave a meta tensor alone: the call itself is recorded then."""
        is_meta, caller = func(tensor), sys._getframe(2)
        if is_meta and caller.f_globals.get("__name__") == "torch.nn.init":
            code = caller.f_code
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            arguments = {name: caller.f_locals[name] for name in names}
            if arguments.pop("tensor", None) is tensor:
                with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
                    self._recording.note_init(getattr(nn.init, code.co_name), tensor, arguments)
        return is_meta


# ---- end -------------------------------------------------------------------------------------------------------------


def forget_what_is_gone() -> None:
    """Let go of recordings, and of their steps, that are for tensors none of which is left.

    A recording that was never played back stays, with its draws of random numbers: the next one goes on from it.
    """
    _RECORDINGS[:] = [recording for recording in _RECORDINGS if recording.left() or not recording.agreed]
    for recording in _RECORDINGS:
        if not recording.running:
            recording.compact()


def _forget_made(memories: Iterable[int]) -> None:
    for module, made in list(_MADE.items()):
        left = {name: tensor for name, tensor in made.items() if _memory(tensor) not in memories}
        if left:
            _MADE[module] = left
        else:
            del _MADE[module]
