"""Hyperparameters and metrics in the shapes that loggers write."""

import dataclasses
from argparse import Namespace
from collections.abc import Mapping
from typing import Any


def _convert_params(params: Any) -> dict[str, Any]:
    """Return hyperparameters (a mapping, namespace, dataclass object or ``None``) as a new dictionary."""
    if params is None:
        return {}
    if isinstance(params, Namespace):
        return dict(vars(params))
    if dataclasses.is_dataclass(params) and not isinstance(params, type):
        return {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    return dict(params)


def _flatten_dict(params: Mapping[Any, Any], delimiter: str = "/", parent_key: str = "") -> dict[str, Any]:
    """Return ``{"a": {"b": 1}}`` as ``{"a/b": 1}``; namespaces and dataclasses inside count as dictionaries."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        name = f"{parent_key}{delimiter}{key}" if parent_key else str(key)
        if isinstance(value, (Mapping, Namespace)) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
            flat.update(_flatten_dict(_convert_params(value), delimiter, name))
        else:
            flat[name] = value
    return flat


def _sanitize_callable_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``params`` with the name of each function, class or callable object in its place."""
    return {key: _name_of(value) if callable(value) else value for key, value in params.items()}


def _name_of(function: Any) -> str:
    return getattr(function, "__name__", None) or type(function).__name__


def _add_prefix(metrics: Mapping[str, Any], prefix: str, separator: str) -> dict[str, Any]:
    """Return ``metrics`` with ``prefix`` and ``separator`` before each name, or as they are if ``prefix`` is empty."""
    return {f"{prefix}{separator}{name}": value for name, value in metrics.items()} if prefix else dict(metrics)
