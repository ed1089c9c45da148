"""Every example on a device that isn't the CPU, though there is no graphics card (`second_device`):
once with what nodes hand on in ordinary memory, as ComfyUI does by itself, and once with all of it on
the device, as `--gpu-only` has it."""

import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "TurnaroundSamplePerformer": {"frames": 5, "width": 192, "height": 240},
    "TurnaroundSampleBody": {"frames": 5},
    "TurnaroundOrbitRig": {"views": 4},
    "TurnaroundCamerasToViews": {"max_frames": 1},
    "TurnaroundMultiViewSampler": {"steps": 2},
    "TurnaroundSmoothLoop": {"steps": 2, "rounds": 1},
    "TurnaroundImplicitVideoFit": {"steps": 5, "resolution": 96},
    "TurnaroundTrainSubject": {"steps": 60},  # fields with a surface
    "TurnaroundDistillAvatar": {"steps": 5},
    "TurnaroundPreviewAvatar": {"width": 128, "height": 128},
    "TurnaroundAvatarTurntable": {"seconds": 0.2},
    "KSampler": {"steps": 2},
}
"""Widgets above these numbers are turned down to them: every stage runs, the results are poor."""
WHOLE = "08_deflicker"
"""Spoils some frames by numbers of its own, so it keeps all of them."""
BESIDE = ("01", "03", "04", "06", "08", "09", "11")
"""Of the others, 10 and 14 pass, too, in another two minutes; 02, 12 and 13 have the same nodes again,
05 wants checkpoints, and 07 refines, which the processor does."""
ONLY = ("01", "03")
RUNS = [("beside", number) for number in BESIDE] + [("only", number) for number in ONLY]


@pytest.fixture(scope="module")
def host(request, dev, tmp_path_factory):
    """A ComfyUI of its own, which believes in the second device."""
    tree = os.environ.get("COMFYUI_DIR")
    if not tree or not dev.venv_python().exists():
        pytest.skip("no ComfyUI here: run the tests through `python dev.py test`")
    base = tmp_path_factory.mktemp("second_device")
    for folder in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base / folder).mkdir()
    nodes = base / "custom_nodes"
    (nodes / dev.PACK_FOLDER).symlink_to(ROOT, target_is_directory=True)
    (nodes / "second_device").symlink_to(ROOT / "tests" / "second_device")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dev, "workspace", lambda: base)
        if request.param == "only":
            patched.setenv("SECOND_DEVICE_ONLY", "1")
        with dev.running_host(Path(tree)) as host:
            dev.give_real_clip(host)
            yield host


@pytest.mark.parametrize(("host", "number"), RUNS, indirect=["host"])
def test_example_runs_where_no_tensor_may_lie_on_another_device(host, dev, number):
    (path,) = (ROOT / "workflows").glob(f"{number}_*.json")
    prompt = dev.api_graph(json.loads(path.read_text("utf-8")), host.get("/object_info"))
    for node in prompt.values():
        inputs = node["inputs"]
        for name, most in SMALL.get(node["class_type"], {}).items():
            # 0 stands for a preset's number.
            if isinstance(value := inputs.get(name), int | float):
                inputs[name] = (
                    value if path.stem == WHOLE and name == "frames" else (min(value, most) or most)
                )
    entry = host.wait(host.queue(prompt), seconds=300)
    kind, told = entry["status"]["messages"][-1]
    said = told.get("exception_message", "")[:1000]
    where = [line for line in told.get("traceback", []) if dev.PACK_FOLDER in line]
    assert kind == "execution_success", f"{told.get('node_type')}: {said}\n{''.join(where[-3:])}"
    done = re.findall(r"on the second device: (\d+) operations", host.log_text())
    assert int(done[-1]) > 100
