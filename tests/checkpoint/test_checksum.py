"""Checksums of files are the same number, whoever computes them."""

import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning.fabric.checkpoint import checksum as module
from lightning.fabric.checkpoint.checksum import _PIECE, again, checksum


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.binary(min_size=1, max_size=40), size=st.integers(0, 3 * _PIECE))
def test_isal_and_zlib_agree(seed, size, tmp_path):
    pytest.importorskip("isal")
    assert module.crc32 is not zlib.crc32
    path = tmp_path / "file"
    path.write_bytes((seed * (size // len(seed) + 1))[:size])
    by_isal = checksum(path, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "crc32", zlib.crc32)
        assert checksum(path, size) == by_isal
        assert again(by_isal, path, size) == by_isal


def test_it_is_a_crc_of_crcs_that_anybody_can_compute(tmp_path):
    path = tmp_path / "file"
    pieces = b"a" * _PIECE, b"bc"
    path.write_bytes(b"".join(pieces))
    both = b"".join(zlib.crc32(piece).to_bytes(4, "big") for piece in pieces)
    assert checksum(path, _PIECE + 2) == f"crc32/{_PIECE}:{zlib.crc32(both):08x}"


@pytest.mark.parametrize("size", [0, 1, _PIECE - 1, _PIECE, _PIECE + 1, 3 * _PIECE])
def test_it_depends_on_every_piece(size, tmp_path):
    path = tmp_path / "a"
    content = bytearray(size)
    path.write_bytes(content)
    found = {checksum(path, size)}
    positions = {position for position in (0, _PIECE - 1, _PIECE, size - 1) if 0 <= position < size}
    for position in positions:
        content[position] = 1
        path.write_bytes(content)
        found.add(checksum(path, size))
        content[position] = 0
    assert len(found) == 1 + len(positions)


def test_a_file_that_ends_early_is_an_error(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    with pytest.raises(EOFError, match="ends at byte 3"):
        checksum(path, 4)
