"""String enums that do not mind upper and lower case."""

from enum import Enum
from typing import Any


class LightningEnum(str, Enum):
    """An enum of strings: members equal, hash and look up by value whatever the case."""

    @classmethod
    def _missing_(cls, value: object) -> "LightningEnum | None":
        return cls.try_from_str(value) if isinstance(value, str) else None

    @classmethod
    def try_from_str(cls, value: str) -> "LightningEnum | None":
        """Return the member with this name or value, or ``None``."""
        wanted = value.lower()
        return next((member for member in cls if wanted in (member.name.lower(), member.value.lower())), None)

    @classmethod
    def from_str(cls, value: str) -> "LightningEnum":
        """Return the member with this name or value; ``ValueError`` if there is none."""
        if (member := cls.try_from_str(value)) is None:
            raise ValueError(f"{value!r} is not one of: {', '.join(member.value for member in cls)}.")
        return member

    def __eq__(self, other: Any) -> bool:
        if isinstance(other, Enum):
            other = other.value
        return isinstance(other, str) and self.value.lower() == other.lower()

    def __hash__(self) -> int:
        return hash(self.value.lower())

    def __str__(self) -> str:
        return str(self.value)
