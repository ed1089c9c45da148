"""The widgets of a page in Chinese: every word that is shown or read out is Chinese."""

import pytest
import view_pages as pages

GRAPH = {
    "1": {
        "class_type": "TurnaroundRigEditor",
        "inputs": {"cameras": "0 0 3.2 # mine\n90 0 3.2\n180 0 3.2", "fov": 35, "width": 192, "height": 240},
    },
    "2": {"class_type": "TurnaroundPreviewViews", "inputs": {"moments": 2}},
    "3": {"class_type": "TurnaroundPreviewAvatar", "inputs": {"camera": "", "width": 320, "height": 400}},
    "4": {"class_type": "TurnaroundPreviewCloud", "inputs": {"max_points": 1000}},
}  # fmt: skip
WIDGETS = ("turnaround-rig", "turnaround-views", "turnaround-avatar", "turnaround-cloud")
KEPT = {
    "Ctrl", "Home", "End", "Escape", "Shift", "Delete", "PNG", "Use", "camera", "width", "height", "fov",
    "mine",  # a camera's name
}  # fmt: skip
"""Names of keys, of sockets and of files."""
WORDS = """name => {
  const root = document.querySelector('.' + name);
  const found = [];
  for (const each of [root, ...root.querySelectorAll('*')]) {
    for (const key of ['title', 'aria-label', 'placeholder', 'data-short', 'label']) {
      if (each.getAttribute(key)) found.push(each.getAttribute(key));
    }
    for (const child of each.childNodes) {
      if (child.nodeType === 3 && child.data.trim() && each.tagName !== 'TEXTAREA') found.push(child.data.trim());
    }
  }
  return found;
}"""


@pytest.fixture(scope="module", params=["classic", "vue"])
def page(request, open_page):
    settings = {"Comfy.Locale": "zh", "Comfy.VueNodes.Enabled": request.param == "vue"}
    page = open_page(1900, 900, pages.prepared("", **settings))
    pages.load(page, GRAPH, shown=4)
    page.wait_for_selector(".turnaround-rig [data-camera]")
    yield page
    page.close()


def is_english(text: str) -> bool:
    words = "".join(c if c.isascii() and c.isalpha() else " " for c in text).split()
    return any(len(word) > 2 and word not in KEPT for word in words)


@pytest.mark.parametrize("name", WIDGETS)
def test_all_that_is_said_is_chinese(page, name):
    if name == "turnaround-rig":
        page.locator(".turnaround-rig [data-deed=all]").dispatch_event("click")
    said = page.evaluate(WORDS, name)
    assert sum(any("\u4e00" <= c <= "\u9fff" for c in text) for text in said) >= 10
    assert [text for text in said if is_english(text)] == []


def test_the_setting_is_chinese(page):
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("Turnaround", exact=True).first.click()
    dialog.get_by_text("节点上的视角").wait_for(timeout=10_000)
    dialog.get_by_text("多视角播放器").wait_for(timeout=10_000)
    dialog.get_by_text("有空位时展开").first.wait_for(timeout=10_000)
    page.keyboard.press("Escape")


def test_nothing_of_ours_complained(page):
    assert pages.problems(page) == []
