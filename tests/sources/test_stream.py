"""The feed of batches."""

import torch

from gdfq.sources.base import Batch
from gdfq.sources.stream import Feed, Stream


def test_feed_has_examples_before_the_first_batch_is_taken() -> None:
    def numbered(count: int) -> Stream:
        def make(step: int) -> Batch:
            return Batch((torch.full((40, 1), float(step)),), None, None)

        return Stream(make, count, [])

    feed = Feed(numbered(5), torch.device("cpu"))
    feed.begin()
    assert feed.taken == 0
    (examples,) = feed.examples
    assert examples.shape == (32, 1)
    assert examples.eq(0).all()
    stopped = feed.state_dict()
    resumed = Feed(numbered(5), torch.device("cpu"))
    without_state = Feed(iter(list(numbered(5))), torch.device("cpu"))
    for again in (resumed, without_state):
        again.load_state_dict(stopped)
    for again in (feed, resumed, without_state):
        again.begin()  # nothing is taken twice
        assert [float(batch.images[0]) for batch in again.until(3)] == [0, 1, 2]
        assert [float(batch.images[0]) for batch in again.until(9)] == [3, 4]
        assert again.taken == 5
