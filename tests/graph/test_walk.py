"""Node-by-node evaluation of a frozen network."""

from support import networks

from gdfq.graph.capture import Captured
from gdfq.graph.walk import Walk


def test_walk_computes_the_network_and_frees_values(teacher: Captured) -> None:
    batch = networks.images(3)
    walk = Walk(teacher.network)
    held = []
    for visit in walk.visits(batch):
        held.append(len(walk.env))
        last = visit
    assert last.value.equal(teacher.network(batch))
    assert max(held) < len(teacher.network.graph.nodes)
