"""The check of shapes at run time: of functions that say a shape, and of those only."""

from beartype import beartype


def checked(function):
    """``function`` with its arguments and its result checked, if its signature names a shape."""
    hints = getattr(function, "__annotations__", {}).values()
    return beartype(function) if any("Tensor, '" in str(hint).replace('"', "'") for hint in hints) else function
