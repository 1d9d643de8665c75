"""Settings as a YAML file that any YAML reader gives back, without a package for it."""

import json
import math
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any


def to_yaml(settings: Mapping[str, Any]) -> str:
    """Return one line per setting. Types that YAML lacks become their string."""
    return "".join(f"{_key(name)}: {_value(value)}\n" for name, value in settings.items())


def _value(value: Any) -> str:
    if hasattr(value, "tolist"):  # arrays, tensors and their scalars
        value = value.tolist()
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return _float(float(value))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(name)}: {_value(item)}" for name, item in value.items()) + "}"
    if isinstance(value, Sequence | Set) and not isinstance(value, str | bytes):
        return "[" + ", ".join(map(_value, value)) + "]"
    return _text(str(value))


def _float(value: float) -> str:
    if not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    text = repr(value)
    return text if "." in text or "e" not in text else text.replace("e", ".0e")  # YAML takes 1e-05 for a string


def _key(name: Any) -> str:
    text = str(name)
    plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_./-]*", text)
    reserved = text.lower() in {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
    return text if plain and not reserved else _text(text)


def _text(text: str) -> str:
    def escape(char: str) -> str:
        if char < "\x7f":
            return json.dumps(char)[1:-1]
        return char if char.isprintable() else f"\\U{ord(char):08x}"

    return '"' + "".join(map(escape, text)) + '"'
