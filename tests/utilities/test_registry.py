from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from lightning.fabric.utilities import registry
from lightning.fabric.utilities.registry import CALLBACKS_GROUP, _load_external_callbacks


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EntryPoint]]:
    """Entry points that packages have."""
    entries: list[EntryPoint] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: [e for e in entries if e.group == group])
    registry._entries.cache_clear()
    yield entries
    registry._entries.cache_clear()


def one() -> Any:
    return "callback"


def several() -> Any:
    return ["first", "second"]


def broken() -> Any:
    raise KeyError("no settings")


def _entry(function: str, group: str = CALLBACKS_GROUP) -> EntryPoint:
    return EntryPoint(function, f"{__name__}:{function}", group)


def test_callbacks_of_all_factories(installed: list[EntryPoint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EntryPoint, "load", lambda self: globals()[self.name])
    installed.extend([_entry("one"), _entry("several"), _entry("broken", group="another.group")])
    assert _load_external_callbacks() == ["callback", "first", "second"]


def test_a_broken_package_is_named(installed: list[EntryPoint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EntryPoint, "load", lambda self: globals()[self.name])
    installed.append(_entry("broken"))
    with pytest.raises(RuntimeError, match=r"broken.*KeyError\('no settings'\).*Fix or uninstall"):
        _load_external_callbacks()


def test_none_installed(installed: list[EntryPoint]) -> None:
    assert _load_external_callbacks() == []
