"""The list of allowed operators."""

from gdfq.graph import operators


def test_allowed_operators_exist() -> None:
    for name in operators.ALLOWED:
        assert callable(operators.resolve(name))
