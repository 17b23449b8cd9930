"""Pages that are written from the result files agree with them."""

import json

from benchmarks import tables, zoo


def test_page_of_benchmarks_is_that_of_the_results() -> None:
    assert tables.PAGE.read_text() == tables.page()


def test_table_of_networks_is_that_of_the_results() -> None:
    written = zoo.PAGE.read_text().partition(zoo.MARK)[2]
    assert written.strip() == zoo.table(json.loads(zoo.FILE.read_text()))
