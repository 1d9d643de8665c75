"""Processes started by torchrun (which `fabric run` uses, too)."""

import os
from collections.abc import Mapping

from lightning.fabric.plugins.environments._variables import require, require_int
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment


class TorchElasticEnvironment(ClusterEnvironment):
    """Reads everything from the variables that torchrun sets for each process.

    RANK, WORLD_SIZE, LOCAL_RANK, GROUP_RANK, MASTER_ADDR, MASTER_PORT; one that is missing raises ``RuntimeError``.
    """

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return require("MASTER_ADDR", type(self).__name__)

    @property
    def main_port(self) -> int:
        return self._int("MASTER_PORT")

    @staticmethod
    def detect(env: Mapping[str, str] | None = None) -> bool:
        return "TORCHELASTIC_RUN_ID" in (os.environ if env is None else env)

    def world_size(self) -> int:
        return self._int("WORLD_SIZE")

    def set_world_size(self, size: int) -> None:
        """Ignored: torchrun decides the world size."""

    def global_rank(self) -> int:
        return self._int("RANK")

    def set_global_rank(self, rank: int) -> None:
        """Ignored: torchrun decides the ranks."""

    def local_rank(self) -> int:
        return self._int("LOCAL_RANK")

    def node_rank(self) -> int:
        return self._int("GROUP_RANK")

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        if num_devices * num_nodes != self.world_size():
            raise ValueError(
                f"devices={num_devices} and num_nodes={num_nodes} ask for {num_devices * num_nodes} process(es), "
                f"but torchrun has started {self.world_size()} (WORLD_SIZE). "
                "Make `--nproc-per-node` and `--nnodes` agree with `devices` and `num_nodes`."
            )

    def _int(self, name: str) -> int:
        return require_int(name, type(self).__name__)
