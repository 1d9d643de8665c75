"""The page `docs/explain.md` shows what is printed now."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def example():
    """The script that writes the page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        spec = importlib.util.spec_from_file_location("explain_example", ROOT / "examples" / "explain.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "explain_example", module)
        spec.loader.exec_module(module)
        yield module


def test_the_page_has_every_section(example):
    page = (ROOT / "docs" / "explain.md").read_text()
    titles = [
        line.removeprefix("## ") for line in page.partition(example.MARK)[2].splitlines() if line.startswith("## ")
    ]
    assert titles == [f"{case.title}, {case.ranks} rank{'s' * (case.ranks > 1)}" for case in example.CASES]


@pytest.mark.parametrize("title", ["One process", "FSDP"])
def test_the_page_is_up_to_date(example, title):
    (case,) = (case for case in example.CASES if case.title == title)
    assert f"\n```\n{example.section(case)}\n```\n" in (ROOT / "docs" / "explain.md").read_text()
