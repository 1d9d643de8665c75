"""The face of a launcher: make the processes of a launch exist and run one function in them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar


class _Launcher(ABC):
    """Starts the processes that a strategy needs; knows the cluster environment and counts, not the strategy."""

    needs_function: ClassVar[bool] = False
    """Whether the new processes can only run a function, rather than go on with the script."""

    @property
    @abstractmethod
    def is_interactive_compatible(self) -> bool:
        """Whether this launcher works in a notebook or an interactive session."""

    @abstractmethod
    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make the processes exist, run ``function(*args, **kwargs)`` in each, and return what rank 0 returned."""
