"""Processes that this library starts itself, or that a user starts by hand with LOCAL_RANK set."""

import os
import socket
import sys
from collections.abc import Mapping

from lightning.fabric.plugins.environments._variables import read_int
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment


class LightningEnvironment(ClusterEnvironment):
    """The default environment.

    Reads LOCAL_RANK (set: the processes were started from outside), NODE_RANK or GROUP_RANK, MASTER_ADDR and
    MASTER_PORT. World size and global rank come from the strategy, which knows the number of devices and machines.
    Without MASTER_ADDR the ranks meet on this machine; without MASTER_PORT on a free port, chosen at first use.
    """

    def __init__(self) -> None:
        self._free_port: int | None = None
        self._world_size = 1
        self._global_rank = 0

    @property
    def creates_processes_externally(self) -> bool:
        return "LOCAL_RANK" in os.environ

    @property
    def main_address(self) -> str:
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        if "MASTER_PORT" in os.environ:
            return read_int("MASTER_PORT", default=0)
        if self._free_port is None:
            self._free_port = keep_network_port()
        return self._free_port

    @staticmethod
    def detect(env: Mapping[str, str] | None = None) -> bool:
        """Tell that this environment is always possible."""
        return True

    def world_size(self) -> int:
        return self._world_size

    def set_world_size(self, size: int) -> None:
        self._world_size = size

    def global_rank(self) -> int:
        return self._global_rank

    def set_global_rank(self, rank: int) -> None:
        self._global_rank = rank

    def local_rank(self) -> int:
        return read_int("LOCAL_RANK", default=0)

    def node_rank(self) -> int:
        return read_int("NODE_RANK", "GROUP_RANK", default=0)

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        if not self.creates_processes_externally:
            return
        asked = f"devices={num_devices} and num_nodes={num_nodes}"
        size = read_int("WORLD_SIZE", default=num_devices * num_nodes)
        if size != num_devices * num_nodes:
            raise ValueError(
                f"{asked} ask for {num_devices * num_nodes} process(es), but WORLD_SIZE is {size}. "
                "Start as many processes as the script asks for, or change `devices` or `num_nodes`."
            )
        if self.local_rank() >= num_devices:
            raise ValueError(f"{asked} ask for local ranks below {num_devices}, but LOCAL_RANK is {self.local_rank()}.")
        if self.node_rank() >= num_nodes:
            raise ValueError(f"{asked} ask for node ranks below {num_nodes}, but NODE_RANK is {self.node_rank()}.")

    def teardown(self) -> None:
        """Forget the chosen port, so that the next group of this process meets on another one."""
        if self._free_port is not None:
            release_network_port(self._free_port)
        self._free_port = None


def find_free_network_port() -> int:
    """Return a TCP port that nobody on this machine listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


_kept: dict[int, int] = {}  # the descriptor of the socket that has the port, by port


def keep_network_port() -> int:
    """Return a free TCP port that no other program is given until `release_network_port`, or until this process ends.

    Ranks take seconds to start; by then another run on this machine may have chosen the same port. Only the server of
    the ranks can listen on it, as it sets ``SO_REUSEADDR``. Elsewhere than on Linux the port is free now, no more.
    """
    if sys.platform != "linux":
        return find_free_network_port()
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("", 0))
        port: int = keeper.getsockname()[1]
        _kept[port] = keeper.detach()
    return port


def release_network_port(port: int) -> None:
    """Let others have a port of `keep_network_port`."""
    if port in _kept:
        os.close(_kept.pop(port))
