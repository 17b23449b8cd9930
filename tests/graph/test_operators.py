"""The list of allowed operators."""

from gdfq.graph import operators


def test_every_allowed_operator_exists():
    for name in operators.ALLOWED:
        assert callable(operators.resolve(name))
