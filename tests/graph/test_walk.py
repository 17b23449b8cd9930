"""Node-by-node evaluation of a frozen network."""

import torch
from support import networks

from gdfq.graph.capture import Captured
from gdfq.graph.walk import PartsInterpreter, Walk


def test_walk_computes_the_network_and_frees_values(teacher: Captured) -> None:
    batch = networks.images(3)
    walk = Walk(teacher.network)
    held = []
    for visit in walk.visits(batch):
        held.append(len(walk.env))
        last = visit
    assert last.value.equal(teacher.network(batch))
    assert max(held) < len(teacher.network.graph.nodes)


def test_parts_that_join_later_pass_the_nodes_before_alone(teacher: Captured) -> None:
    batch = networks.images(5)
    names = [node.name for node in teacher.network.graph.nodes if node.op == "call_function"]
    joins = names[len(names) // 2]
    present, last = [], {}
    passing = PartsInterpreter(teacher.network).nodes_of_parts(
        [(batch[:2],)], {joins: [(batch[2:4],), (batch[4:],)]}
    )
    for node, envs in passing:
        if node.op == "call_function":
            present.append(len(envs))
            last = {i: env[node] for i, env in enumerate(envs)}
    before = names.index(joins)
    assert present == [1] * before + [3] * (len(names) - before)
    torch.testing.assert_close(torch.cat(list(last.values())), teacher.network(batch))
