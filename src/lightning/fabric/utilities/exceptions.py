"""The error for a wrong configuration."""


class MisconfigurationException(ValueError):
    """The script asks for something that does not fit together, or that this machine does not have."""
