"""The contract of a cluster environment."""

from abc import ABC, abstractmethod


class ClusterEnvironment(ABC):
    """What a process knows about the group it belongs to: its ranks, the group's size, where the ranks meet.

    The one owner of these facts; a strategy asks here and nowhere else. Nothing is read when the object is made, so
    that it can be pickled into another process and answer for that one.
    """

    @property
    @abstractmethod
    def creates_processes_externally(self) -> bool:
        """Whether somebody else (a launcher, a scheduler) has started the processes."""

    @property
    @abstractmethod
    def main_address(self) -> str:
        """Host name or IP address of rank 0."""

    @property
    @abstractmethod
    def main_port(self) -> int:
        """Port on which rank 0 meets the others. The same on all ranks."""

    @staticmethod
    @abstractmethod
    def detect() -> bool:
        """Tell whether this process was started in this environment."""

    @abstractmethod
    def world_size(self) -> int:
        """Return the number of processes on all machines."""

    @abstractmethod
    def set_world_size(self, size: int) -> None:
        """Receive the world size from the strategy. Environments that know it themselves ignore the call."""

    @abstractmethod
    def global_rank(self) -> int:
        """Return this process's rank among all, ``0 <= rank < world_size()``."""

    @abstractmethod
    def set_global_rank(self, rank: int) -> None:
        """Receive the global rank from the strategy. Environments that know it themselves ignore the call."""

    @abstractmethod
    def local_rank(self) -> int:
        """Return this process's rank among those on its machine."""

    @abstractmethod
    def node_rank(self) -> int:
        """Return this machine's rank among the machines."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:  # noqa: B027
        """Raise ``ValueError`` if the environment holds another number of processes than was asked for.

        ``num_devices`` counts the devices of one machine.
        """

    def teardown(self) -> None:  # noqa: B027
        """Give back what the environment holds. May be called more than once."""
