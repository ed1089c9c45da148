"""Checkpoints come whole, checked and into their place, whatever the network does."""

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from turnaround.models import fetch_checkpoint
from turnaround.models.checkpoints import Checkpoint
from turnaround.models.fetch_checkpoint import check_room, fetch, is_whole

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import small_hub  # noqa: E402  (a module beside the tests' folders)

constants = pytest.importorskip("huggingface_hub.constants")

BODY = save({"w": torch.arange(200_000, dtype=torch.float32)})
SHA = hashlib.sha256(BODY).hexdigest()
ITEM = Checkpoint("w.safetensors", "vae", "some/where", "split/vae", len(BODY), "CC0", SHA)
PART = f"w.safetensors.{SHA[:12]}.part"


@pytest.fixture
def hub(monkeypatch):
    with small_hub.running() as hub:
        hub.files["some/where/split/vae/w.safetensors"] = BODY
        small_hub.place(monkeypatch, hub.url)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**15)
        monkeypatch.setattr(fetch_checkpoint, "PAUSE", 0.0)
        yield hub


def nothing(*_):
    pass


def test_a_file_takes_its_name_when_it_is_whole(hub, tmp_path):
    seen = []
    path = fetch(ITEM, tmp_path / "new", lambda *bytes_: seen.append(bytes_))
    assert path == tmp_path / "new" / "w.safetensors" and path.read_bytes() == BODY
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]
    assert seen[-1] == (len(BODY), len(BODY)) and sorted(seen) == seen


def test_no_token_leaves_this_machine(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(ITEM, tmp_path, nothing)
    assert hub.asked and not any("hf_secret" in told for _, _, told in hub.asked)


def test_it_goes_on_by_itself_after_a_break(hub, tmp_path):
    hub.breaks_after = [300_000, 100_000]
    assert fetch(ITEM, tmp_path, nothing).read_bytes() == BODY
    ranges = [told for method, _, told in hub.asked if method == "GET" and told]
    assert len(set(ranges)) == 2 and all(
        0 < int(r.removeprefix("bytes=").rstrip("-")) <= 400_000 for r in ranges
    )


def test_a_later_try_goes_on_from_what_came(hub, tmp_path):
    (tmp_path / PART).write_bytes(BODY[:500_000])
    assert fetch(ITEM, tmp_path, nothing).read_bytes() == BODY
    assert {told for method, _, told in hub.asked if method == "GET"} == {"bytes=500000-"}
    assert not (tmp_path / PART).exists()


def test_a_connection_that_stays_broken_keeps_what_came(hub, tmp_path, monkeypatch):
    # The library waits a second before each of its tries.
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    hub.breaks_after = [400_000] + [0] * 100
    with pytest.raises(ValueError, match="connection broke .* goes on from where it was"):
        fetch(ITEM, tmp_path, nothing)
    assert 300_000 < (tmp_path / PART).stat().st_size <= 400_000
    assert not (tmp_path / "w.safetensors").exists()
    hub.breaks_after = []
    hub.asked.clear()
    assert fetch(ITEM, tmp_path, nothing).read_bytes() == BODY
    (told,) = {told for method, _, told in hub.asked if method == "GET"}
    assert int(told.removeprefix("bytes=").rstrip("-")) > 300_000


def test_a_server_without_ranges_sends_all_anew(hub, tmp_path):
    hub.knows_range = False
    (tmp_path / PART).write_bytes(BODY[:500_000])
    assert fetch(ITEM, tmp_path, nothing).read_bytes() == BODY


def test_a_part_that_is_too_long_is_no_part(hub, tmp_path):
    (tmp_path / PART).write_bytes(BODY + b"more")
    assert fetch(ITEM, tmp_path, nothing).read_bytes() == BODY


class Cancelled(Exception):
    pass


def test_cancel_acts_within_a_second_even_when_the_network_stalls(hub, tmp_path):
    hub.stalls.set()
    pressed = threading.Event()
    threading.Timer(0.8, pressed.set).start()

    def on_bytes(*_):
        if pressed.is_set():
            raise Cancelled

    begun = time.monotonic()
    with pytest.raises(Cancelled):
        fetch(ITEM, tmp_path, on_bytes)
    assert time.monotonic() - begun < 1.8
    assert not (tmp_path / "w.safetensors").exists()
    came = (tmp_path / PART).stat().st_size
    # The thread that waits for the network wakes up and writes nothing more.
    hub.stalls.clear()
    time.sleep(0.3)
    assert (tmp_path / PART).stat().st_size == came < len(BODY)
    assert fetch(ITEM, tmp_path, nothing).read_bytes() == BODY


def test_wrong_bytes_never_take_the_name(hub, tmp_path):
    hub.instead = bytes(len(BODY))
    with pytest.raises(ValueError, match="another checksum"):
        fetch(ITEM, tmp_path, nothing)
    assert list(tmp_path.iterdir()) == []


def test_another_file_than_the_table_knows_is_not_fetched(hub, tmp_path):
    hub.files["some/where/split/vae/w.safetensors"] = BODY[:-4] + b"evil"
    with pytest.raises(ValueError, match="is another file on the hub now"):
        fetch(ITEM, tmp_path, nothing)
    assert not [method for method, _, _ in hub.asked if method == "GET"]


def test_a_file_that_is_no_safetensors_never_takes_the_name(hub, tmp_path):
    hub.files["some/where/split/vae/w.safetensors"] = b"\x80\x02pickled" * 100
    item = Checkpoint("w.safetensors", "vae", "some/where", "split/vae", 900, "CC0")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        fetch(item, tmp_path, nothing)
    assert list(tmp_path.iterdir()) == []


def test_pickles_are_not_even_asked_for(hub, tmp_path):
    item = Checkpoint("w.pt", "vae", "some/where", "", 900, "CC0")
    with pytest.raises(ValueError, match="is not safetensors: get it by hand"):
        fetch(item, tmp_path, nothing)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (dict(status=401), "people with an account only"),
        (dict(status=403), "people with an account only"),
        (dict(status=500), "answered with 500"),
        (dict(files={}), "has no 'w.safetensors' any more"),
        (dict(hides_checksum=True), "tells no size and checksum"),
    ],
    ids=["gated", "forbidden", "broken", "gone", "no checksum"],
)
def test_troubles_of_the_hub_are_one_sentence(hub, tmp_path, trouble, words):
    for name, value in trouble.items():
        setattr(hub, name, value)
    with pytest.raises(ValueError, match=words) as caught:
        fetch(ITEM, tmp_path, nothing)
    assert "\n" not in str(caught.value)


def test_without_a_network_it_says_so(hub, tmp_path, monkeypatch):
    small_hub.place(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="could not be reached"):
        fetch(ITEM, tmp_path, nothing)


def test_offline_mode_is_respected(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        fetch(ITEM, tmp_path, nothing)
    assert hub.asked == []


def test_what_is_there_stays(hub, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(BODY)
    fetch(ITEM, tmp_path, nothing)
    (tmp_path / "w.safetensors").write_bytes(BODY[:-8])
    with pytest.raises(ValueError, match="damaged or not whole"):
        fetch(ITEM, tmp_path, nothing)
    assert hub.asked == [] and (tmp_path / "w.safetensors").read_bytes() == BODY[:-8]


def test_a_full_disk_is_told_before_the_first_byte(tmp_path, monkeypatch):
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=10**9))
    small = Checkpoint("a.safetensors", "vae", "a/b", "", 500_000_000, "CC0")
    other = Checkpoint("b.safetensors", "vae", "a/b", "", 400_000_000, "CC0")
    check_room({small: tmp_path / "x"})
    with pytest.raises(ValueError, match="900 MB are needed .* only 1 GB are free"):
        check_room({small: tmp_path / "x", other: tmp_path / "y"})
    # What came already needs no room any more.
    with (tmp_path / "x" / "a.safetensors.0123456789ab.part").open("wb") as part:
        part.truncate(300_000_000)
    check_room({small: tmp_path / "x", other: tmp_path / "y"})


def test_whole_files_are_told_from_their_header(tmp_path):
    path = tmp_path / "w.safetensors"
    for body, whole in ((BODY, True), (BODY[:-1], False), (b"", False), (b"PK\x03\x04" * 9, False)):
        path.write_bytes(body)
        assert is_whole(path) is whole


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="dev.py would make its .venv first")
def test_dev_py_fetches_from_the_hub_that_is_set(hub, tmp_path):
    """The library reads HF_ENDPOINT by itself; the file goes where `dev.py serve` finds it."""
    name = "moge_2_vitl_normal_fp16.safetensors"
    hub.files[f"Comfy-Org/MoGe/geometry_estimation/{name}"] = BODY
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "TURNAROUND_CACHE": str(tmp_path)}
    command = [sys.executable, str(ROOT / "dev.py"), "models", "MoGe 2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob(f"work-*/models/geometry_estimation/{name}")
    assert path.read_bytes() == BODY and f"there    {path}" in done.stdout
