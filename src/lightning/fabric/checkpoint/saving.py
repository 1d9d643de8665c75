"""One save by several ranks: each writes its part, rank 0 commits, and all learn how it went.

Nothing here knows a strategy: what is written is a :class:`Prepared` checkpoint, and how ranks talk is behind
:class:`Peers`: by collectives where training waits for the save, by the store of the process group in the background.
"""

import os
import pickle
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lightning.fabric.checkpoint.manifest import FileRecord, Manifest, files_of, record_of, takes_manifest
from lightning.fabric.checkpoint.transaction import Transaction
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol, _local_path
from lightning.fabric.utilities.ranks import Ranks, all_or_none
from lightning.fabric.utilities.types import _PATH

if TYPE_CHECKING:
    from torch import Tensor

# -- what is saved, and by whom


class Peers(Ranks, Protocol):
    """The ranks that save together."""

    def leave(self) -> None:
        """Called last, however it went; not to be waited for."""


class OneRank:
    """:class:`Peers` of one rank."""

    rank = 0
    size = 1

    def gather(self, obj: Any) -> list[Any]:
        return [obj]

    def share(self, obj: Any) -> Any:
        return obj

    def raise_on_all(self, error: BaseException | None, doing: str) -> None:
        if error is not None:
            raise error

    def leave(self) -> None:
        return None


@dataclass(frozen=True)
class Written:
    """What a rank has written.

    Attributes:
        files: by their paths inside of the checkpoint.
        result: a word for rank 0.
        in_archives: the files are zip archives, with true checksums of what is in them.

    """

    files: Sequence[str] = ()
    result: Any = None
    in_archives: bool = False


def _nothing(staged: Path) -> Written:
    return Written()


def _no_end(staged: Path, results: list[Any]) -> None:
    return None


def _no_check(path: _PATH) -> None:
    return None


def _none_foreign(folder: Path) -> list[Path]:
    return []


def _nothing_more() -> None:
    return None


@dataclass(frozen=True)
class Prepared:
    """A checkpoint that is ready to be written: a file, or a folder to which every rank adds its part.

    Attributes:
        write: writes this rank's part to the path, which is the file itself or a folder that is there. Needs no other
            rank where there is ``detach``.
        finish: on rank 0, when all ranks have written: adds what depends on their results.
        detach: lets what is written be what the values are now, though they change; it is given what copies a tensor
            to the CPU. None: this can only be saved while training waits.
        in_place: somebody else's code writes to the true path; what it makes is neither staged nor described.
        check: on every rank, before anything is written: raises if this cannot be saved to the path.
        foreign: what in a folder that is replaced belongs to somebody else, and stays.

    """

    write: Callable[[Path], Written] = _nothing
    finish: Callable[[Path, list[Any]], None] = _no_end
    is_folder: bool = False
    detach: "Callable[[Callable[[Tensor], Tensor]], None] | None" = None
    in_place: bool = False
    check: Callable[[_PATH], None] = _no_check
    foreign: Callable[[Path], list[Path]] = _none_foreign


@dataclass(frozen=True)
class SaveOptions:
    """What the manifest says besides files, and how to save.

    Attributes:
        step: of the training, as the manifest shows it.
        metrics: as the manifest shows them.
        digests: record a checksum of each file.
        durable: what is saved is on the disk when it is committed.
        blocking: return when it is; else as soon as the values may change.
        needs_manifest: refuse a file that can hold none.
        committed: called on rank 0 right after the commit.

    """

    step: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    digests: bool = True
    durable: bool = True
    blocking: bool = True
    needs_manifest: bool = False
    committed: Callable[[], None] = _nothing_more


# -- saving


class _Place(Protocol):
    """Where a checkpoint is made, and how it comes to its path; every rank has such an object."""

    staged: Path

    def begin(self, is_folder: bool) -> None:
        """On rank 0, then on all others: make room for what is written."""

    def deliver(self, names: Sequence[str], durable: bool) -> None:
        """On every rank, when it has written: bring these files to where rank 0 can commit them."""

    def commit(self, manifest: Manifest, durable: bool, foreign: Callable[[Path], list[Path]]) -> None:
        """On rank 0: make it, with its manifest, the checkpoint at the path."""

    def abort(self) -> None:
        """On every rank: remove what was made; the path is as it was."""


def save(prepared: Prepared, target: _PATH, options: SaveOptions, peers: Peers, strategy: str = "") -> None:
    """Write ``prepared``, and put it at ``target`` as a whole; every rank returns when it is there.

    Raises:
        RuntimeError: on the ranks that did not fail, if one did; that one raises its own error. ``target`` is then as
            it was before.

    """
    doing = f"saving {os.fspath(target)!r}"
    if prepared.in_place or _is_special(target):
        agreed(peers, doing, lambda: _write_in_place(prepared, target))
        agreed(peers, doing, options.committed, on_rank_0=True)
        return
    place = _place_for(target, peers)
    try:
        agreed(peers, doing, lambda: prepared.check(target))
        agreed(peers, doing, lambda: _begin(prepared, place, target), on_rank_0=True)
        agreed(peers, doing, lambda: _begin(prepared, place, target) if peers.rank else None)
        own = agreed(peers, doing, lambda: _write(prepared, place, options, target))
        parts = peers.gather(own) or []
        agreed(
            peers, doing, lambda: _commit(prepared, place, parts, options, peers.size, strategy, target), on_rank_0=True
        )
        agreed(peers, doing, options.committed, on_rank_0=True)
    except BaseException:
        with suppress(OSError):  # the first error is the one to see; a later save removes what is left
            place.abort()
        raise


def agreed(peers: Peers, doing: str, act: Callable[[], Any], on_rank_0: bool = False) -> Any:
    """Collective: return what ``act`` does, in which ranks do not talk; if it raises on one rank, all raise."""
    result = None
    with all_or_none(peers, doing):
        if not on_rank_0 or peers.rank == 0:
            result = act()
    return result


def _is_special(target: _PATH) -> bool:
    """Whether it is a device or a pipe, which must not be replaced by a file."""
    if not _is_local_file_protocol(target):
        return False
    path = _local_path(target)
    return path.exists() and not path.is_file() and not path.is_dir()


def _write_in_place(prepared: Prepared, target: _PATH) -> None:
    prepared.check(target)
    prepared.write(target)  # type: ignore[arg-type]  # as the user gave it


def _place_for(target: _PATH, peers: Peers) -> _Place:
    """Collective."""
    name = peers.share(uuid.uuid4().hex[:8])
    if _is_local_file_protocol(target):
        return Transaction(_local_path(target), name, leads=peers.rank == 0)
    from lightning.fabric.checkpoint.remote import RemoteTransaction

    return RemoteTransaction(str(target), name, leads=peers.rank == 0)


def _begin(prepared: Prepared, place: _Place, target: _PATH) -> None:
    with _saying_where(target):
        place.begin(prepared.is_folder)


_Part = tuple[Any, dict[str, FileRecord]]


def _write(prepared: Prepared, place: _Place, options: SaveOptions, target: _PATH) -> _Part:
    with _saying_where(target, place.staged):
        written = prepared.write(place.staged)
        with _meanwhile(lambda: place.deliver(written.files, options.durable)):
            records = {
                name: record_of(place.staged, name, options.digests, written.in_archives) for name in written.files
            }
    return written.result, records


@contextmanager
def _meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Call ``act`` while the block runs: disks and networks wait for other things than checksums do."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            act()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if errors:
        raise errors[0]


def _commit(
    prepared: Prepared,
    place: _Place,
    parts: list[_Part],
    options: SaveOptions,
    world_size: int,
    strategy: str,
    target: _PATH,
) -> None:
    staged = place.staged
    with _saying_where(target, staged):
        prepared.finish(staged, [result for result, _ in parts])
        if options.needs_manifest and not takes_manifest(staged):
            raise ValueError(
                f"Cannot save {os.fspath(target)!r}: a checkpoint among others has to have a manifest. A zip archive, "
                "as `torch.save` makes it, can hold one, but not what the `CheckpointIO` has written. Leave the "
                "plug-in out, or use `fabric.save`."
            )
        records = {name: record for _, each in parts for name, record in each.items()}
        # also what rank 0 has just added
        added = {name: record_of(staged, name, options.digests) for name in files_of(staged) if name not in records}
        manifest = Manifest(
            dict(sorted({**records, **added}.items())),
            step=options.step,
            world_size=world_size,
            strategy=strategy,
            metrics=options.metrics,
            versions=_versions(),
            time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        place.commit(manifest, options.durable, prepared.foreign)


@contextmanager
def _saying_where(target: _PATH, staged: Path | None = None) -> Iterator[None]:
    """Errors of the disk inside name ``target``."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"Cannot save {os.fspath(target)!r}: {error.strerror or error}") from error
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise type(error)(f"Cannot save {os.fspath(target)!r}: {error}") from error
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        # how torch's writer reports a full disk or a missing permission: in terms of its own
        reason = None if staged is None else _refusal_to_write(staged)
        if reason is None:
            raise RuntimeError(f"Cannot save {os.fspath(target)!r}: {error}") from error
        raise OSError(reason.errno, f"Cannot save {os.fspath(target)!r}: {reason.strerror}") from error


def _refusal_to_write(staged: Path) -> OSError | None:
    """Why nothing more can be written to what is given up anyway, if that is so."""
    try:
        with (staged / "more" if staged.is_dir() else staged).open("ab", buffering=0) as file:
            for _ in range(256):
                file.write(bytes(4096))
    except OSError as error:
        return error
    return None


@cache
def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "lightning-fabric"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from its sources
            continue
    return found
