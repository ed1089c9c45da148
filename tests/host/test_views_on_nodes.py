"""The small players that nodes with views carry, over changes of the graph that is shown."""

import pytest
from view_pages import load_at, prepared, run

FRAMES = 5
GRAPH = {
    "1": {
        "class_type": "TurnaroundSamplePerformer",
        "inputs": {
            "performer": "kira (unseen)", "motion": "dance_a (unseen)", "frames": FRAMES,
            "width": 128, "height": 160, "start": 0.2, "clothes_seed": 3,
        },
    },
    "2": {"class_type": "TurnaroundPreviewViews", "inputs": {"views": ["1", 0], "moments": 2}},
}  # fmt: skip
SIZE = "() => [...window.app.graph.getNodeById(1).size]"
COME_BACK = """async () => {
  const outputs = window.app.nodeOutputs;
  await window.app.loadGraphData(window.app.graph.serialize());
  window.app.nodeOutputs = outputs;
}"""
IS_OPEN = "() => document.querySelectorAll('.turnaround-views canvas').length === 2"


@pytest.fixture(scope="module")
def page(open_page):
    page = open_page(prepare=prepared())
    load_at(page, GRAPH, {1: {"pos": [100, 130]}, 2: {"pos": [800, 130], "size": [500, 500]}})
    run(page, "views")
    page.wait_for_function(IS_OPEN)
    yield page
    page.close()


def test_a_graph_that_comes_back_has_its_nodes_in_their_old_size(page):
    """Another tab of the page and undo load the graph anew: each made the node a player taller."""
    before = page.evaluate(SIZE)
    for _ in range(2):
        page.evaluate(COME_BACK)
        page.wait_for_function(IS_OPEN)
        assert page.evaluate(SIZE) == pytest.approx(before, abs=2)


def test_folding_after_coming_back_gives_the_room_back(page):
    page.evaluate(COME_BACK)
    page.wait_for_function(IS_OPEN)
    height = page.evaluate(SIZE)[1]
    page.locator(".turnaround-views .head").click()
    assert page.evaluate(SIZE)[1] < height - 150
