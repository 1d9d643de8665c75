"""What is to be read: found, recovered, compared with its manifest; of a folder of checkpoints, the newest good one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.fabric.checkpoint.directory import CheckpointDirectory, unreadable
from lightning.fabric.checkpoint.manifest import (
    MANIFEST,
    REMOTE_CONTENT,
    DamagedCheckpointError,
    NewerCheckpointError,
    read_manifest,
    verify,
)
from lightning.fabric.checkpoint.saving import Peers, agreed
from lightning.fabric.checkpoint.transaction import recover
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol, _local_path
from lightning.fabric.utilities.load import had_manifest
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.types import _PATH


@contextmanager
def opened(path: _PATH, digests: bool, peers: Peers) -> Iterator[_PATH]:
    """Collective: a context with the path of the checkpoint to read, which is as it was saved.

    Sizes of files are compared with the manifest, and with ``digests`` their checksums too, which takes reading them
    once; ranks share the files. What has no manifest, as checkpoints of other programs, is taken as it is. Of a folder
    of checkpoints it is the newest good one; a warning names those that are newer, and what is wrong with them. What
    is not on a local disk is copied there.

    Raises:
        DamagedCheckpointError: on all ranks; it names the file.
        RuntimeError: on the other ranks, if one cannot read.

    """
    if not _is_local_file_protocol(path):
        from lightning.fabric.checkpoint.remote import fetched

        with fetched(str(path), digests, peers) as local:
            yield local
        return
    local = _local_path(path)
    doing = f"loading {os.fspath(path)!r}"
    agreed(peers, doing, lambda: recover(local), on_rank_0=True)
    if peers.share(agreed(peers, doing, lambda: is_directory_of_checkpoints(local), on_rank_0=True)):
        yield _newest_good(CheckpointDirectory(local), digests, peers)
        return
    if (damage := _damage(local, digests, peers)) is not None:
        raise damage
    content = _content(local)
    yield path if content == local else content


def is_directory_of_checkpoints(path: Path) -> bool:
    """Whether the folder has checkpoints by their steps in it."""
    return bool(CheckpointDirectory(path).entries())


def _newest_good(directory: CheckpointDirectory, digests: bool, peers: Peers) -> Path:
    """Collective."""
    path = directory.folder
    agreed(peers, f"loading {os.fspath(path)!r}", directory.recover_all, on_rank_0=True)
    entries = agreed(peers, f"looking into {os.fspath(path)!r}", directory.entries, on_rank_0=True)
    candidates: list[Path] = peers.share(None if entries is None else [entry.path for entry in entries])
    damages: list[DamagedCheckpointError] = []
    for candidate in candidates:
        damage = _damage(candidate, digests, peers, among_others=True)
        if damage is None:
            for each in damages:
                rank_zero_warn(f"{each} It is passed over, and {os.fspath(candidate)!r} is loaded.")
            return _content(candidate)
        if isinstance(damage, NewerCheckpointError):  # to go on from an older one would be to lose what it has
            raise damage
        damages.append(damage)
    if not damages:
        raise FileNotFoundError(f"There is no checkpoint in {os.fspath(path)!r} any more.")
    newest = damages[0]
    file = os.path.join(os.path.basename(newest.path), newest.file).rstrip(os.sep)
    raise DamagedCheckpointError(path, file, f"{newest.what}; and none of its {len(damages)} checkpoints is good")


def _content(path: Path) -> Path:
    """Where the files are: of a folder that was made behind a URL and copied to a disk, in a folder of their own."""
    manifest = read_manifest(path) if path.is_dir() else None
    tops = {name.partition("/")[0] for name in manifest.files} if manifest is not None else set()
    first, *others = tops or {""}
    return path / first if not others and REMOTE_CONTENT.fullmatch(first) else path


def _damage(path: Path, digests: bool, peers: Peers, among_others: bool = False) -> DamagedCheckpointError | None:
    """Collective: what any rank finds wrong with the checkpoint, the same on all of them.

    ``among_others`` it has to have a manifest, and what the disk does not give is as good as damaged.
    """
    found: Exception | None = None
    try:
        if (manifest := read_manifest(path) if path.exists() else None) is not None:
            verify(path, manifest, digests, is_mine=lambda number: number % peers.size == peers.rank)
        elif among_others or had_manifest(path):
            found = _without_manifest(path)
    except DamagedCheckpointError as error:
        found = error
    except OSError as error:
        found = unreadable(path, error) if among_others else error
    peers.raise_on_all(found if isinstance(found, OSError) else None, f"reading {os.fspath(path)!r}")
    all_found: list[DamagedCheckpointError | None] | None = peers.gather(found)
    worst: DamagedCheckpointError | None = peers.share(
        None if all_found is None else next((each for each in all_found if each is not None), None)
    )
    return worst


def _without_manifest(path: Path) -> DamagedCheckpointError:
    if not path.exists():
        return DamagedCheckpointError(path, "", "is gone, or a link that leads nowhere")
    if path.is_dir():
        return DamagedCheckpointError(path, MANIFEST, "is missing")
    return DamagedCheckpointError(path, "", "has no manifest")
