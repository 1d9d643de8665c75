import subprocess
import sys

import pytest

from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.fabric.plugins.environments._detection import build_environment, detect_environment

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}


@pytest.mark.parametrize(
    ("env", "name", "reason"),
    [
        ({}, "lightning", "no launcher or scheduler detected"),
        ({"LOCAL_RANK": "1"}, "lightning", "started with LOCAL_RANK"),
        ({"LOCAL_RANK": "1", "LT_CLI_USED": "1"}, "lightning", "started with LOCAL_RANK"),
        (TORCHRUN, "torchelastic", "detected from TORCHELASTIC_RUN_ID"),
        ({**TORCHRUN, "LT_CLI_USED": "1"}, "torchelastic", "detected from TORCHELASTIC_RUN_ID"),
    ],
)
def test_the_environment_and_the_reason_for_it(env, name, reason):
    detected = detect_environment(env)
    assert detected.name == name
    assert detected.reason.startswith(reason)


def test_without_an_argument_this_process_is_asked(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert detect_environment().name == "torchelastic"


def test_names_build_environments():
    assert type(build_environment("lightning")) is LightningEnvironment
    assert type(build_environment("torchelastic")) is TorchElasticEnvironment


@pytest.mark.slow
def test_detecting_and_building_import_no_torch():
    code = (
        "import sys\n"
        "from lightning.fabric.plugins.environments._detection import build_environment, detect_environment\n"
        "build_environment(detect_environment().name)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
