"""Narrow the type of a value, and fail where it is of another: for tests and measurements."""

from typing import TypeVar

T = TypeVar("T")


def present(value: T | None) -> T:
    """The value, which must not be None."""
    assert value is not None, "expected a value; got None"
    return value


def instance(value: object, kind: type[T]) -> T:
    """The value, which must be an instance of `kind`."""
    assert isinstance(value, kind), f"expected {kind.__name__}; got {type(value).__name__}"
    return value
