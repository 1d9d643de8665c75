import dataclasses
from argparse import Namespace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning.fabric.utilities.logger import (
    _add_prefix,
    _convert_params,
    _flatten_dict,
    _sanitize_callable_params,
)


@dataclasses.dataclass
class Settings:
    lr: float = 0.1
    inner: object = None


@pytest.mark.parametrize(
    ("params", "converted"),
    [
        (None, {}),
        (Namespace(a=1), {"a": 1}),
        ({"a": 1}, {"a": 1}),
        (Settings(), {"lr": 0.1, "inner": None}),
    ],
)
def test_convert_params(params: object, converted: dict) -> None:
    assert _convert_params(params) == converted


def test_convert_params_makes_a_new_dictionary() -> None:
    given = {"a": 1}
    _convert_params(given)["b"] = 2
    assert given == {"a": 1}


def test_flatten() -> None:
    params = {"a": {"b": 1, 2: Namespace(c=3)}, "d": Settings(inner={"x": [1]}), "e": {}}
    assert _flatten_dict(params) == {"a/b": 1, "a/2/c": 3, "d/lr": 0.1, "d/inner/x": [1]}
    assert _flatten_dict({"a": {"b": 1}}, delimiter=".") == {"a.b": 1}


@settings(deadline=None, max_examples=50)
@given(
    st.recursive(
        st.integers(), lambda inner: st.dictionaries(st.text("ab", min_size=1), inner, min_size=1), max_leaves=6
    )
)
def test_flatten_keeps_every_leaf(tree: object) -> None:
    flat = _flatten_dict({"root": tree})
    assert not any(isinstance(value, dict) for value in flat.values())
    for path, value in flat.items():
        node: object = {"root": tree}
        for key in path.split("/"):
            node = node[key]  # type: ignore[index]
        assert node == value


def test_callables_become_their_names() -> None:
    params = {"f": len, "c": Settings, "p": partial(len, []), "n": 1, "s": "len"}
    assert _sanitize_callable_params(params) == {"f": "len", "c": "Settings", "p": "partial", "n": 1, "s": "len"}


def test_prefix() -> None:
    assert _add_prefix({"loss": 1}, "train", "-") == {"train-loss": 1}
    assert _add_prefix({"loss": 1}, "", "-") == {"loss": 1}
