"""The second names: ``lightning``, ``lightning_fabric`` and, where it is installed, ``lightning.pytorch``."""

import importlib
import importlib.util
import pickle
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning as L
import lightning.fabric
import lightning_fabric

PUBLIC_MODULES = [
    found.name
    for found in pkgutil.walk_packages(lightning.fabric.__path__, "lightning.fabric.")
    if not found.name.rpartition(".")[2].startswith("_")
]


def _forget_pytorch() -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "pytorch_lightning" or n.startswith("lightning.pytorch")]:
        del sys.modules[name]
    vars(L).pop("pytorch", None)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package ``pytorch_lightning`` with the names that ``lightning`` serves from it."""
    package = tmp_path / "pytorch_lightning"
    (package / "callbacks").mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from pytorch_lightning.callbacks import Callback\n"
        "class Trainer: pass\nclass LightningModule: pass\nclass LightningDataModule: pass\n"
    )
    (package / "callbacks" / "__init__.py").write_text("class Callback: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield
    _forget_pytorch()
    sys.meta_path[:] = finders


class TestLightning:
    def test_serves_fabric(self) -> None:
        assert L.Fabric is lightning.fabric.Fabric
        assert L.seed_everything is lightning.fabric.seed_everything
        assert L.__all__ == ["Fabric", "seed_everything"]

    @pytest.mark.parametrize("name", ["Trainer", "LightningModule", "LightningDataModule", "Callback"])
    def test_serves_the_trainer_names_from_the_separate_package(self, stand_in: None, name: str) -> None:
        assert getattr(L, name) is getattr(importlib.import_module("pytorch_lightning"), name)

    def test_lightning_pytorch_is_the_separate_package(self, stand_in: None) -> None:
        import lightning.pytorch as pl
        from lightning.pytorch.callbacks import Callback

        assert pl is L.pytorch is sys.modules["pytorch_lightning"]
        assert Callback is sys.modules["pytorch_lightning.callbacks"].Callback
        assert Callback.__module__ == "pytorch_lightning.callbacks"

    @pytest.mark.parametrize("name", ["Trainer", "LightningModule", "LightningDataModule", "Callback", "pytorch"])
    def test_without_it_the_error_names_what_to_install(self, name: str) -> None:
        with pytest.raises(ImportError, match="pip install pytorch-lightning"):
            getattr(L, name)

    def test_without_it_the_module_does_not_import(self) -> None:
        with pytest.raises(ImportError, match="separate package pytorch_lightning, which is not installed"):
            importlib.import_module("lightning.pytorch.callbacks")

    def test_an_unknown_name_is_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match=r"'lightning' has no attribute 'Fabrik'"):
            L.Fabrik  # noqa: B018


class TestLightningFabric:
    def test_is_the_package(self) -> None:
        assert lightning_fabric is lightning.fabric

    @pytest.mark.parametrize("name", PUBLIC_MODULES)
    def test_every_public_module_is_the_same_object(self, name: str) -> None:
        real = importlib.import_module(name)
        spec = real.__spec__
        assert importlib.import_module(name.replace("lightning.fabric", "lightning_fabric", 1)) is real
        assert real.__spec__ is spec
        assert real.__name__ == name

    def test_from_import_agrees(self) -> None:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy

        assert Fabric is lightning.fabric.Fabric
        assert DDPStrategy is importlib.import_module("lightning.fabric.strategies").DDPStrategy

    def test_a_pickle_written_under_the_other_name_loads(self) -> None:
        from lightning.fabric.utilities.data import AttributeDict

        written = pickle.dumps(AttributeDict(step=3), protocol=0)
        loaded = pickle.loads(written.replace(b"lightning.fabric", b"lightning_fabric"))
        assert type(loaded) is AttributeDict
        assert loaded.step == 3

    def test_a_missing_module_is_not_found(self) -> None:
        assert importlib.util.find_spec("lightning_fabric.no_such_module") is None
        with pytest.raises(ModuleNotFoundError, match=r"lightning_fabric\.no_such_module"):
            importlib.import_module("lightning_fabric.no_such_module")

    @pytest.mark.slow
    @pytest.mark.parametrize("first", ["lightning.fabric", "lightning_fabric"])
    def test_either_name_may_come_first(self, first: str) -> None:
        second = {"lightning.fabric": "lightning_fabric", "lightning_fabric": "lightning.fabric"}[first]
        code = f"import {first}.utilities.seed as a; import {second}.utilities.seed as b; assert a is b"
        subprocess.run([sys.executable, "-c", code], check=True)

    @pytest.mark.slow
    def test_modules_run_with_dash_m(self) -> None:
        for name in ("lightning.fabric.cli", "lightning_fabric.cli"):
            done = subprocess.run([sys.executable, "-m", name, "--help"], check=False, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert "run" in done.stdout
