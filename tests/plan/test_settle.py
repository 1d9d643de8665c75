"""One rule for all flags: several sources may speak, they may not disagree."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning.fabric._plan import Claim, Part, Settled, settle

DEFAULT = Settled("default value", "default")


def test_no_claim_gives_the_default() -> None:
    assert settle("x", Claim("a", None), Claim("b", None), default=DEFAULT) is DEFAULT


def test_the_first_of_equal_claims_is_the_reason() -> None:
    claims = Claim("a", None), Claim("b", 1), Claim("c", 1)
    assert settle("x", *claims, default=DEFAULT) == Settled(1, "b")


def test_zero_and_false_are_claims() -> None:
    assert settle("x", Claim("a", 0), default=DEFAULT) == Settled(0, "a")
    assert settle("x", Claim("a", False), default=DEFAULT) == Settled(False, "a")


def test_a_conflict_names_the_flag_and_both_sources() -> None:
    with pytest.raises(ValueError, match=r"^x is set twice: a says 1, b says 'two'\. Keep one of them\.$"):
        settle("x", Claim("a", 1), Claim("b", "two"), default=DEFAULT)


def test_two_objects_are_a_conflict_even_if_they_look_alike() -> None:
    with pytest.raises(ValueError, match="set twice"):
        settle("x", Claim("a", Part("IO")), Claim("b", Part("IO")), default=DEFAULT)


@given(st.lists(st.none() | st.integers(0, 1)))
def test_it_raises_exactly_if_two_claims_differ(values: list[int | None]) -> None:
    claims = [Claim(f"source {i}", value) for i, value in enumerate(values)]
    said = {value for value in values if value is not None}
    if len(said) > 1:
        with pytest.raises(ValueError, match="set twice"):
            settle("x", *claims, default=DEFAULT)
    else:
        assert settle("x", *claims, default=DEFAULT).value == (said.pop() if said else DEFAULT.value)
