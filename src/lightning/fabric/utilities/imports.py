"""What this Python can import, without importing it."""

import functools
import importlib.util
import platform
import re
import sys

_IS_WINDOWS = platform.system() == "Windows"
_IS_INTERACTIVE = hasattr(sys, "ps1")


@functools.cache
def package_available(name: str) -> bool:
    """Return whether the package or module ``name`` is installed. Parents of a dotted name are imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):  # no such parent; or a half-made module without a spec
        return False


def require(package: str, feature: str, pip: str | None = None) -> None:
    """Raise ``ModuleNotFoundError`` with the install command unless ``package`` is there.

    ``feature`` is what the user asked for, as they wrote it; ``pip`` the name on the package index, if it differs.
    """
    if not package_available(package):
        raise ModuleNotFoundError(
            f"{feature} needs the package `{package}`. Install it with: pip install {pip or package}", name=package
        )


def __getattr__(name: str) -> bool:
    """``_TORCH_GREATER_EQUAL_2_4``, for any version; on demand, so that importing this module imports no torch."""
    wanted = re.fullmatch(r"_TORCH_GREATER_EQUAL_(\d+)_(\d+)(?:_(\d+))?", name)
    if wanted is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import torch

    have = [int(number) for number in re.findall(r"\d+", torch.__version__)[:3]]
    return have >= [int(number) for number in wanted.groups() if number]
