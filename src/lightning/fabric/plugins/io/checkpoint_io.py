"""The contract of a checkpoint IO."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from lightning.fabric.utilities.types import _PATH


class CheckpointIO(ABC):
    """Writes one checkpoint to storage and reads it back.

    The strategy decides which ranks call, and gathers what is written; a checkpoint IO knows neither ranks nor
    strategies. A path that exists holds a complete checkpoint: one that fails half-way must leave what was there.
    """

    to_any_path: ClassVar[bool] = False
    """Whether :meth:`write_checkpoint` writes all there is to the local path that it is given. Then the library decides
    where that is: it writes beside the place, records checksums, and renames. Else, it calls :meth:`save_checkpoint`
    with the user's path, and leaves everything to that."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """What saves in its own way is asked to, unless it says that it need not be."""
        super().__init_subclass__(**kwargs)
        if "save_checkpoint" in cls.__dict__ and "to_any_path" not in cls.__dict__:
            cls.to_any_path = False

    def write_checkpoint(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Write to a local path at which is nothing of value; asked only where ``to_any_path``."""
        raise NotImplementedError(f"{type(self).__name__} says `to_any_path`, but has no `write_checkpoint`.")

    @abstractmethod
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write ``checkpoint``, a tree of state dicts and plain values, to ``path``; make its parent folders.

        ``storage_options`` is for this class to interpret; ``TypeError`` if it takes none.
        """

    @abstractmethod
    def load_checkpoint(
        self, path: _PATH, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the checkpoint at ``path``, with its tensors on ``map_location``.

        ``weights_only=True`` refuses everything but tensors and plain containers, so that a file cannot run code.
        """

    @abstractmethod
    def remove_checkpoint(self, path: _PATH) -> None:
        """Delete the file or folder at ``path``; nothing there is fine."""

    def teardown(self) -> None:  # noqa: B027
        """Finish pending work and free resources. May be called more than once."""
