"""Checksums of files: CRC-32, computed piece by piece, by several threads; by isal if it is there, else by zlib.

Of a zip archive, as ``torch.save`` writes it, the checksum consists of those that the archive itself has of its
entries, and of the CRC-32 of all bytes between them. They were computed from memory, so that a save need not read the
file, and what a disk has made of it on the way is noticed too.
"""

import os
import struct
import threading
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

try:
    from isal.isal_zlib import crc32  # the same number as zlib's in a third of the time
except ImportError:
    from zlib import crc32

_PIECE = 4 << 20  # bytes; part of what a checksum means, so it is part of its text
_READ = 1 << 20  # bytes that stay in a core's cache
_THREADS = 4
_OF_PIECES = f"crc32/{_PIECE}"
_OF_ARCHIVE = "crc32/zip"
_LOCAL_HEADER = struct.Struct("<26xHH")  # of an entry; the lengths of the name and of the extra field that follow it


def checksum(path: Path, size: int, trusts_archive: bool = False) -> str:
    """Return the checksum of the first ``size`` bytes of the file.

    One changed byte changes it for sure, and pieces can be read in parallel. It guards against damage, not against
    somebody who makes another file with the same checksum.

    Args:
        path: the file.
        size: how much of it.
        trusts_archive: if it is an archive, take its word for what is in it: it was just written.

    Raises:
        EOFError: if the file is shorter.

    """
    with path.open("rb") as file:
        if trusts_archive and (entries := _entries(file, size)) is not None:
            return f"{_OF_ARCHIVE}:{_of_archive(file, size, entries, [entry.crc for entry in entries]):08x}"
        return f"{_OF_PIECES}:{_of_pieces(file, size):08x}"


def again(text: str, path: Path, size: int) -> str:
    """Return what :func:`checksum`, which once returned ``text``, has to return of the same bytes now.

    Raises:
        EOFError: if the file is shorter.

    """
    with path.open("rb") as file:
        if not text.startswith(f"{_OF_ARCHIVE}:"):
            return f"{_OF_PIECES}:{_of_pieces(file, size):08x}"
        entries = _entries(file, size)
        if entries is None:
            return f"{_OF_ARCHIVE}: none"
        found = [0] * len(entries)
        read = lambda number: _crc(file.fileno(), entries[number].start, entries[number].size)
        _for_each(len(entries), lambda number: found.__setitem__(number, read(number)))
        return f"{_OF_ARCHIVE}:{_of_archive(file, size, entries, found):08x}"


def is_known(text: str) -> bool:
    """Return whether ``text`` is a checksum of the kind that :func:`checksum` computes."""
    return text.startswith((f"{_OF_PIECES}:", f"{_OF_ARCHIVE}:"))


# -- of any file


def _of_pieces(file: BinaryIO, size: int) -> int:
    offsets = range(0, size, _PIECE)
    found = [0] * len(offsets)
    read = lambda number: _crc(file.fileno(), offsets[number], min(_PIECE, size - offsets[number]))
    _for_each(len(offsets), lambda number: found.__setitem__(number, read(number)))
    return _combined(found)


def _combined(pieces: Iterable[int]) -> int:
    total = 0
    for piece in pieces:
        total = crc32(piece.to_bytes(4, "big"), total)
    return total


def _crc(descriptor: int, offset: int, size: int) -> int:
    buffer = bytearray(min(size, _READ))
    total, end = 0, offset + size
    while offset < end:
        view = memoryview(buffer)[: end - offset]
        count = os.preadv(descriptor, [view], offset)
        if not count:
            raise EOFError(f"The file ends at byte {offset}.")
        total = crc32(view[:count], total)
        offset += count
    return total


def _for_each(count: int, act: Callable[[int], None]) -> None:
    """Call ``act(number)`` for each, in several threads: reading and CRC-32 both let other threads run.

    Threads of our own, because those of an executor cannot be had any more when a process ends.
    """
    numbers = iter(range(count))
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for number in numbers:
                act(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(min(_THREADS, os.cpu_count() or 1, count) - 1)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


# -- of an archive


class _Entry:
    """Where the content of an entry is in the file, and what the archive says of it."""

    def __init__(self, start: int, size: int, crc: int) -> None:
        self.start, self.size, self.crc = start, size, crc


def _entries(file: BinaryIO, size: int) -> list[_Entry] | None:
    """Return the entries in their order; None if it is no archive, or they are not just stored one after the other."""
    try:
        with zipfile.ZipFile(file) as archive:
            listed = sorted(archive.infolist(), key=lambda each: each.header_offset)
        entries, end = [], 0
        for each in listed:
            if not end <= each.header_offset < size:
                return None
            lengths = _LOCAL_HEADER.unpack(os.pread(file.fileno(), _LOCAL_HEADER.size, each.header_offset))
            start = each.header_offset + _LOCAL_HEADER.size + sum(lengths)
            if each.compress_type != zipfile.ZIP_STORED or start + each.file_size > size:
                return None
            entries.append(_Entry(start, each.file_size, each.CRC))
            end = start + each.file_size
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, OverflowError):
        return None  # whatever a damaged one makes of its parser
    return entries


def _of_archive(file: BinaryIO, size: int, entries: list[_Entry], crcs: list[int]) -> int:
    found, position = [], 0
    for entry, crc in zip(entries, crcs, strict=True):
        found += [_crc(file.fileno(), position, entry.start - position), crc]
        position = entry.start + entry.size
    return _combined([*found, _crc(file.fileno(), position, size - position)])
