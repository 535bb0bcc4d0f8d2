"""The check of shapes at run time: of functions that say a shape, and of those only."""

import inspect

import jaxtyping
from beartype import beartype

jaxtyped = jaxtyping.jaxtyped


def says_a_shape(function) -> bool:
    hints = getattr(function, "__annotations__", {}).values()
    return any("Tensor, '" in str(hint).replace('"', "'") for hint in hints)


def checked(function):
    """``function`` with its arguments and its result checked, if its signature names a shape."""
    return beartype(function) if says_a_shape(function) else function


def where_said(*, typechecker):
    """``jaxtyped`` for what says a shape: around other functions it would check nothing, and take longer than they do."""
    wrap = jaxtyped(typechecker=typechecker)
    return lambda made: wrap(made) if says_a_shape(made.__init__ if inspect.isclass(made) else made) else made
