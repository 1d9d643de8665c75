"""Environment variables, read with errors that name them."""

import os


def read_int(*names: str, default: int) -> int:
    """Return the first of the variables ``names`` that is set, or ``default``.

    Text that is no whole number >= 0 raises ``ValueError``.
    """
    for name in names:
        text = os.environ.get(name)
        if text is not None:
            if not text.strip().isdecimal():
                raise ValueError(f"The environment variable {name} must be a whole number >= 0, but it is {text!r}.")
            return int(text)
    return default


def require(name: str, needed_by: str) -> str:
    """Return the variable ``name``; unset, it raises ``RuntimeError``."""
    try:
        return os.environ[name]
    except KeyError:
        raise RuntimeError(
            f"{needed_by} needs the environment variable {name}, which is not set. "
            "Start the script with a launcher that sets it."
        ) from None


def require_int(name: str, needed_by: str) -> int:
    """Return the variable ``name`` as a number, with the errors of :func:`require` and :func:`read_int`."""
    require(name, needed_by)
    return read_int(name, default=0)
