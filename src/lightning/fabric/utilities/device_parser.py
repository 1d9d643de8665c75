"""What ``devices=`` means: pure functions of the value and of how many devices there are."""

import re
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException


def parse_cpu_devices(devices: Any) -> int:
    """Return the number of processes: ``devices`` is a positive ``int``, or a string of one."""
    if devices == "auto":
        return 1
    value = int(devices) if isinstance(devices, str) and re.fullmatch(r"\s*[+-]?\d+\s*", devices) else devices
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"devices={devices!r}: on CPU, `devices` is the number of processes, an int of 1 or more.")
    if value < 1:
        raise MisconfigurationException(f"devices={devices!r}: on CPU, the number of processes must be 1 or more.")
    return value


def parse_gpu_devices(devices: Any, available: int, kind: str = "CUDA") -> list[int]:
    """Return the indices of the GPUs that ``devices`` asks for, out of ``range(available)``.

    ``3`` or ``"3"`` is a count, ``[1, 3]``, ``"1, 3"`` or ``"3,"`` are indices, ``-1``, ``[-1]`` or ``"auto"`` are all.

    Raises:
        TypeError: neither of these forms.
        MisconfigurationException: none, or more than there are, or one twice.
    """
    wanted = _parse_string(devices) if isinstance(devices, str) else devices
    if isinstance(wanted, (list, tuple)) and all(_is_int(index) for index in wanted):
        wanted = -1 if list(wanted) == [-1] else list(wanted)
    elif not _is_int(wanted):
        raise TypeError(
            f"devices={devices!r}: `devices` must be a number of devices, a list of device indices, a string of "
            "either, or 'auto'."
        )
    if wanted in (0, []):
        raise MisconfigurationException(f"devices={devices!r} asks for no device. Ask for at least one.")
    if available < 1:
        raise MisconfigurationException(f"devices={devices!r} asks for {kind} devices, but this machine has none.")
    if isinstance(wanted, int):
        return _first(wanted, devices, available, kind)
    return _check_indices(wanted, devices, available, kind)


def parse_mps_devices(devices: Any, available: int) -> list[int]:
    """Return ``[0]``: MPS has one device. Same forms and errors as :func:`parse_gpu_devices`."""
    return parse_gpu_devices(devices, available, kind="MPS")


def parse_tpu_devices(devices: Any, available: int) -> int | list[int]:
    """Return the number of cores (1 or all) or a list with the index of one core; ``TypeError`` for anything else."""
    wanted = _parse_string(devices) if isinstance(devices, str) else devices
    if _is_int(wanted):
        count = available if wanted == -1 else wanted
        if count in (1, available) and count > 0:
            return count
    elif isinstance(wanted, (list, tuple)) and len(wanted) == 1 and wanted[0] in range(available):
        return list(wanted)
    raise TypeError(
        f"devices={devices!r}: on TPU, `devices` must be 1, the number of cores that this machine has ({available}), "
        "or a list with the index of one of them."
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _parse_string(text: str) -> int | list[int]:
    if text.strip() == "auto":
        return -1
    try:
        if "," in text:
            return [int(index) for index in text.split(",") if index.strip()]
        return int(text)
    except ValueError:
        raise MisconfigurationException(
            f"devices={text!r} is neither a number nor a list of indices. Write '3' for three devices, '0,2' or '3,' "
            "for the devices with these indices, or 'auto'."
        ) from None


def _first(count: int, devices: Any, available: int, kind: str) -> list[int]:
    if count < -1:
        raise MisconfigurationException(f"devices={devices!r} is negative. Only -1, which means all, can be.")
    if count > available:
        raise MisconfigurationException(
            f"devices={devices!r} asks for more than the {available} {kind} device(s) this machine has."
        )
    return list(range(available if count == -1 else count))


def _check_indices(indices: list[int], devices: Any, available: int, kind: str) -> list[int]:
    if len(set(indices)) < len(indices):
        raise MisconfigurationException(f"devices={devices!r} names a device twice. Each index may appear once.")
    if missing := [index for index in indices if index not in range(available)]:
        raise MisconfigurationException(
            f"devices={devices!r} asks for index {', '.join(map(str, missing))}, but this machine has the {kind} "
            f"device(s) {', '.join(map(str, range(available)))}."
        )
    return indices
