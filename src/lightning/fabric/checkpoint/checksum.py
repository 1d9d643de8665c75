"""Checksums of files: CRC-32 (zlib), computed piece by piece, by several threads."""

import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_PIECE = 4 << 20  # bytes; part of what a checksum means, so it is part of its text
_THREADS = 4
_NAME = f"crc32/{_PIECE}"


def checksum(path: Path, size: int) -> str:
    """Return the checksum of the first ``size`` bytes of the file.

    The CRC-32 of the CRC-32s of its pieces: one changed byte changes it for sure, and pieces can be read in parallel.
    It guards against damage, not against somebody who makes another file with the same checksum.

    Raises:
        EOFError: if the file is shorter.

    """
    with path.open("rb") as file:
        offsets = range(0, size, _PIECE)
        piece_at = lambda offset: _piece(file.fileno(), offset, min(_PIECE, size - offset))
        if len(offsets) < 2:
            return _total(map(piece_at, offsets))
        # reading and zlib both let other threads run
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
            return _total(threads.map(piece_at, offsets))


def _total(pieces: Iterable[int]) -> str:
    total = 0
    for piece in pieces:
        total = zlib.crc32(piece.to_bytes(4, "big"), total)
    return f"{_NAME}:{total:08x}"


def is_known(text: str) -> bool:
    """Return whether ``text`` is a checksum of the kind that :func:`checksum` computes."""
    return text.startswith(f"{_NAME}:")


def _piece(descriptor: int, offset: int, size: int) -> int:
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise EOFError(f"The file ends at byte {offset + len(data)}.")
        data += more
    return zlib.crc32(data)
