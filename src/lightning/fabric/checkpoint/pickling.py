"""What of a state pickles, and what of it loading reads back by default."""

import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.warnings import PossibleUserWarning


@contextmanager
def naming_the_key(checkpoint: Mapping[str, Any]) -> Iterator[None]:
    """If something does not pickle, say under which key it is."""
    try:
        yield
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        key = next((key for key, value in checkpoint.items() if not _pickles(value)), None)
        if key is None:
            raise
        raise type(error)(f"state[{key!r}] does not pickle: {error}") from error


class _WithoutTensors(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return "" if isinstance(obj, Tensor) else None


def _pickles(value: Any) -> bool:
    try:
        _WithoutTensors(io.BytesIO()).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


_INNOCENT = (
    str,
    int,
    float,
    bool,
    complex,
    bytes,
    type(None),
    Tensor,
    nn.Parameter,
    torch.Size,
    torch.dtype,
    torch.device,
)
_refused_by_default: dict[type, bool] = {}


def warn_of_what_loading_refuses(checkpoint: Mapping[str, Any]) -> None:
    """Of each type once, when it is saved and not when it is needed."""
    for key, top in checkpoint.items():
        waiting = [top]
        while waiting:
            value = waiting.pop()
            kind = type(value)
            if kind in _INNOCENT:
                continue
            if kind in (dict, OrderedDict):
                waiting.extend(value.values())
            elif kind in (list, tuple, set):
                waiting.extend(value)
            elif kind not in _refused_by_default:
                _refused_by_default[kind] = _is_refused_by_default(value)
                if _refused_by_default[kind]:
                    rank_zero_warn(
                        f"state[{key!r}] has a {kind.__module__}.{kind.__qualname__}, which is read back only with "
                        "`weights_only=False`, because reading it runs code. Save plain values, as in "
                        "`float(value)` or `value.tolist()`, or allow the class: "
                        "`torch.serialization.add_safe_globals`.",
                        category=PossibleUserWarning,
                    )


def _is_refused_by_default(value: Any) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError:
        return True
    except Exception:  # it does not pickle, or its own code fails: saving or loading it will say so
        return False
    return False
