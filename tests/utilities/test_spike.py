import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning.fabric.utilities.spike import SpikeDetection, TrainingSpikeException


class _Strategy:
    """One rank; ``others_say`` is what another rank thinks."""

    others_say = False

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision or self.others_say

    def barrier(self, name: str | None = None) -> None:
        pass


@pytest.fixture
def fabric() -> Any:
    return SimpleNamespace(strategy=_Strategy(), is_global_zero=True)


def _run(detection: SpikeDetection, fabric: Any, losses: list[float]) -> int | None:
    """Return the batch that was found, if any."""
    try:
        for index, loss in enumerate(losses):
            detection.on_train_batch_end(fabric, torch.tensor(loss), None, index)
    except TrainingSpikeException as found:
        return found.batch_idx
    return None


@pytest.mark.parametrize(
    ("options", "losses", "found"),
    [
        ({}, [1.0, 1.1, 0.9, 1.0, 50.0, 1.0], 4),
        ({}, [1.0, 1.1, 0.9, 2.0], None),
        ({"rtol": 0.5}, [1.0, 1.0, 1.6], 2),
        ({"rtol": None, "atol": 3}, [1.0, 3.0, 2.0, 5.5], 3),
        ({"rtol": 0.5, "atol": 3}, [1.0, 1.0, 1.6], None),
        ({}, [1.0, -50.0], None),
        ({"mode": "max"}, [1.0, -50.0], 1),
        ({"mode": "max"}, [1.0, 50.0], None),
        ({}, [1.0, float("nan")], 1),
        ({"finite_only": False}, [1.0, float("nan"), 1.0, 50.0], 3),
        ({"warmup": 3}, [1.0, float("inf"), 50.0, 60.0], None),
        ({"window": 2}, [100.0, 1.0, 1.0, 90.0], 3),
        ({"window": 4}, [100.0, 1.0, 1.0, 90.0], None),
    ],
)
def test_what_is_a_spike(
    options: dict[str, Any], losses: list[float], found: int | None, fabric: Any, tmp_path: Path
) -> None:
    assert _run(SpikeDetection(exclude_batches_path=tmp_path, **options), fabric, losses) == found


def test_the_batches_to_skip_are_written_down(fabric: Any, tmp_path: Path) -> None:
    detection = SpikeDetection(exclude_batches_path=tmp_path / "new")
    assert _run(detection, fabric, [1.0, 1.0, 99.0]) == 2
    assert json.loads((tmp_path / "new" / "skip_batches.json").read_text()) == [1, 2]
    resumed = SpikeDetection(exclude_batches_path=tmp_path / "named.json")
    resumed.load_state_dict(detection.state_dict())
    with pytest.raises(TrainingSpikeException, match="batch 8"):
        resumed.on_train_batch_end(fabric, 99.0, None, 8)
    assert json.loads((tmp_path / "named.json").read_text()) == [1, 2, 8]


def test_a_spike_elsewhere_stops_this_rank_too(fabric: Any, tmp_path: Path) -> None:
    fabric.strategy.others_say, fabric.is_global_zero = True, False
    assert _run(SpikeDetection(exclude_batches_path=tmp_path), fabric, [1.0]) == 0
    assert not list(tmp_path.iterdir()), "rank 0 writes"


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="'min' or 'max'"):
        SpikeDetection(mode="mean")  # type: ignore[arg-type]
