"""The small modules of words: enums, imports, text, warnings, types."""

import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch

from lightning.fabric.utilities import imports
from lightning.fabric.utilities.enums import LightningEnum
from lightning.fabric.utilities.imports import package_available, require
from lightning.fabric.utilities.text import did_you_mean
from lightning.fabric.utilities.types import Optimizable, _Stateful
from lightning.fabric.utilities.warnings import PossibleUserWarning, disable_possible_user_warnings


class Color(LightningEnum):
    RED = "red"
    DARK_BLUE = "dark-Blue"


class TestEnum:
    @pytest.mark.parametrize("text", ["dark-blue", "DARK-BLUE", "Dark_Blue", "dark_blue"])
    def test_names_and_values_in_any_case(self, text: str) -> None:
        assert Color(text) is Color.from_str(text) is Color.DARK_BLUE

    def test_equality_and_hash_ignore_case(self) -> None:
        assert Color.RED == "RED"
        assert Color.RED != "green"
        assert Color.RED != 1
        assert hash(Color.RED) == hash("red")
        assert {Color.RED: 1}["red"] == 1
        assert Color.RED != Color.DARK_BLUE

    def test_unknown(self) -> None:
        assert Color.try_from_str("green") is None
        with pytest.raises(ValueError, match=r"'green' is not one of: red, dark-Blue\."):
            Color.from_str("green")
        with pytest.raises(ValueError, match="green"):
            Color("green")

    def test_is_a_string(self) -> None:
        assert str(Color.RED) == f"{Color.RED}" == "red"
        assert pickle.loads(pickle.dumps(Color.RED)) is Color.RED


class TestImports:
    @pytest.mark.parametrize(
        ("name", "there"), [("torch", True), ("torch.nn", True), ("no_such_package", False), ("no_such.module", False)]
    )
    def test_package_available(self, name: str, there: bool) -> None:
        assert package_available(name) is there

    def test_require(self) -> None:
        require("torch", "anything")
        with pytest.raises(
            ModuleNotFoundError,
            match=r"strategy='x' needs the package `no_such_package`. Install it with: pip install no-such",
        ):
            require("no_such_package", "strategy='x'", pip="no-such")

    @pytest.mark.parametrize(
        ("version", "flag", "value"),
        [
            ("2.10.1", "_TORCH_GREATER_EQUAL_2_9", True),
            ("2.10.1", "_TORCH_GREATER_EQUAL_2_10", True),
            ("2.10.1", "_TORCH_GREATER_EQUAL_2_10_2", False),
            ("2.9.0+cpu", "_TORCH_GREATER_EQUAL_2_10", False),
            ("2.11.0a0+git12", "_TORCH_GREATER_EQUAL_2_11", True),
        ],
    )
    def test_torch_version(self, version: str, flag: str, value: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "__version__", version)
        assert getattr(imports, flag) is value

    def test_unknown_name(self) -> None:
        with pytest.raises(AttributeError, match="_TORCH_GREATER"):
            _ = imports._TORCH_GREATER


@pytest.mark.parametrize(
    ("given", "suggestion"), [("dpp", " Did you mean 'ddp'?"), ("DDP", " Did you mean 'ddp'?"), ("xyz", "")]
)
def test_did_you_mean(given: str, suggestion: str) -> None:
    assert did_you_mean(given, ["ddp", "fsdp"]) == suggestion


class TestPossibleUserWarning:
    def test_can_be_silenced(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            disable_possible_user_warnings()
            warnings.warn("perhaps", PossibleUserWarning)
            with pytest.raises(UserWarning):
                warnings.warn("surely", UserWarning)

    def test_in_one_module(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            disable_possible_user_warnings(module="another.module")
            with pytest.raises(PossibleUserWarning):
                warnings.warn("perhaps", PossibleUserWarning)

    @pytest.mark.slow
    @pytest.mark.parametrize(("setting", "shown"), [("off", False), ("0", False), ("on", True)])
    def test_by_the_environment(self, setting: str, shown: bool) -> None:
        code = (
            "import warnings; from lightning.fabric.utilities.warnings import PossibleUserWarning; "
            "warnings.warn('perhaps', PossibleUserWarning)"
        )
        env = os.environ | {"POSSIBLE_USER_WARNINGS": setting, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True, text=True)
        assert ("PossibleUserWarning" in done.stderr) is shown


def test_protocols_know_torch_objects() -> None:
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters())
    assert isinstance(layer, _Stateful)
    assert isinstance(optimizer, Optimizable)
    assert not isinstance({}, _Stateful)
    assert not isinstance(layer, Optimizable)
