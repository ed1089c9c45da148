"""The checkpoints worth having: what they unlock, how large they are, and where ComfyUI wants them.

The one table behind Get Models, `python dev.py models`, README and the help page. Names, places and
checksums are those of ComfyUI's own workflow templates (2026-10) and of the hub's pages; sizes are
exact where the hub's pages tell bytes, rounded elsewhere. Licences are those of the models'
publishers. What could not be looked up is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

HUB = "https://huggingface.co"
SAFE = ".safetensors"
"""The only kind of file that is ever fetched: it can hold numbers, but nothing that runs."""


@dataclass(frozen=True)
class Checkpoint:
    """One file of the Hugging Face hub."""

    file: str
    """Its name, here and there."""
    folder: str
    """The kind of model in ComfyUI, which is the folder's name under ComfyUI/models."""
    repository: str
    place: str
    """The folder inside the repository."""
    size: int
    """Bytes, to three digits at least."""
    licence: str
    sha256: str = ""
    """Empty where no page told it; the hub's own is checked in any case."""

    @property
    def path(self) -> str:
        return f"{self.place}/{self.file}" if self.place else self.file

    @property
    def page(self) -> str:
        """Where a person can look at it and fetch it by hand."""
        return f"{HUB}/{self.repository}/blob/main/{self.path}"

    @property
    def fetchable(self) -> bool:
        return self.file.endswith(SAFE)


@dataclass(frozen=True)
class Route:
    """Files that are used together, and what they are for."""

    name: str
    unlocks: str
    checkpoints: tuple[Checkpoint, ...]

    @property
    def size(self) -> int:
        return sum(c.size for c in self.checkpoints)


WAN_21 = "Comfy-Org/Wan_2.1_ComfyUI_repackaged"
WAN_22 = "Comfy-Org/Wan_2.2_ComfyUI_Repackaged"
APACHE = "Apache-2.0"


def _wan(version: str, folder: str, file: str, size: int, sha256: str = "") -> Checkpoint:
    return Checkpoint(file, folder, version, f"split_files/{folder}", size, APACHE, sha256)


VAE_21 = _wan(
    WAN_21, "vae", "wan_2.1_vae.safetensors", 253_815_318,
    "2fc39d31359a4b0a64f55876d8ff7fa8d780956ae2cb13463b0223e15148976b",
)  # fmt: skip
VAE_22 = _wan(WAN_22, "vae", "wan2.2_vae.safetensors", 1_410_000_000)
UMT5 = _wan(
    WAN_21, "text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors", 6_735_906_897,
    "c3355d30191f1f066b26d93fba017ae9809dce6c627dda5f6a66eaa651204f68",
)  # fmt: skip
CLIP_VISION = _wan(
    WAN_21, "clip_vision", "clip_vision_h.safetensors", 1_264_219_396,
    "64a7ef761bfccbadbaa3da77366aac4185a6c58fa5de5f589b42a65bcc21f161",
)  # fmt: skip
VACE_SMALL = _wan(
    WAN_21, "diffusion_models", "wan2.1_vace_1.3B_fp16.safetensors", 4_309_519_800,
    "640ccc0577e6a5d4bb15cd91b11b699ef914fc55f126c5a1c544e152130784f2",
)  # fmt: skip
VACE_LARGE = _wan(WAN_21, "diffusion_models", "wan2.1_vace_14B_fp16.safetensors", 34_700_000_000)
FUN_SMALL = _wan(
    WAN_21, "diffusion_models", "wan2.1_fun_control_1.3B_bf16.safetensors", 3_130_000_000
)
FUN_HIGH = _wan(
    WAN_22, "diffusion_models", "wan2.2_fun_control_high_noise_14B_fp8_scaled.safetensors",
    14_300_000_000,
)  # fmt: skip
FUN_LOW = _wan(
    WAN_22, "diffusion_models", "wan2.2_fun_control_low_noise_14B_fp8_scaled.safetensors",
    14_300_000_000,
)  # fmt: skip
I2V_21 = _wan(
    WAN_21, "diffusion_models", "wan2.1_i2v_480p_14B_fp16.safetensors", 32_800_000_000,
    "27988f6b510eb8d5fdd7485671b54897f8683f2bba7a772c5671be21d3491253",
)  # fmt: skip
I2V_HIGH = _wan(
    WAN_22, "diffusion_models", "wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors",
    14_300_000_000, "6122e79d55e0f235698d11d657f3b196c5273c830da00b2b013c5a048d5e6a42",
)  # fmt: skip
I2V_LOW = _wan(
    WAN_22, "diffusion_models", "wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors",
    14_300_000_000, "5471a457b6ac404202a5fbe6c11595a3d5641fc766b00f38763f72303fffc21e",
)  # fmt: skip
TI2V = _wan(WAN_22, "diffusion_models", "wan2.2_ti2v_5B_fp16.safetensors", 10_000_000_000)
T2V_SMALL = _wan(
    WAN_21, "diffusion_models", "wan2.1_t2v_1.3B_fp16.safetensors", 2_840_000_000,
    "be531024cd9018cb5b48c40cfbb6a6191645b1c792eb8bf4f8c1c6e10f924dc5",
)  # fmt: skip
T2V_LARGE = _wan(
    WAN_21, "diffusion_models", "wan2.1_t2v_14B_fp8_scaled.safetensors", 14_300_000_000
)
SVD = Checkpoint(
    "svd_xt.safetensors", "checkpoints", "stabilityai/stable-video-diffusion-img2vid-xt", "",
    9_560_000_000, "Stable Video Diffusion Community: read it before commercial use",
    "b2652c23d64a1da5f14d55011b9b6dce55f2e72e395719f1cd1f8a079b00a451",
)  # fmt: skip
MOGE = Checkpoint(
    "moge_2_vitl_normal_fp16.safetensors", "geometry_estimation", "Comfy-Org/MoGe",
    "geometry_estimation", 662_000_000, "MIT",
)  # fmt: skip
DEPTH_ANYTHING = Checkpoint(
    "depth_anything_3_metric_large.safetensors", "geometry_estimation",
    "Comfy-Org/Depth-Anything-3", "geometry_estimation", 1_330_000_000, APACHE,
)  # fmt: skip
SAM_BODY = Checkpoint(
    "sam_3d_body_dinov3_bf16.safetensors", "detection", "Comfy-Org/sam-3d-body", "detection",
    2_830_000_000, "SAM License",
)  # fmt: skip

ROUTES: tuple[Route, ...] = (
    Route("Wan 2.1 VACE 1.3B", "Multi-View VACE Conditioning; workflow 05 wan vace",
          (VACE_SMALL, UMT5, VAE_21)),
    Route("Wan 2.1 VACE 14B", "the same, larger", (VACE_LARGE, UMT5, VAE_21)),
    Route("Wan 2.1 Fun-Control 1.3B", "Multi-View Fun-Control Conditioning",
          (FUN_SMALL, UMT5, VAE_21, CLIP_VISION)),
    Route("Wan 2.2 Fun-Control 14B", "the same, with a pair of larger models",
          (FUN_HIGH, FUN_LOW, UMT5, VAE_21)),
    Route("Wan 2.1 I2V 14B 480p", "Multi-View I2V Conditioning",
          (I2V_21, UMT5, VAE_21, CLIP_VISION)),
    Route("Wan 2.2 I2V 14B", "the same, with a pair of models",
          (I2V_HIGH, I2V_LOW, UMT5, VAE_21)),
    Route("Wan 2.2 TI2V 5B", "the same, with one smaller model and a VAE of its own; 4DAnyone's "
          "sync weights", (TI2V, UMT5, VAE_22)),
    Route("Wan 2.1 T2V 1.3B", "View Sync on views that are there already; SynCamMaster's sync "
          "weights; Train Subject", (T2V_SMALL, UMT5, VAE_21)),
    Route("Wan 2.1 T2V 14B", "View Sync on views that are there already, larger",
          (T2V_LARGE, UMT5, VAE_21)),
    Route("Stable Video Diffusion XT", "Multi-View SVD Conditioning", (SVD,)),
    Route("MoGe 2", "depth and normals for Align Depth and Refine Depth (ComfyUI's own node; newer "
          "than 0.3.75)", (MOGE,)),
    Route("Depth Anything 3 metric", "depth for Align Depth (ComfyUI's own node; newer than "
          "0.3.75)", (DEPTH_ANYTHING,)),
    Route("SAM 3D Body", "Body from SAM 3D Body (ComfyUI's own node; newer than 0.3.75)",
          (SAM_BODY,)),
)  # fmt: skip


def _annotator(file: str, size: int, sha256: str, licence: str = "see its page") -> Checkpoint:
    return Checkpoint(file, "controlnet_aux", "lllyasviel/Annotators", "", size, licence, sha256)


BY_HAND: tuple[Route, ...] = (
    Route("MiDaS", "Annotate Depth", (_annotator(
        "dpt_hybrid-midas-501f0c75.pt", 492_757_791,
        "501f0c75b3bca7daec6b3682c5054c09b366765aef6fa3a09d03a5cb4b230853"),)),
    Route("Zoe", "Annotate Depth, in metres", (_annotator(
        "ZoeD_M12_N.pt", 1_443_406_099,
        "c97f94c4d53c5b788af46c5da0462262aebb37ea116fd70014bcbba93146c33b"),)),
    Route("NormalBae", "Annotate Normals", (_annotator("scannet.pt", 291_000_000, ""),)),
    Route("OpenPose", "Annotate Pose", (_annotator(
        "body_pose_model.pth", 209_267_595,
        "25a948c16078b0f08e236bda51a385d855ef4c153598947c28c0d47ed94bb746",
        "non-commercial use only"),)),
)  # fmt: skip
"""Files that are not safetensors: nothing here fetches them."""


def route(name: str) -> Route:
    """The route of a name.

    Raises:
        ValueError: there is none of this name.
    """
    found = [r for r in ROUTES if r.name == name]
    if not found:
        names = ", ".join(f"'{r.name}'" for r in ROUTES)
        raise ValueError(f"There is no '{name}' to get: choose one of {names}.")
    return found[0]


def gigabytes(size: int) -> str:
    """Bytes for people: '6.74 GB', '254 MB'."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def _files(route: Route) -> list[str]:
    return [f"[{c.file}]({c.page}), {gigabytes(c.size)} → `{c.folder}`" for c in route.checkpoints]


def _licences(route: Route) -> str:
    return "; ".join(dict.fromkeys(c.licence for c in route.checkpoints))


def _row(route: Route) -> str:
    cells = [route.name, route.unlocks, "<br>".join(_files(route)), gigabytes(route.size)]
    return f"| {' | '.join(cells)} | {_licences(route)} |"


def table(routes: Iterable[Route]) -> str:
    """A Markdown table, one row a route."""
    head = "| Name | Unlocks | Files → folder under `ComfyUI/models` | All | Licence |"
    return "\n".join([head, "|---|---|---|---|---|", *map(_row, routes)])


def listing(routes: Iterable[Route]) -> str:
    """The same as a Markdown list, for where a table is too wide."""
    lines = []
    for r in routes:
        lines.append(
            f"- **{r.name}**, {gigabytes(r.size)}. Licence: {_licences(r)}. For: {r.unlocks}"
        )
        lines += [f"  - {file}" for file in _files(r)]
    return "\n".join(lines)
