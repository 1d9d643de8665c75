from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning.fabric.utilities.device_parser import (
    parse_cpu_devices,
    parse_gpu_devices,
    parse_mps_devices,
    parse_tpu_devices,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException

FOUR = 4


@pytest.mark.parametrize(
    ("devices", "indices"),
    [
        (3, [0, 1, 2]),
        (-1, [0, 1, 2, 3]),
        ([0], [0]),
        ([1, 3], [1, 3]),
        ((1, 3), [1, 3]),
        ("3", [0, 1, 2]),
        ("1, 3", [1, 3]),
        ("0,1", [0, 1]),
        ("3,", [3]),
        ("-1", [0, 1, 2, 3]),
        ("auto", [0, 1, 2, 3]),
        ([-1], [0, 1, 2, 3]),
        ("-1,", [0, 1, 2, 3]),
    ],
)
def test_gpu_indices(devices: Any, indices: list[int]) -> None:
    assert parse_gpu_devices(devices, FOUR) == indices


@pytest.mark.parametrize("devices", [True, 1.0, None, {0}, ["0", 1], [True], [[0]], object()])
def test_gpu_wrong_types(devices: Any) -> None:
    with pytest.raises(TypeError, match="devices="):
        parse_gpu_devices(devices, FOUR)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (8, "devices=8 asks for more than the 4 CUDA device"),
        (-2, "negative"),
        ([4], "index 4"),
        ([-2], "index -2"),
        ([0, -1], "index -1"),
        ([1, 1], "twice"),
        ("0,0", "twice"),
        ("x", "neither a number nor"),
        ("1.5", "neither a number nor"),
        ("", "neither a number nor"),
        (0, "no device"),
        ([], "no device"),
        ("0", "no device"),
        (",", "no device"),
    ],
)
def test_gpu_wrong_values(devices: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        parse_gpu_devices(devices, FOUR)


@pytest.mark.parametrize("devices", [1, -1, "auto", [0]])
def test_no_gpu_there(devices: Any) -> None:
    with pytest.raises(MisconfigurationException, match="this machine has none"):
        parse_gpu_devices(devices, 0)


@settings(deadline=None, max_examples=50)
@given(st.sets(st.integers(0, 15), min_size=1), st.integers(1, 16))
def test_a_list_and_its_string_mean_the_same(indices: set[int], available: int) -> None:
    as_list = sorted(indices)
    as_string = ",".join(map(str, as_list)) + ","
    if max(indices) < available:
        assert parse_gpu_devices(as_string, available) == parse_gpu_devices(as_list, available) == as_list
    else:
        with pytest.raises(MisconfigurationException):
            parse_gpu_devices(as_string, available)


@pytest.mark.parametrize(("devices", "count"), [(1, 1), (4, 4), ("2", 2), (" 3 ", 3), ("auto", 1)])
def test_cpu_processes(devices: Any, count: int) -> None:
    assert parse_cpu_devices(devices) == count


@pytest.mark.parametrize("devices", [[0], "0,1", "two", 1.5, True, None])
def test_cpu_takes_a_number_only(devices: Any) -> None:
    with pytest.raises(TypeError, match="number of processes"):
        parse_cpu_devices(devices)


@pytest.mark.parametrize("devices", [0, -1, "0", "-1"])
def test_cpu_takes_at_least_one_process(devices: Any) -> None:
    with pytest.raises(MisconfigurationException, match="1 or more"):
        parse_cpu_devices(devices)


@pytest.mark.parametrize("devices", [1, "1", [0], "0,", "auto", -1])
def test_mps_has_one_device(devices: Any) -> None:
    assert parse_mps_devices(devices, 1) == [0]


@pytest.mark.parametrize("devices", [2, [1], "0,1"])
def test_mps_has_not_more(devices: Any) -> None:
    with pytest.raises(MisconfigurationException, match="MPS"):
        parse_mps_devices(devices, 1)


@pytest.mark.parametrize(
    ("devices", "parsed"), [(1, 1), (8, 8), ("8", 8), (-1, 8), ("auto", 8), ([5], [5]), ("5,", [5])]
)
def test_tpu_cores(devices: Any, parsed: Any) -> None:
    assert parse_tpu_devices(devices, 8) == parsed


@pytest.mark.parametrize("devices", [2, 0, [8], [0, 1], [-1], True, None, 1.0])
def test_tpu_takes_one_core_or_all(devices: Any) -> None:
    with pytest.raises(TypeError, match="on TPU"):
        parse_tpu_devices(devices, 8)
