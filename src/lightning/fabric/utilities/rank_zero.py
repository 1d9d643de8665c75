"""Say and do things once, on the process of global rank 0."""

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, TextIO, TypeVar, cast

_Function = TypeVar("_Function", bound=Callable[..., Any])

_PACKAGE_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


class _UnlessConfigured(logging.StreamHandler[TextIO]):
    """Shows records on stderr in programs that have not set up logging themselves."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            self.stream = sys.stderr  # looked up each time: tests and notebooks replace it
            super().emit(record)


log = logging.getLogger("lightning.fabric")
if not log.handlers:
    log.addHandler(_UnlessConfigured())
if log.level == logging.NOTSET:
    log.setLevel(logging.INFO)


def _get_rank() -> int | None:
    """Return the rank that a launcher has put in the environment, or ``None``."""
    for variable in _RANK_VARIABLES:
        if value := os.environ.get(variable):
            try:
                return int(value)
            except ValueError:
                raise ValueError(f"The environment variable {variable} must be an integer, but is {value!r}.") from None
    return None


class _RankZeroOnly:
    """A decorator: the function runs on rank 0 only and returns ``default`` (``None``) on the others."""

    _rank: int | None = None

    @property
    def rank(self) -> int:
        """The global rank of this process: as set, else as found in the environment, else 0. ``None`` unsets it."""
        return self._rank if self._rank is not None else _get_rank() or 0

    @rank.setter
    def rank(self, rank: int | None) -> None:
        self._rank = rank

    def __call__(self, function: _Function, default: Any = None) -> _Function:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs) if self.rank == 0 else default

        return cast(_Function, wrapped)


rank_zero_only = _RankZeroOnly()


class LightningDeprecationWarning(DeprecationWarning):
    """A name or argument of this library that will go away."""


def rank_zero_info(message: Any, *args: Any, **kwargs: Any) -> None:
    """``logging.info`` on rank 0."""
    if rank_zero_only.rank == 0:
        log.info(message, *args, **kwargs)


def rank_zero_debug(message: Any, *args: Any, **kwargs: Any) -> None:
    """``logging.debug`` on rank 0."""
    if rank_zero_only.rank == 0:
        log.debug(message, *args, **kwargs)


def rank_zero_warn(
    message: str | Warning, category: type[Warning] = UserWarning, stacklevel: int | None = None
) -> None:
    """``warnings.warn`` on rank 0. Without a ``stacklevel``, it points at the line of the user's that led here."""
    if rank_zero_only.rank == 0:
        level = _level_of_user() if stacklevel is None else stacklevel + 1
        warnings.warn(message, category, stacklevel=level)


def rank_zero_deprecation(message: str | Warning, stacklevel: int | None = None) -> None:
    """``rank_zero_warn`` with a :class:`LightningDeprecationWarning`."""
    if rank_zero_only.rank == 0:
        level = _level_of_user() if stacklevel is None else stacklevel + 1
        warnings.warn(message, LightningDeprecationWarning, stacklevel=level)


def rank_prefixed_message(message: str, rank: int | None) -> str:
    """Put the rank, if there is one, before the message."""
    return message if rank is None else f"[rank: {rank}] {message}"


def _level_of_user() -> int:
    """Return the ``stacklevel``, for the caller of this function, of the first frame outside this library."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE_FOLDER):
        frame, level = frame.f_back, level + 1
    return level
