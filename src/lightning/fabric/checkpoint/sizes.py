"""Sizes in bytes, as people write and read them."""

import re

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_in_bytes(text: str) -> int:
    """Return the number of bytes that a text like ``5GB``, ``500MB``, ``4GiB`` or ``1000`` says.

    Raises:
        ValueError: if it is none, or below 1 byte.

    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or (size := int(float(match[1]) * unit)) < 1:
        raise ValueError(f"A size is a number above 0 with a unit, such as 5GB, 500MB or 4GiB, but got {text!r}.")
    return size


def size_as_text(size: int) -> str:
    """Return it with three digits or so, such as ``1.25 GB``."""
    for name, unit in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= unit:
            return f"{size / unit:.3g} {name}" if size < 1000 * unit else f"{size // unit} {name}"
    return f"{size} B"
