"""The subgraph blueprints: served, fitting the nodes that there are, joined by clicking, run."""

import json
import urllib.request

import pytest
from blueprint_chain import FOLDER, definition, join_blueprints, read

BLUEPRINTS = sorted(FOLDER.glob("*.json"))
EDGES = (-10, -20)
"""The ids of a subgraph's own inputs and outputs."""


@pytest.fixture(scope="module")
def page(open_page, server):
    settings = {"Comfy.TutorialCompleted": True}  # so that no templates are opened over the graph
    page = open_page(
        prepare=lambda page: page.request.post(server.url + "/settings", data=settings)
    )
    yield page
    page.close()


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda p: p.stem)
def test_blueprint_is_served(server, dev, path):
    listed = server.get("/global_subgraphs")
    (key,) = (k for k, entry in listed.items() if entry["name"] == path.stem)
    assert listed[key]["info"]["node_pack"].endswith(dev.PACK_FOLDER)
    with urllib.request.urlopen(f"{server.url}/global_subgraphs/{key}", timeout=10) as answer:
        assert json.loads(json.load(answer)["data"]) == read(path)


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda p: p.stem)
def test_blueprint_fits_the_running_schema(object_info, fits_schema, path):
    inside = definition(path)
    order = ("origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = {link["id"]: [link[k] for k in order] for link in inside["links"]}
    within = [x for x in links.values() if x[0] not in EDGES and x[2] not in EDGES]
    fits_schema(inside["nodes"], within, object_info)
    nodes = {node["id"]: node for node in inside["nodes"]}
    for k, slot in enumerate(inside["inputs"]):
        assert slot["linkIds"]
        for link in slot["linkIds"]:
            source, at, target, socket, kind = links[link]
            assert (source, at, kind) == (EDGES[0], k, slot["type"])
            assert nodes[target]["inputs"][socket]["link"] == link
            assert nodes[target]["inputs"][socket]["type"] == kind
    for k, slot in enumerate(inside["outputs"]):
        source, at, target, socket, kind = links[slot["linkIds"][0]]
        assert (target, socket) == (EDGES[1], k)
        assert object_info[nodes[source]["type"]]["output"][at] == kind == slot["type"]


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda p: p.stem)
def test_the_one_node_of_a_blueprint_is_its_subgraph(path):
    whole, inside = read(path), definition(path)
    (node,) = whole["nodes"]
    assert node["type"] == inside["id"] and node["title"] == inside["name"] == path.stem
    assert [(i["name"], i["type"]) for i in node["inputs"]] == [
        (i["name"], i["type"]) for i in inside["inputs"]
    ]
    assert [(o["name"], o["type"]) for o in node["outputs"]] == [
        (o["name"], o["type"]) for o in inside["outputs"]
    ]
    assert whole["extra"]["BlueprintDescription"] == inside["description"]


def test_blueprints_join_to_a_chain_that_runs(page, server, tmp_path):
    page.problems.clear()
    prompt = join_blueprints(page)
    entry = server.wait(server.queue(prompt), seconds=300)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    page.screenshot(path=tmp_path / "chain.png")
    saved = next(i for i, n in prompt.items() if n["class_type"] == "TurnaroundSaveViews")
    (file,) = entry["outputs"][saved]["images"]
    written = server.base / file["type"] / file["subfolder"] / file["filename"]
    assert written.suffix == ".mp4" and written.stat().st_size > 1000
    assert [p for p in page.problems if "Turnaround" in p] == []
