"""Which environment started this process: told from the variables alone, without importing torch."""

import importlib
import os
from collections.abc import Mapping
from typing import Any, NamedTuple


class Detected(NamedTuple):
    """The name of an environment, and why it was chosen in words for the user."""

    name: str
    reason: str


ENVIRONMENTS: dict[str, str] = {
    "torchelastic": "lightning.fabric.plugins.environments.torchelastic:TorchElasticEnvironment",
    "lightning": "lightning.fabric.plugins.environments.lightning:LightningEnvironment",
    "xla": "lightning.fabric.plugins.environments.xla:XLAEnvironment",  # goes with the accelerator
}
"""Every environment's class by name."""

# First match wins: a launcher that has set its variables comes before a scheduler, whose variables may surround it.
DETECTION_ORDER: tuple[tuple[str, str], ...] = (("torchelastic", "TORCHELASTIC_RUN_ID"),)


def detect_environment(env: Mapping[str, str] | None = None) -> Detected:
    """Return the environment that ``env`` (None: this process's variables) shows; ``"lightning"`` if none."""
    env = os.environ if env is None else env
    for name, shown_by in DETECTION_ORDER:
        if _environment_class(name).detect(env):
            return Detected(name, f"detected from {shown_by}")
    if "LOCAL_RANK" in env:
        return Detected("lightning", "started with LOCAL_RANK, by no known launcher")
    return Detected("lightning", "no launcher or scheduler detected")


def build_environment(name: str) -> Any:
    """Return a new ``ClusterEnvironment`` for a name of :data:`ENVIRONMENTS`."""
    return _environment_class(name)()


def _environment_class(name: str) -> Any:
    module, _, cls = ENVIRONMENTS[name].partition(":")
    return getattr(importlib.import_module(module), cls)
