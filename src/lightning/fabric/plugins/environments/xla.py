"""Processes that torch_xla starts, one for each core of the TPUs of a machine."""

import os
from collections.abc import Mapping
from typing import Any

from lightning.fabric.plugins.environments._variables import read_int
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.utilities.imports import package_available, require


class XLAEnvironment(ClusterEnvironment):
    """Asks the runtime of torch_xla, which knows all the machines of a TPU pod.

    Asking for a rank makes this process take hold of its device, after which it cannot start others any more: only
    for processes that are launched. MASTER_ADDR and MASTER_PORT go first, where they are set.
    """

    @property
    def creates_processes_externally(self) -> bool:
        return False

    @property
    def main_address(self) -> str:
        if "MASTER_ADDR" in os.environ:
            return os.environ["MASTER_ADDR"]
        runtime = _runtime()
        return str(runtime.get_master_ip()) if runtime.device_type() == "TPU" else "127.0.0.1"

    @property
    def main_port(self) -> int:
        return read_int("MASTER_PORT", default=29400)  # torchrun's

    @staticmethod
    def detect(env: Mapping[str, str] | None = None) -> bool:
        """Tell whether this machine has TPUs and torch_xla."""
        if not package_available("torch_xla"):
            return False
        from torch_xla._internal import tpu

        return int(tpu.num_available_devices()) > 0

    def world_size(self) -> int:
        return int(_runtime().world_size())

    def set_world_size(self, size: int) -> None:
        """Ignored: the runtime knows the devices."""

    def global_rank(self) -> int:
        return int(_runtime().global_ordinal())

    def set_global_rank(self, rank: int) -> None:
        """Ignored: the runtime numbers the devices."""

    def local_rank(self) -> int:
        return int(_runtime().local_ordinal())

    def node_rank(self) -> int:
        return int(_runtime().host_index())


def _runtime() -> Any:
    require("torch_xla", "XLAEnvironment")
    from torch_xla import runtime

    return runtime
