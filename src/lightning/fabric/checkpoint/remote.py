"""Checkpoints behind a URL, on any file system that fsspec knows.

There is no rename on object stores, so the content comes first and the manifest last. A folder has its content in
``save-<name>/``, which every save makes anew, and ``manifest.json``, which names the files of one of them; putting that
file is the commit, and what only the manifest before it named is deleted afterwards. A checkpoint in one file has its
manifest in it. Whoever follows the manifest sees a whole checkpoint, the old one or the new one, at any time.

One save to a path, and one process that deletes from a folder of checkpoints, at a time.
"""

import os
import re
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from lightning.fabric.checkpoint.directory import LATEST, Best, CheckpointDirectory, Entry, newest_first
from lightning.fabric.checkpoint.manifest import (
    MANIFEST,
    REMOTE_CONTENT,
    DamagedCheckpointError,
    FileRecord,
    Manifest,
    NewerCheckpointError,
    attach,
    no_manifest,
    read_manifest,
    verify,
)
from lightning.fabric.checkpoint.saving import OneRank, Peers, agreed
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.remote_files import (
    Remote,
    delete,
    delete_folder,
    delete_if_empty,
    download,
    files_in,
    for_each,
    is_inside,
    kind_of,
    names_in,
    pause,
    puts_at_once,
    read_bytes,
    replace_file,
    retried,
    size_of,
    temporary_name,
    upload,
)

_STEP = re.compile(r"step-(\d{8,})")
_TAIL = 0xFFFF + 22  # bytes: what a manifest in a file, and the end of the archive before it, take at most
_LOOKS = 3  # at a place where nothing is, or where a file was replaced while it was read

# -- saving


class RemoteTransaction:
    """One save to the URL ``target``; what :class:`~lightning.fabric.checkpoint.transaction.Transaction` is on a disk.

    Ranks that write together make one each, of the same ``name`` (eight hexadecimal digits or more). Each stages what
    it writes on its own machine, where ``TMPDIR`` says.

    Args:
        leads: this is the rank that commits, and that deletes what was uploaded when the save is aborted.

    """

    def __init__(self, target: str, name: str | None = None, leads: bool = False) -> None:
        self.target = Remote.of(target)
        self._name = name or uuid.uuid4().hex[:8]
        if not REMOTE_CONTENT.fullmatch(self._content):
            raise ValueError(f"`name` of a save must be 8 to 32 hexadecimal digits, but got {name!r}.")
        self._leads = leads
        self._is_folder = False
        self._delivered: set[str] = set()
        self._may_be_committed = False
        self._local = _new_local("save")
        self.staged = self._local / (self.target.name or "checkpoint")
        # of a save that ends without a word, too; not by a fork of this process
        self._remove_local = weakref.finalize(self, _remove_of_process, os.getpid(), self._local)

    @property
    def _content(self) -> str:
        return f"save-{self._name}"

    def begin(self, is_folder: bool) -> None:
        """On every rank: make room for what is written to :attr:`staged`.

        Raises:
            IsADirectoryError: if a file is to take the place of a folder.
            FileExistsError: if a folder is to take the place of a file.

        """
        if self._leads:
            _refuse_other_kind(self.target, is_folder)
        self._local.mkdir(mode=0o700)
        self._is_folder = is_folder
        if is_folder:
            self.staged.mkdir()

    def deliver(self, names: Sequence[str], durable: bool = True) -> None:
        """On every rank, when it has written these files: upload them. One file alone waits for its manifest."""
        if not self._is_folder:
            return
        content = self.target / self._content
        for_each(lambda name: upload(self.staged / name, content / name), names)
        self._delivered.update(names)

    def commit(
        self,
        manifest: Manifest,
        durable: bool = True,
        foreign: Callable[[Path], list[Path]] = lambda folder: [],
    ) -> None:
        """On one rank, when all have delivered: upload what is new here, and let ``manifest`` name it.

        Files of a folder that no manifest names belong to somebody else and stay, whatever ``foreign`` says.
        """
        if self._is_folder:
            self._commit_folder(manifest)
        else:
            attach(self.staged, manifest)
            self._may_be_committed = True
            replace_file(self.staged, self.target, self._name)
            if not puts_at_once(self.target):
                _at_best(self._delete_old_temporaries, f"delete what earlier saves to {self.target.url!r} left")
        self._remove_local()

    def _commit_folder(self, manifest: Manifest) -> None:
        own = [name for name in manifest.files if (self.staged / name).is_file()]
        self.deliver([name for name in own if name not in self._delivered])
        former = _former(self.target)
        published = replace(manifest, files={f"{self._content}/{name}": each for name, each in manifest.files.items()})
        local = self._local / MANIFEST
        local.write_bytes(published.to_bytes())
        self._may_be_committed = True  # also if this fails: the network may have done it and not have said so
        replace_file(local, self.target / MANIFEST, self._name)
        _at_best(lambda: self._delete_old_content(former), f"delete what earlier saves to {self.target.url!r} left")

    def _delete_old_content(self, former: Manifest | None) -> None:
        for name in names_in(self.target):
            if REMOTE_CONTENT.fullmatch(name) and name != self._content:
                delete_folder(self.target / name)
            elif name.startswith(f".{MANIFEST}.") and name.endswith(".staged"):
                delete(self.target / name)
        # of one that was copied there from a disk: its files are beside its manifest
        names = {str(PurePosixPath(name)) for name in (former.files if former is not None else ())} - {MANIFEST}
        for_each(delete, [self.target / name for name in names if not REMOTE_CONTENT.fullmatch(name.split("/")[0])])

    def _delete_old_temporaries(self) -> None:
        start, end = temporary_name(self.target.name, "|").split("|")
        for name in names_in(self.target.parent):
            if name.startswith(start) and name.endswith(end):
                delete(self.target.beside(name))

    def abort(self) -> None:
        """On every rank: remove what was staged, and what was uploaded unless a manifest may name it."""
        self._remove_local()
        if self._leads and self._is_folder and not self._may_be_committed:
            _at_best(self._delete_uploaded, f"delete what was saved of {self.target.url!r}")

    def _delete_uploaded(self) -> None:
        delete_folder(self.target / self._content)
        delete_if_empty(self.target)


def _refuse_other_kind(target: Remote, is_folder: bool) -> None:
    kind = kind_of(target)
    if kind == "file" and is_folder:
        raise FileExistsError(
            f"Cannot save a folder as {target.url!r}: there is a file of that name, and none of both could take the "
            "place of the other in one step. Save to another path, or delete the file first."
        )
    if kind == "directory" and not is_folder:
        raise IsADirectoryError(
            f"Cannot save a file as {target.url!r}: there is a folder of that name, and none of both could take the "
            "place of the other in one step. Save to another path, or delete the folder first."
        )


def _former(target: Remote) -> Manifest | None:
    """The manifest of the checkpoint that is replaced; None if there is none, or it does not say what it should."""
    try:
        return _manifest_of_folder(target)
    except DamagedCheckpointError:
        return None


def _at_best(act: Callable[[], None], doing: str) -> None:
    """What a checkpoint does not depend on: a warning if it fails."""
    try:
        act()
    except Exception as error:
        rank_zero_warn(f"Could not {doing}: {error}. The next save to that path will.")


def _new_local(purpose: str) -> Path:
    """A path on this machine that is nobody else's."""
    return Path(tempfile.gettempdir(), f"fabric-{purpose}-{uuid.uuid4().hex}")


def _remove_of_process(process: int, path: Path) -> None:
    if os.getpid() == process:
        shutil.rmtree(path, ignore_errors=True)


# -- manifests


def read_remote_manifest(url: str) -> Manifest | None:
    """Return the manifest of the checkpoint at ``url``, of which little is read; None if it has none.

    Raises:
        FileNotFoundError: if there is nothing.
        DamagedCheckpointError: if the manifest itself is damaged.

    """
    place = Remote.of(url)
    kind = kind_of(place)
    if kind is None:
        raise FileNotFoundError(f"There is no checkpoint at {url!r}.")
    return _manifest_of_file(place) if kind == "file" else _manifest_of_folder(place)


def _manifest_of_folder(place: Remote) -> Manifest | None:
    def read() -> Manifest | None:
        data = read_bytes(place / MANIFEST)
        try:
            return None if data is None else Manifest.from_bytes(data)
        except (ValueError, KeyError, TypeError) as error:
            raise no_manifest(place.url, MANIFEST, str(error), error) from error

    return _reading(read, place.url)


def _manifest_of_file(place: Remote) -> Manifest | None:
    def read() -> Manifest | None:
        size = size_of(place) or 0
        start = max(0, size - _TAIL)
        tail = read_bytes(place, start)
        with tempfile.TemporaryDirectory(prefix="fabric-") as folder:
            file = Path(folder, place.name)
            with file.open("wb") as opened:  # of the same size, but with a hole: nothing else is looked at
                opened.seek(start)
                opened.write(tail or b"")
            return read_manifest(file)

    return _reading(read, place.url)


def _reading(read: Callable[[], Any], url: str) -> Any:
    """What ``read`` returns; damage, if it is found again and again, as of ``url``."""
    try:
        return retried(read, f"read {url!r}", lasting=(PermissionError,))
    except OSError as error:
        if isinstance(damage := error.__cause__, DamagedCheckpointError):
            raise type(damage)(url, damage.file, damage.what) from error
        raise


# -- loading


@contextmanager
def fetched(url: str, digests: bool = True, peers: Peers | None = None) -> Iterator[Path]:
    """Collective: a context with a copy of the checkpoint at ``url`` on this machine, which is as it was saved.

    It is downloaded once per machine, to where ``TMPDIR`` says, and compared with its manifest as it arrives: sizes,
    and with ``digests`` checksums. A folder is laid out as on a disk. What has no manifest, as checkpoints of other
    programs, is taken as it is. Of a folder of checkpoints it is the newest good one; a warning names those that are
    newer, and what is wrong with them.

    The copy is deleted when the context ends. Tensors that are mapped from it stay what they are on systems where a
    deleted file lives on while it is open (Linux, macOS); the disk has its room back when the last of them is gone.

    Raises:
        FileNotFoundError: on the rank that looked, if there is nothing.
        DamagedCheckpointError: on all ranks; it names the file.
        RuntimeError: on the other ranks, if one cannot read.

    """
    peers = OneRank() if peers is None else peers
    local = _new_local("load")
    try:
        yield _first_good(url, local, peers, digests)
    finally:
        shutil.rmtree(local, ignore_errors=True)


def _first_good(url: str, local: Path, peers: Peers, digests: bool) -> Path:
    """Collective."""
    leader = _leader(local, peers, url)
    candidates: list[str] = peers.share(agreed(peers, f"reading {url!r}", lambda: _candidates(url), on_rank_0=True))
    damages: list[DamagedCheckpointError] = []
    for candidate in candidates:
        found = _fetch_together(candidate, local, leader, peers, digests, needs_manifest=candidate != url)
        if isinstance(found, Path):
            for damage in damages:
                rank_zero_warn(f"{damage} It is passed over, and {candidate!r} is loaded.")
            return found
        if isinstance(found, NewerCheckpointError):
            raise found
        damages.append(found)
    first = damages[0]
    if candidates == [url]:
        raise first
    raise DamagedCheckpointError(url, first.file, f"{first.what}; and none of its {len(damages)} checkpoints is good")


def _candidates(url: str) -> list[str]:
    """The URLs to read one of: of one checkpoint, or of all in a folder of them, the newest first."""
    place = Remote.of(url)
    for number in range(_LOOKS):  # what was just written may not be seen yet
        kind = kind_of(place)
        if kind == "file" or read_bytes(place / MANIFEST) is not None:
            return [url]
        if kind is not None:
            entries = RemoteDirectory(url).entries()
            if entries:
                return [str(entry.path) for entry in entries]
            if _foreign_files(place):
                return [url]
        if number < _LOOKS - 1:
            pause(number)
    what = ", only what a save to it left that was interrupted" if kind is not None else ""
    raise FileNotFoundError(f"There is no checkpoint at {url!r}{what}.")


def _foreign_files(place: Remote) -> dict[str, int]:
    return {name: size for name, size in files_in(place).items() if not REMOTE_CONTENT.fullmatch(name.split("/")[0])}


# -- loading, on several ranks


def _leader(local: Path, peers: Peers, url: str) -> int:
    """Collective: make the folder, and return the first of the ranks that see it."""

    def make() -> tuple[Any, ...]:
        local.mkdir(mode=0o700)
        status = local.parent.stat()
        return _machine(), status.st_dev, status.st_ino

    disks = peers.share(peers.gather(agreed(peers, f"reading {url!r}", make)))
    return int(disks.index(disks[peers.rank]))


def _machine() -> str:
    """A text that no other running machine has."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text() if boot.exists() else f"{uuid.getnode():x}"


def _fetch_together(
    url: str, local: Path, leader: int, peers: Peers, digests: bool, needs_manifest: bool
) -> Path | DamagedCheckpointError:
    """Collective: the first rank of each machine fetches, the others link to its files; damage is the same on all."""
    path: Path | None = None
    error: Exception | None = None
    if leader == peers.rank:
        try:
            path = _fetch(Remote.of(url), local, digests, needs_manifest)
        except Exception as raised:
            error = raised
    damage = error if isinstance(error, DamagedCheckpointError) else None
    peers.raise_on_all(None if damage is not None else error, f"reading {url!r}")
    results: list[tuple[Path | None, DamagedCheckpointError | None]] = peers.share(peers.gather((path, damage)))
    found = next((damage for _, damage in results if damage is not None), None)
    if found is not None:
        return found
    fetched_path, _ = results[leader]
    assert fetched_path is not None
    if leader == peers.rank:
        agreed(peers, f"reading {url!r}", lambda: None)
        return fetched_path
    own = local / fetched_path.name
    agreed(peers, f"reading {url!r}", lambda: _link(fetched_path, own))  # so that each rank deletes what is its own
    return own


def _link(source: Path, target: Path) -> None:
    if not source.is_dir():
        _link_file(source, target)
        return
    for folder, _, names in os.walk(source):
        into = target / Path(folder).relative_to(source)
        into.mkdir(parents=True, exist_ok=True)
        for name in names:
            _link_file(Path(folder, name), into / name)


def _link_file(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without
        shutil.copyfile(source, target)


# -- loading, on one rank


def _fetch(place: Remote, local: Path, digests: bool, needs_manifest: bool) -> Path:
    path = local / (place.name.partition("?")[0] or "checkpoint")
    if kind_of(place) == "file":
        _reading(lambda: _fetch_file(place, path, digests, needs_manifest), place.url)
    elif (manifest := _manifest_of_folder(place)) is not None:
        _fetch_saved(place, manifest, path, digests)
    elif needs_manifest:
        raise DamagedCheckpointError(place.url, MANIFEST, "is missing")
    else:
        _fetch_foreign(place, path)
    return path


def _fetch_saved(place: Remote, manifest: Manifest, path: Path, digests: bool) -> None:
    """Of a folder; one that is replaced while it is read is read again."""
    for number in range(_LOOKS):
        try:
            _fetch_files(place, manifest, path, digests)
            return
        except DamagedCheckpointError:
            newer = _manifest_of_folder(place)
            if newer is None or newer == manifest or number == _LOOKS - 1:
                raise
            manifest = newer
            shutil.rmtree(path, ignore_errors=True)


def _fetch_files(place: Remote, manifest: Manifest, path: Path, digests: bool) -> None:
    inner = {name: _inner(name) for name in manifest.files}
    path.mkdir()
    for_each(lambda name: _fetch_one(place, name, manifest.files[name], path, inner[name], digests), inner)
    files = {inner[name]: record for name, record in manifest.files.items()}
    attach(path, replace(manifest, files=files))


def _inner(name: str) -> str:
    """Where a file of a folder is on a disk: not in ``save-<name>/``."""
    parts = PurePosixPath(name).parts
    return str(PurePosixPath(*(parts[1:] if len(parts) > 1 and REMOTE_CONTENT.fullmatch(parts[0]) else parts)))


def _fetch_one(place: Remote, name: str, record: FileRecord, path: Path, inner: str, digests: bool) -> None:
    def fetch() -> None:
        try:
            download(place / name, path / inner)
        except FileNotFoundError as error:
            raise DamagedCheckpointError(place.url, name, "is missing") from error
        try:
            verify(path, Manifest({inner: record}), digests)
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(place.url, name, error.what) from error

    _reading(fetch, place.url)


def _fetch_file(place: Remote, path: Path, digests: bool, needs_manifest: bool) -> None:
    download(place, path)
    if (size := size_of(place)) != path.stat().st_size:
        raise DamagedCheckpointError(place.url, "", f"has {size} bytes, of which {path.stat().st_size} arrive")
    if (manifest := read_manifest(path)) is not None:
        verify(path, manifest, digests)
    elif needs_manifest:
        raise DamagedCheckpointError(place.url, "", "has no manifest")


def _fetch_foreign(place: Remote, path: Path) -> None:
    def fetch(name: str, size: int) -> None:
        download(place / name, path / name)
        if (found := (path / name).stat().st_size) != size:
            raise DamagedCheckpointError(place.url, name, f"has {size} bytes, of which {found} arrive")

    files = _foreign_files(place)
    outside = next((name for name in files if not is_inside(name)), None)
    if outside is not None:
        raise ValueError(f"{place.url!r} has the file {outside!r}, which would not be inside of the copy.")
    for_each(lambda name: _reading(partial(fetch, name, files[name]), place.url), files)


# -- many of them


class RemoteDirectory:
    """``url/step-00000012``, each a checkpoint in a file or a folder, and ``latest``, which names one.

    What :class:`~lightning.fabric.checkpoint.directory.CheckpointDirectory` is on a disk.
    """

    def __init__(self, url: str, keep_last: int | None = None, keep_best: Best | None = None) -> None:
        self.folder = url.rstrip("/")
        self._rules = CheckpointDirectory(Path(), keep_last, keep_best)
        self._place = Remote.of(url)

    def path_of(self, step: int) -> str:
        """Where the checkpoint of ``step`` goes."""
        return f"{self.folder}/step-{step:08d}"

    def entries(self) -> list[Entry]:
        """Return what was committed, the newest first (:func:`newest_first`). A folder without a manifest was not."""
        found: list[Entry] = []
        for_each(lambda name: self._add_entry(name, found), names_in(self._place))
        return newest_first(found, self.latest()) if found else []

    def _add_entry(self, name: str, found: list[Entry]) -> None:
        if (match := _STEP.fullmatch(name)) is None:
            return
        url = f"{self.folder}/{name}"
        step: Any = {"path": url, "step": int(match[1])}
        try:
            manifest = read_remote_manifest(url)
            if manifest is not None or kind_of(self._place / name) == "file":
                found.append(Entry(manifest=manifest, **step))
        except DamagedCheckpointError as error:
            found.append(Entry(manifest=None, error=error, **step))
        except FileNotFoundError:  # deleted meanwhile
            return

    def latest(self) -> str | None:
        """What ``latest`` names; None if there is no such file, or no such checkpoint any more."""
        name = (read_bytes(self._place / LATEST) or b"").decode(errors="replace").strip()
        if not _STEP.fullmatch(name) or kind_of(self._place / name) is None:
            return None
        return f"{self.folder}/{name}"

    def set_latest(self, path: str, durable: bool = True) -> None:
        """Let ``latest`` name a committed checkpoint, in one step."""
        name = path.rstrip("/").rpartition("/")[2]
        with tempfile.TemporaryDirectory(prefix="fabric-") as folder:
            local = Path(folder, LATEST)
            local.write_text(f"{name}\n")
            replace_file(local, self._place / LATEST, uuid.uuid4().hex[:8])

    def recover_all(self) -> None:
        """Nothing is ever out of its place here, as it may be on a disk."""

    def to_remove(self, entries: list[Entry]) -> list[Entry]:
        """Return which of ``entries`` (the newest first) need not stay: never the newest, never what is damaged."""
        return self._rules.to_remove(entries)

    def retain(self) -> list[str]:
        """Delete what need not stay, and return it. Called last, when ``latest`` names what was committed.

        What interrupted saves of earlier steps left is deleted, too.
        """
        entries = self.entries()
        gone = [str(entry.path) for entry in self.to_remove(entries)]
        for url in gone:
            self.remove(url)
        committed = {entry.step for entry in entries}
        for name in names_in(self._place):
            match = _STEP.fullmatch(name)
            if match and int(match[1]) not in committed and int(match[1]) < max(committed, default=0):
                self._delete_content(self._place / name)
        return gone

    def remove(self, path: str) -> None:
        """Delete a checkpoint, its manifest first: a half-deleted one does not look like one."""
        place = Remote.of(path)
        if kind_of(place) == "file":
            delete(place)
            return
        former = _former(place)
        delete(place / MANIFEST)
        self._delete_content(place, former)

    def _delete_content(self, place: Remote, former: Manifest | None = None) -> None:
        for name in names_in(place):
            if REMOTE_CONTENT.fullmatch(name):
                delete_folder(place / name)
        for_each(delete, [place / name for name in (former.files if former is not None else ())])
        delete_if_empty(place)
