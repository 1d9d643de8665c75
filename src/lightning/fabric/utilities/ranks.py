"""What ranks that act together, each for itself, have to say to each other."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class RaisesOnAll(Protocol):
    """A strategy, or :class:`Ranks`."""

    def raise_on_all(self, error: BaseException | None, doing: str) -> None:
        """If any rank has an ``error``, raise on all."""


class Ranks(RaisesOnAll, Protocol):
    """Ranks that act together; every method is called by all of them, in the same order."""

    rank: int
    size: int

    def gather(self, obj: Any) -> list[Any] | None:
        """Return every rank's ``obj`` on rank 0, None elsewhere."""

    def share(self, obj: Any) -> Any:
        """Return rank 0's ``obj``."""


@contextmanager
def all_or_none(ranks: RaisesOnAll, doing: str) -> Iterator[None]:
    """Collective: an error of the block on one rank is raised on all; no collective that may be missed is inside."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    ranks.raise_on_all(error, doing)
