"""Avatars through a running ComfyUI: distilled, shown, saved, loaded, cancelled."""

import asyncio
import json
import struct

import aiohttp
import numpy as np
import pytest
from PIL import Image

WHO = dict(
    performer="kira (unseen)", motion="dance_a (unseen)", frames=5, start=0.2, clothes_seed=1_000_003
)  # fmt: skip
WIDTH, HEIGHT, VIEWS, FRAMES = 64, 80, 4, 5
STOP, GO_ON = "stop, keep a file", "go on with it"


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def distilling(steps: int = 30, when: str = STOP, name: str = "host") -> dict:
    """A performer, its body, and Distill Avatar of both."""
    return {
        "body": node("TurnaroundSampleBody", **WHO),
        "rig": node(
            "TurnaroundOrbitRig", views=VIEWS, start_azimuth=0.0, span=360.0, elevation=0.0, layers=1,
            layer_step=20.0, fov=35.0, distance=0.0, width=WIDTH, height=HEIGHT, body=["body", 0],
        ),
        "sample": node(
            "TurnaroundSamplePerformer", width=WIDTH, height=HEIGHT, rig=["rig", 0], **WHO
        ),
        "distill": node(
            "TurnaroundDistillAvatar", views=["sample", 2], body=["body", 0], preset="draft",
            steps=steps, gaussians=3000, resolution=512, training_seed=0, when_cancelled=when,
            filename_prefix=f"avatars/{name}",
        ),
        "note": node("PreviewAny", source=["distill", 3]),
    }  # fmt: skip


def saved(format: str, avatar: str = "distill") -> dict:
    return node(
        "TurnaroundSaveAvatar", avatar=[avatar, 0], filename_prefix="avatars/host", format=format,
        frame=2, axes="y down (Turnaround, COLMAP)",
    )  # fmt: skip


def rendered(avatar: str) -> dict:
    return node(
        "TurnaroundRenderAvatar", avatar=[avatar, 0], rig=["rig", 0], first_frame=0.0,
        last_frame=-1.0, speed=1.0, fps=0.0, background="grey",
    )  # fmt: skip


@pytest.fixture(autouse=True)
def emptied(server):
    """No avatars of ours before or after."""
    folder = server.base / "output" / "avatars"

    def empty() -> None:
        for file in folder.glob("host*") if folder.is_dir() else []:
            file.unlink()

    empty()
    yield folder
    empty()


def run(server, prompt: dict) -> dict:
    entry = server.wait(server.queue(prompt), seconds=120)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    return entry["outputs"]


def picture(server, output: dict) -> np.ndarray:  # [H, W, 3]
    (file,) = output["images"]
    return np.asarray(
        Image.open(server.base / file["type"] / file["subfolder"] / file["filename"]).convert("RGB")
    ).astype(int)


def cancelled(server, prompt: dict) -> dict:
    """The history of a graph whose cancel button was pressed after some steps of learning."""
    steps = prompt["distill"]["inputs"]["steps"]

    async def follow() -> str:
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{server.url}/ws?clientId=avatar", max_msg_size=0) as events,
        ):
            body = {"prompt": prompt, "client_id": "avatar"}
            async with session.post(f"{server.url}/prompt", json=body) as answer:
                number = (await answer.json())["prompt_id"]
            async for message in events:
                if message.type != aiohttp.WSMsgType.TEXT:
                    continue
                event = json.loads(message.data)
                told = event["data"]
                if event["type"] == "progress" and told["max"] == steps and told["value"] > 2:
                    (await session.post(f"{server.url}/interrupt", json={})).release()
                    return number
                if event["type"] == "execution_error":
                    raise AssertionError(told["exception_message"])
        raise AssertionError("the connection was closed")

    return server.wait(asyncio.run(asyncio.wait_for(follow(), 90)), 30)


def test_a_performer_becomes_an_avatar_that_is_shown_and_saved(server, emptied):
    prompt = distilling()
    prompt["render"] = rendered("distill")
    for name, socket in (("colors", ["render", 0]), ("truth", ["sample", 2])):
        prompt[f"{name}_sheet"] = node("TurnaroundPreviewViews", views=socket, moments=FRAMES)
        prompt[name] = node("PreviewImage", images=[f"{name}_sheet", 0])
    prompt["turntable"] = node(
        "TurnaroundAvatarTurntable", avatar=["distill", 0], seconds=0.5, turns=1.0,
        motion="there and back", first_frame=0.0, speed=1.0, fps=8.0, start_azimuth=0.0,
        elevation=5.0, fov=35.0, distance=0.0, width=64, height=80, background="white",
    )  # fmt: skip
    prompt["video"] = node(
        "SaveVideo", video=["turntable", 0], filename_prefix="avatars/host", format="auto",
        codec="auto",
    )  # fmt: skip
    formats = {
        "own": "avatar (.safetensors)", "ply": "3DGS of one frame (.ply)",
        "clip": "all frames in one (.ply)", "splat": "splat of every frame (.splat each)",
        "glb": "glTF of one frame (.glb)",
    }  # fmt: skip
    for name, format in formats.items():
        prompt[name] = saved(format)
    outputs = run(server, prompt)
    assert f"from {VIEWS} views x {FRAMES} frames of {WIDTH}x{HEIGHT}" in outputs["note"]["text"][0]
    # The avatar's sheet is nearer to the truth than grey is.
    shown, truth = picture(server, outputs["colors"]), picture(server, outputs["truth"])
    performer = np.abs(truth - 128).max(-1) > 12
    off, flat = (np.abs(p - truth)[performer].mean() for p in (shown, 128))
    assert off < 0.4 * flat
    names = sorted(f.name.split("_", 2)[2] for f in emptied.glob("host*"))
    splats = [f"frame{f:04}.splat" for f in range(FRAMES)]
    assert names == sorted(
        [".safetensors", "frame0002.ply", "clip.ply", "frame0002.glb", ".mp4", *splats]
    )
    check_files({f.name.split("_", 2)[2]: f.read_bytes() for f in emptied.glob("host*")})


def check_files(files: dict[str, bytes]) -> None:
    """As many Gaussians in each, by the formats' own words."""
    head, body = files["frame0002.ply"].split(b"end_header\n", 1)
    count = int(head.split(b"element vertex ")[1].split()[0])
    assert 1000 < count <= 3000 and len(body) == count * 4 * head.count(b"property float ")
    assert f"element vertex {count}\n".encode() in files["clip.ply"]
    assert len(files["frame0002.splat"]) == 32 * count
    length = struct.unpack("<I", files["frame0002.glb"][12:16])[0]
    assert json.loads(files["frame0002.glb"][20 : 20 + length])["accessors"][0]["count"] == count


def test_a_cancelled_avatar_can_be_loaded(server, emptied):
    entry = cancelled(server, distilling(steps=200_000))
    assert entry["status"]["messages"][-1][0] == "execution_interrupted"
    (file,) = emptied.glob("host*")
    assert file.name == "host_00001_checkpoint.safetensors"
    listed = server.get("/object_info/TurnaroundLoadAvatar")["TurnaroundLoadAvatar"]["input"]
    assert file.name in listed["required"]["name"][1]["options"]
    prompt = {name: distilling()[name] for name in ("body", "rig")}
    prompt["load"] = node("TurnaroundLoadAvatar", name=file.name)
    prompt["note"] = node("PreviewAny", source=["load", 1])
    prompt["render"] = rendered("load")
    prompt["sheet"] = node("TurnaroundPreviewViews", views=["render", 0], moments=2)
    prompt["shown"] = node("PreviewImage", images=["sheet", 0])
    outputs = run(server, prompt)
    assert f"{FRAMES} frames at 16 frames a second" in outputs["note"]["text"][0]
    assert (np.abs(picture(server, outputs["shown"]) - 128).max(-1) > 12).mean() > 0.02


def test_or_the_rest_of_the_graph_gets_the_avatar_so_far(server, emptied):
    prompt = distilling(steps=300_000, when=GO_ON)
    prompt["save"] = saved("avatar (.safetensors)")
    entry = cancelled(server, prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    assert "this is the avatar so far" in entry["outputs"]["note"]["text"][0]
    assert [f.name for f in emptied.glob("host*")] == ["host_00001_.safetensors"]
