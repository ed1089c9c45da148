"""A calibration comes from the creator's disk by a click on Rig from File."""

import json

import pytest
from view_pages import load_at, prepared

CALIBRATION = """[left]
size = [96, 128]
matrix = [[110.0, 0.0, 44.5], [0.0, 105.0, 69.5], [0.0, 0.0, 1.0]]
rotation = [0.0, 0.0, 0.0]
translation = [0.0, 0.0, 3.0]
distortions = [0.0, 0.0, 0.0, 0.0, 0.0]
"""
GRAPH = {
    "1": {"class_type": "TurnaroundRigFromFile", "inputs": {"recentre": True}},
    "2": {"class_type": "TurnaroundPreviewRig", "inputs": {"rig": ["1", 0]}},
    "3": {"class_type": "TurnaroundRigFromFile", "inputs": {"recentre": False}},
}
PLACES = {
    1: {"pos": [150, 140], "size": [340, 160]},
    2: {"pos": [560, 140], "size": [260, 260]},
    3: {"pos": [150, 420], "size": [340, 160]},
}
LABEL = "choose a file to upload"
BUTTON = """() => {
  const node = app.graph.getNodeById(1), widget = node.widgets.find(w => w.type === 'button');
  const { offset, scale } = app.canvas.ds, box = app.canvas.canvas.getBoundingClientRect();
  const x = node.pos[0] + node.size[0] / 2, y = node.pos[1] + widget.last_y + 10;
  return [box.x + (x + offset[0]) * scale, box.y + (y + offset[1]) * scale];
}"""
FILES = """() => [1, 3].map(id => {
  const { value, options } = app.graph.getNodeById(id).widgets.find(w => w.name === 'file');
  return [value ?? null, [...options.values]];
})"""


def upload(page, is_vue: bool, file: dict) -> None:
    with page.expect_file_chooser() as chooser:
        if is_vue:
            page.get_by_role("button", name=LABEL).first.click()
        else:
            page.mouse.click(*page.evaluate(BUTTON))
    chooser.value.set_files(file)


def toml(name: str, text: str = CALIBRATION) -> dict:
    return {"name": name, "mimeType": "application/toml", "buffer": text.encode()}


@pytest.mark.parametrize("is_vue", [False, True], ids=["classic", "vue"])
def test_a_click_brings_a_calibration_into_the_graph(open_page, server, is_vue):
    page = open_page(1300, 800, prepared(**{"Comfy.VueNodes.Enabled": is_vue}))
    load_at(page, GRAPH, PLACES)
    page.wait_for_timeout(500)
    name = f"four cameras {is_vue}.toml"
    upload(page, is_vue, toml(name))
    page.wait_for_function(
        "name => app.graph.getNodeById(1).widgets.find(w => w.name === 'file').value === name",
        arg=name,
        timeout=10_000,
    )
    (_, own), (_, others) = page.evaluate(FILES)
    assert own.count(name) == others.count(name) == 1
    # The server takes it, and offers it to other pages.
    offered = server.get("/object_info")["TurnaroundRigFromFile"]["input"]["required"]["file"]
    assert name in json.dumps(offered, ensure_ascii=False)
    saved = page.evaluate("() => app.graph.serialize().nodes.find(n => n.id === 1).widgets_values")
    assert saved == [name, True]
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output['1'].inputs")
    assert prompt == {"file": name, "recentre": True}
    # What is no calibration is told, and changes nothing.
    upload(page, is_vue, toml("me.mp4"))
    page.get_by_text("me.mp4 is no calibration").wait_for(timeout=5_000)
    assert page.evaluate(FILES)[0][0] == name
    assert [p for p in page.problems if "rig_upload" in p] == []
    page.close()
