"""Every cell of the table of what goes together runs, or is refused as it is written down; and the page says so."""

import re
from itertools import product
from typing import Any

import pytest
from tests import support_table
from tests.support_table import (
    COLUMNS,
    DTYPES,
    PAGE,
    REFUSED,
    ROWS,
    TOLERANCE_OF_BF16,
    TOLERANCES,
    WAYS,
    Outcome,
    complaints,
    plain,
    planned,
    refusal_of,
)

from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.plugins.precision._table import PRECISIONS
from lightning.fabric.strategies._table import STRATEGIES
from lightning.fabric.utilities.imports import package_available
from lightning.fabric.utilities.registry import class_of

_PACKAGES = ("torchao", "bitsandbytes", "deepspeed")
_missing = [name for name in _PACKAGES if not package_available(name)]
_all_packages = pytest.mark.skipif(
    bool(_missing) or package_available("transformer_engine"),
    reason=f"the table is that of a machine with {', '.join(_PACKAGES)}, and without transformer_engine",
)

_REWRITE = "python -m tests.support_table --write"


@_all_packages
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", WAYS)
def test_every_cell_is_as_expected(strategy: str) -> None:
    found = complaints(strategy)
    assert not found, f"{len(found)} of {strategy}:\n" + "\n".join(found)


@_all_packages
@pytest.mark.slow
@pytest.mark.timeout(900)  # where it runs alone, and so all cells
def test_the_page_is_what_the_run_gives() -> None:
    page = support_table.page(support_table.everything())
    assert page == PAGE.read_text(encoding="utf-8"), f"{PAGE.name} is out of date. Write it: {_REWRITE}"


# ---- that the table is whole, and that it could fail -----------------------------------------------------------------


def test_every_strategy_is_in_the_table_or_differs_from_one_by_options() -> None:
    run = {class_of(STRATEGIES[name]) for name in WAYS if name in STRATEGIES}
    assert {class_of(entry) for entry in STRATEGIES.values()} == run
    for name, entry in STRATEGIES.items():
        same = next(STRATEGIES[run] for run in WAYS if run in STRATEGIES and STRATEGIES[run].target == entry.target)
        assert (entry.precisions, entry.precision, entry.runs_on) == (same.precisions, same.precision, same.runs_on), (
            name
        )
    assert set(PRECISIONS) <= set(ROWS)


def test_every_refusal_that_is_written_down_is_met() -> None:
    for refusal in REFUSED:
        cells = [cell for cell in product(WAYS, ROWS, COLUMNS) if refusal_of(*cell) is refusal]
        assert cells, refusal


@pytest.mark.parametrize(
    ("precision", "family"), [(precision, family) for family in DTYPES for precision in DTYPES[family]]
)
def test_what_a_cell_is_looked_at_for_changes_its_result(precision: str, family: str) -> None:
    if precision.startswith("bitsandbytes") and "bitsandbytes" in _missing:
        pytest.skip("needs bitsandbytes")
    allowed = TOLERANCES.get(precision, TOLERANCE_OF_BF16)
    whole = plain(precision, family)
    others = {
        "clip norm": plain(precision, family, clip="clip norm"),
        "clip value": plain(precision, family, clip="clip value"),
        "half of the batch": plain(precision, family, batches="half"),
    }
    for name, other in others.items():
        # of as few rows as a rank compares
        assert (whole - other)[:16].abs().max() > allowed, name
    assert (others["clip norm"] - others["clip value"])[:16].abs().max() > allowed


def test_a_cell_that_differs_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    ran, refused = (
        Outcome("32-true", "joint"),
        Outcome("32-true", "joint", "the step", "RuntimeError", "some of torch's"),
    )
    told = {
        (ran,): [],
        (refused,): ["32-true, joint: raises RuntimeError at the step: some of torch's"],
        (Outcome("32-true", "joint", wrong=("it is blue", "it is late")),): [
            "32-true, joint: it is blue",
            "32-true, joint: it is late",
        ],
        (ran, refused): [f"32-true, joint: is other on rank 1 than on rank 0: {refused}"],
    }
    for outcomes, sentences in told.items():
        monkeypatch.setattr(support_table, "by_ranks", lambda _, of=outcomes: [[outcome] for outcome in of])
        assert complaints("ddp") == sentences
    monkeypatch.setattr(support_table, "by_ranks", lambda _: [[Outcome("64-true", "joint")]])
    assert complaints("deepspeed_stage_1") == ["64-true, joint: runs, but is to raise ValueError at construction"]
    other = Outcome("64-true", "joint", "construction", "ValueError", "no.")
    monkeypatch.setattr(support_table, "by_ranks", lambda _: [[other]])
    assert complaints("deepspeed_stage_1") == [
        "64-true, joint: raises ValueError at construction: no., and not ValueError at construction with 'It can in: '"
    ]


# ---- accelerators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerator", support_table.MACHINES)
def test_what_construction_refuses_names_what_works(accelerator: str) -> None:
    names = [name for name in support_table.ENTRIES if "deepspeed" not in name or "deepspeed" not in _missing]
    rows = [row for row in ROWS if not _needs_missing(row)]
    said = {(name, row): planned(accelerator, name, row) for name in names for row in rows}
    for cell, text in said.items():
        assert not text or re.match(r"(ValueError|TypeError): .*(Use |It can in: |Pass |must be one of )", text), (
            cell,
            text,
        )
    accepted = {name for (name, row), text in said.items() if row == "32-true" and not text}
    runs_on = {name for name, entry in support_table.ENTRIES.items() if accelerator in (entry.runs_on or [accelerator])}
    assert accepted == runs_on & set(names)


def _needs_missing(row: str) -> bool:
    return any(package in _missing and row.startswith(start) for package, start in _ROW_OF.items())


_ROW_OF = {"torchao": "float8", "bitsandbytes": "bitsandbytes"}


# ---- plug-ins of another device --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["single_device", "dp", "ddp", "fsdp"])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_a_plug_in_that_would_do_nothing_is_refused(strategy: str, precision: Any) -> None:
    with pytest.raises(ValueError, match="would do nothing on 'cpu'. Pass device='cpu'"):
        Fabric(accelerator="cpu", devices=1, strategy=strategy, plugins=MixedPrecision(precision, "cuda"))
