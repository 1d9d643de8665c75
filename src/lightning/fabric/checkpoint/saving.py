"""One save by several ranks: each writes its part, rank 0 commits, and all learn how it went.

Nothing here knows a strategy: what is written is a :class:`Prepared` checkpoint, and how ranks talk is behind
:class:`Peers`: by collectives where training waits for the save, by the store of the process group in the background.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from lightning.fabric.checkpoint.manifest import FileRecord, Manifest, files_of, record_of
from lightning.fabric.checkpoint.transaction import Transaction


class Peers(Protocol):
    """The ranks that save together; every method is called by all of them, in the same order."""

    rank: int
    size: int

    def gather(self, obj: Any) -> list[Any] | None:
        """Return every rank's ``obj`` on rank 0, None elsewhere."""

    def share(self, obj: Any) -> Any:
        """Return rank 0's ``obj``."""

    def raise_on_all(self, error: Exception | None, doing: str) -> None:
        """If any rank has an ``error``, raise on all."""


@dataclass(frozen=True)
class Written:
    """What a rank has written: the ``files``, by their paths inside of the checkpoint, and a word for rank 0."""

    files: Sequence[str] = ()
    result: Any = None


def _nothing(staged: Path) -> Written:
    return Written()


def _no_end(staged: Path, results: list[Any]) -> None:
    return None


@dataclass(frozen=True)
class Prepared:
    """A checkpoint that is ready to be written: a file, or a folder to which every rank adds its part."""

    write: Callable[[Path], Written] = _nothing
    """Writes this rank's part to the path, which is the file itself or a folder that is there. Needs no other rank."""
    finish: Callable[[Path, list[Any]], None] = _no_end
    """On rank 0, when all ranks have written: adds what depends on their results."""
    is_folder: bool = False


@dataclass(frozen=True)
class Facts:
    """What the manifest says besides files, and how carefully to save."""

    strategy: str = ""
    step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    checksums: bool = True
    durable: bool = True


def save(prepared: Prepared, target: Path, facts: Facts, peers: Peers) -> None:
    """Write ``prepared``, and put it at ``target`` as a whole; every rank returns when it is there.

    Raises:
        RuntimeError: on the ranks that did not fail, if one did; that one raises its own error. ``target`` is then as
            it was before.

    """
    doing = f"saving {os.fspath(target)!r}"
    transaction = Transaction(target, peers.share(Transaction(target).staged if peers.rank == 0 else None))
    try:
        _on_rank_0(peers, doing, lambda: _begin(transaction, prepared))
        written = _write(prepared, transaction.staged, facts, peers, doing)
        _on_rank_0(peers, doing, lambda: _commit(prepared, transaction, written or [], facts, peers.size))
    except BaseException:
        if peers.rank == 0:
            transaction.abort()
        raise


def _on_rank_0(peers: Peers, doing: str, act: Callable[[], None]) -> None:
    error: Exception | None = None
    if peers.rank == 0:
        try:
            act()
        except Exception as raised:
            error = raised
    peers.raise_on_all(error, doing)


def _begin(transaction: Transaction, prepared: Prepared) -> None:
    parent = transaction.target.parent
    parent.mkdir(parents=True, exist_ok=True)
    if prepared.is_folder:
        transaction.staged.mkdir()


_Part = tuple[Any, dict[str, FileRecord]]


def _write(prepared: Prepared, staged: Path, facts: Facts, peers: Peers, doing: str) -> list[_Part] | None:
    error: Exception | None = None
    part: _Part = (None, {})
    try:
        written = prepared.write(staged)
        part = written.result, {name: record_of(staged, name, facts.checksums) for name in written.files}
    except Exception as raised:
        error = raised
    peers.raise_on_all(error, doing)
    return peers.gather(part)


def _commit(prepared: Prepared, transaction: Transaction, parts: list[_Part], facts: Facts, world_size: int) -> None:
    staged = transaction.staged
    prepared.finish(staged, [result for result, _ in parts])
    known = {name: record for _, records in parts for name, record in records.items()}
    # also what rank 0 has just added
    files = {name: known.get(name) or record_of(staged, name, facts.checksums) for name in files_of(staged)}
    manifest = Manifest(
        files,
        step=facts.step,
        world_size=world_size,
        strategy=facts.strategy,
        metrics=facts.metrics,
        versions=_versions(),
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    transaction.commit(manifest, durable=facts.durable)


@cache
def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "lightning-fabric"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from its sources
            continue
    return found


class OneRank:
    """:class:`Peers` of one rank."""

    rank = 0
    size = 1

    def gather(self, obj: Any) -> list[Any]:
        return [obj]

    def share(self, obj: Any) -> Any:
        return obj

    def raise_on_all(self, error: Exception | None, doing: str) -> None:
        if error is not None:
            raise error
