"""Graphs as JSON."""

import json

import torch
from support import networks

from gdfq.deploy.graph_json import graph_from_json, graph_to_json
from gdfq.graph.capture import Captured
from gdfq.graph.tensors import tensors_of


def test_graph_round_trips_through_json(any_teacher: Captured) -> None:
    network = any_teacher.network
    text = json.dumps(graph_to_json(network.graph), allow_nan=False)
    again = graph_from_json(json.loads(text), tensors_of(network))
    x = networks.images(3)
    assert torch.equal(again(x), network(x))
