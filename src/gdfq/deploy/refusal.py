"""Which operators of a network a runtime has no form for."""

from collections.abc import Callable
from collections.abc import Set as AbstractSet

from torch import fx

from gdfq.graph import queries
from gdfq.graph.operators import name_of, short_name

IsSupported = Callable[[fx.Node, AbstractSet[fx.Node]], bool]
"""An operator, and the nodes before it that depend on constants alone -> whether it has a form."""


def refused(graph: fx.Graph, is_supported: IsSupported) -> list[str]:
    """Return the operators that have no form, each with its layer or node: `max_1 (max)`.

    What depends on constants alone is computed when a file is written, and so not judged.

    Args:
        graph: The graph of a teacher or of an integer network.
        is_supported: Judges an operator.
    """
    constants: set[fx.Node] = set()
    found = []
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (sources and constants.issuperset(sources)):
            constants.add(node)
        elif node.op == "call_function" and not is_supported(node, constants):
            name = queries.layer_name(node) if queries.has_weight(node) else node.name
            found.append(f"{name} ({short_name(node) or name_of(node)})")
    return found
