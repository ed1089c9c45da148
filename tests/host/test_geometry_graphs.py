"""Geometry from other nodes' pictures, through a running ComfyUI: depth and normal maps that core
nodes load, and a list of core's 3D cameras."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from turnaround.models import performer
from turnaround.models.cameras import framing_distance, orbit_rig
from turnaround.models.performer_truth import surface_truth

PERFORMER, MOTION, START, CLOTHES = "kira", "dance_a", 0.2, 1_000_003
FRAMES, WIDTH, HEIGHT = 5, 64, 80
FPS, FOV = 16.0, 35.0
"""As Sample Performer has them."""
AXES = {
    "red right, green up": (1, 1),
    "red right, green down": (1, -1),
    "red left, green up": (-1, 1),
    "red left, green down": (-1, -1),
}


@pytest.fixture(scope="module")
def truth():
    """Depth [F, H, W] and camera-space normals [F, 3, H, W] of what Sample Performer shows."""
    look = performer.draw_appearance(CLOTHES)
    times = START + torch.arange(FRAMES) / FPS
    posed = performer.pose_performer(PERFORMER, MOTION, times, look)
    half = posed.vertices.abs().amax((0, 1))
    fov = math.radians(FOV)
    away = framing_distance(float(half[[0, 2]].norm()), float(half[1]), fov, WIDTH, HEIGHT)
    rig = orbit_rig(torch.zeros(1), torch.zeros(1), away, fov, WIDTH, HEIGHT)
    found = surface_truth(posed, rig)
    return found.depth[0], found.normals_camera[0]


@pytest.fixture(scope="module")
def put(server):
    """Writes pictures [F, H, W, 3] 0..1 into the server's input folder; gives their names."""
    written = []

    def of(name: str, pictures: torch.Tensor) -> list[str]:
        names = []
        for f, picture in enumerate((pictures * 255).round().byte().numpy()):
            path = server.base / "input" / f"turnaround_graphs_{name}_{f}.png"
            Image.fromarray(picture).save(path)
            written.append(path)
            names.append(path.name)
        return names

    yield of
    for path in written:
        path.unlink(missing_ok=True)


def grey(values):
    return values[..., None].expand(-1, -1, -1, 3)


def near_is_white(depth, step=0.0):
    """1 / depth before a wall, every frame stretched a little more."""
    inverse = 1 / torch.where(depth > 0, depth, 6.0)
    low, high = float(inverse.min()), float(inverse.max())
    stretch = 1 - step * torch.arange(len(depth))[:, None, None]
    return (inverse - low) / (high - low) * stretch


def coloured(normals, right, up):
    return (0.5 + 0.5 * normals * torch.tensor([right, -up, -1.0])[:, None, None]).movedim(1, -1)


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def sample() -> dict:
    return node(
        "TurnaroundSamplePerformer", performer=f"{PERFORMER} (unseen)",
        motion=f"{MOTION} (unseen)", frames=FRAMES, width=WIDTH, height=HEIGHT, start=START,
        clothes_seed=CLOTHES,
    )  # fmt: skip


def loaded(prompt: dict, prefix: str, names: list[str]) -> list:
    """Core nodes that load the files and join them to one IMAGE; gives its socket."""
    for f, name in enumerate(names):
        prompt[f"{prefix}{f}"] = node("LoadImage", image=name)
    joined = [f"{prefix}0", 0]
    for f in range(1, len(names)):
        prompt[f"{prefix}batch{f}"] = node("ImageBatch", image1=joined, image2=[f"{prefix}{f}", 0])
        joined = [f"{prefix}batch{f}", 0]
    return joined


def aligned(prompt: dict, names: list[str]) -> None:
    prompt["sample"] = sample()
    prompt["align"] = node(
        "TurnaroundAlignDepth", depth=loaded(prompt, "d", names), metric=["sample", 1],
        runs_with="find out", steadiness=0.1, fov=40.0, performer_height=1.7,
    )  # fmt: skip


def refined(prompt: dict, name: str, names: list[str], axes: str) -> None:
    prompt[name] = node(
        "TurnaroundRefineDepth", depth_views=["align", 0], normals=loaded(prompt, f"{name}n", names),
        axes=axes, reach=12.0, fov=40.0, clean_edges=True,
    )  # fmt: skip


def geometry(depth_views: list, **more) -> dict:
    return node(
        "TurnaroundPerformerGeometry", video=["sample", 0], depth_views=depth_views,
        depth_convention="near is white", fov=40.0, performer_height=1.7, erosion=1, **more,
    )  # fmt: skip


def conditions(prompt: dict, rig: list) -> None:
    """Render Conditions of the cloud, and Preview Views of the normal maps."""
    prompt["conditions"] = node(
        "TurnaroundRenderConditions", cloud=["geometry", 0], rig=rig, back_colors="kept"
    )
    prompt["preview"] = node("TurnaroundPreviewViews", views=["conditions", 1], moments=2)
    prompt["normals"] = node("PreviewImage", images=["preview", 0])


def orbit(cloud: list) -> dict:
    return node(
        "TurnaroundOrbitRig", views=2, start_azimuth=0.0, span=360.0, elevation=0.0, layers=1,
        layer_step=20.0, fov=35.0, distance=0.0, width=WIDTH, height=HEIGHT, cloud=cloud,
    )  # fmt: skip


def run(server, prompt: dict) -> dict:
    entry = server.wait(server.queue(prompt), seconds=120)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    return entry["outputs"]


def pictures(server, output: dict) -> np.ndarray:  # [N, H, W, 3]
    files = [server.base / f["type"] / f["subfolder"] / f["filename"] for f in output["images"]]
    return np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files]).astype(int)


def sentence(server, prompt: dict) -> str:
    """The words with which a graph ends; the server must go on."""
    entry = server.wait(server.queue(prompt), seconds=120)
    assert entry["status"]["status_str"] == "error"
    kind, error = entry["status"]["messages"][-1]
    assert kind == "execution_error" and server.get("/system_stats")
    message = error["exception_message"].strip()
    assert error["exception_type"] == "ValueError" and len(message.splitlines()) == 1
    return message


def test_depth_pictures_become_conditions_and_every_stage_is_seen(server, truth, put):
    depth, normals = truth
    prompt: dict = {}
    aligned(prompt, put("depth", grey(near_is_white(depth, 0.02))))
    refined(prompt, "refine", put("right_up", coloured(normals, 1, 1)), "red right, green up")
    prompt["geometry"] = geometry(["refine", 0], clean_edges=True, accumulate=False)
    prompt["rig"] = orbit(["geometry", 0])
    conditions(prompt, ["rig", 0])
    prompt["note"] = node("PreviewAny", source=["align", 2])
    for name, socket in (("aligned", ["align", 1]), ("stages", ["geometry", 4])):
        prompt[name] = node("PreviewImage", images=socket)
    outputs = run(server, prompt)
    assert "follow 1 / depth, near is white" in outputs["note"]["text"][0]
    off = float(outputs["note"]["text"][0].split()[-2])
    assert off < 2  # centimetres; a grey level is 1.5 cm
    sheet = pictures(server, outputs["normals"])[0]
    front = sheet[: len(sheet) // 2]
    # Seen from the front the performer is blue and violet, from behind black on grey.
    assert ((front[..., 2] > 200) & (front[..., 0] > 60)).mean() > 0.02
    assert (sheet[len(sheet) // 2 :].max(-1) < 20).mean() > 0.02
    assert len(pictures(server, outputs["stages"])) == FRAMES
    assert pictures(server, outputs["aligned"]).shape == (FRAMES, HEIGHT, 3 * WIDTH, 3)


def test_one_truth_in_four_colour_conventions_gives_one_refined_depth(server, truth, put):
    depth, normals = truth
    prompt: dict = {}
    aligned(prompt, put("depth", grey(near_is_white(depth))))
    for n, (axes, (right, up)) in enumerate(AXES.items()):
        refined(prompt, f"refine{n}", put(f"axes{n}", coloured(normals, right, up)), axes)
        prompt[f"seen{n}"] = node("PreviewImage", images=[f"refine{n}", 1])
        prompt[f"views{n}"] = node(
            "TurnaroundPreviewViews", views=[f"refine{n}", 0], moments=FRAMES
        )
        prompt[f"depth{n}"] = node("PreviewImage", images=[f"views{n}", 0])
        prompt[f"note{n}"] = node("PreviewAny", source=[f"refine{n}", 2])
    outputs = run(server, prompt)
    for kind in ("seen", "depth"):
        first = pictures(server, outputs[f"{kind}0"])
        assert first.std() > 20
        for n in range(1, len(AXES)):
            # 128 is no exact middle of 8 bits, so flipped colours differ by a level, and a pixel at
            # an edge may have a normal in one and none in the other.
            differ = np.abs(pictures(server, outputs[f"{kind}{n}"]) - first).max(-1)
            assert (differ > 3).mean() < 0.001
    assert not any("agree better" in outputs[f"note{n}"]["text"][0] for n in range(len(AXES)))


def test_a_list_of_core_s_cameras_becomes_the_rig_of_the_conditions(server):
    def graph(rig: str) -> dict:
        prompt = {"sample": sample(), "geometry": geometry(["sample", 1])}
        prompt["orbit"] = orbit(["geometry", 0])
        prompt["cameras"] = node("TurnaroundRigToCameras", rig=["orbit", 0])
        prompt["back"] = node(
            "TurnaroundRigFromCameras", cameras=["cameras", 0], width=WIDTH, height=HEIGHT
        )
        conditions(prompt, [rig, 0])
        return prompt

    through, straight = (
        pictures(server, run(server, graph(rig))["normals"])[0] for rig in ("back", "orbit")
    )
    assert through.shape == straight.shape
    differ = np.abs(through - straight).max(-1) > 8
    differ[:12] = differ[HEIGHT : HEIGHT + 12] = False  # labels: core's cameras carry no names
    assert straight.std() > 20
    assert differ.mean() < 0.002  # rounding moves single points by a pixel


BAD_DEPTH = {
    "black": (lambda d: grey(0 * d), "0 all over the performer"),
    "one colour": (lambda d: grey(0 * d + 0.5), "all over the performer, so it has no shape"),
    "coloured": (lambda d: coloured(d[:, None].expand(-1, 3, -1, -1) / 5, 1, 1), "is coloured"),
    "too few frames": (lambda d: grey(near_is_white(d))[:2], "has 2 frames but 'metric' has 5"),
    "another shape": (lambda d: grey(near_is_white(d))[:, :, :32], "another shape"),
}


@pytest.mark.parametrize("case", BAD_DEPTH)
def test_bad_depth_pictures_end_as_one_sentence(server, truth, put, case):
    make, words = BAD_DEPTH[case]
    prompt: dict = {}
    aligned(prompt, put(case.replace(" ", "_"), make(truth[0])))
    prompt["seen"] = node("TurnaroundPreviewViews", views=["align", 0], moments=1)
    assert words in sentence(server, prompt)


def test_too_few_normal_maps_and_an_empty_mask_end_as_one_sentence(server, truth, put):
    depth, normals = truth
    prompt: dict = {}
    aligned(prompt, put("depth", grey(near_is_white(depth))))
    refined(prompt, "refine", put("two", coloured(normals, 1, 1)[:2]), "red right, green up")
    prompt["seen"] = node("TurnaroundPreviewViews", views=["refine", 0], moments=1)
    assert "'normals' has 2 frames but the depth has 5" in sentence(server, prompt)
    prompt = {"sample": sample(), "geometry": geometry(["sample", 1], mask=["nobody", 0])}
    prompt["nobody"] = node("SolidMask", value=0.0, width=WIDTH, height=HEIGHT)
    prompt["masks"] = node("RepeatImageBatch", image=["picture", 0], amount=FRAMES)
    prompt["picture"] = node("MaskToImage", mask=["nobody", 0])
    prompt["mask"] = node("ImageToMask", image=["masks", 0], channel="red")
    prompt["geometry"]["inputs"]["mask"] = ["mask", 0]
    prompt["seen"] = node("PreviewImage", images=["geometry", 4])
    assert "black in every frame" in sentence(server, prompt)
