"""Lens distortion: what OpenCV does, straight lines, masks, and rigs that carry their lenses."""

import cv2
import pytest
import torch
from turnaround.models.cameras import Rig, merge_rigs
from turnaround.models.lenses import Lens
from turnaround.models.rig_files import rig_from_text
from turnaround.models.straighten import straight_views, straightened
from turnaround.models.views import Views

W, H = 96, 128
K = torch.tensor([[110.0, 0, 45], [0, 105.0, 70], [0, 0, 1]])
LENS = Lens((-0.25, 0.1, 0.02), (0.004, -0.003))


def waves(count: int = 2) -> torch.Tensor:  # [F, 3, H, W]
    y, x = torch.meshgrid(torch.arange(H) / 9.0, torch.arange(W) / 7.0, indexing="ij")
    return torch.stack(
        [torch.stack([(x + f).sin(), (y - f).cos(), (x * y / 9).sin()]) for f in range(count)]
    ) / 2 + 0.5  # fmt: skip


def rig(lenses: tuple[Lens, ...]) -> Rig:
    V = len(lenses)
    T = torch.eye(4).repeat(V, 1, 1)
    T[:, 2, 3] = 3
    return Rig(K.repeat(V, 1, 1), T, W, H, lenses=lenses)


def test_pictures_are_straightened_as_opencv_does():
    frames = waves(1)
    ours, filmed = straightened(frames, K, LENS)
    # OpenCV counts from the middle of the first pixel, and rounds to 1/32 of a pixel.
    numbers = K.double().numpy().copy()
    numbers[:2, 2] -= 0.5
    k1, k2, k3 = LENS.radial
    theirs = cv2.undistort(
        frames[0].movedim(0, -1).numpy(), numbers, torch.tensor([k1, k2, *LENS.tangential, k3]).numpy()
    )  # fmt: skip
    inside = cv2.erode(filmed.numpy(), torch.ones(5, 5).numpy()) > 0
    off = (ours[0].movedim(0, -1) - torch.from_numpy(theirs)).abs()[torch.from_numpy(inside)]
    assert off.max() < 0.02 and off.mean() < 2e-3


def test_a_bent_picture_of_a_line_becomes_straight():
    # Where the lens shows the line x = 0.2, painted; straightened it stands in one column.
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    line = torch.stack([torch.full((400,), 0.2), torch.linspace(-0.5, 0.4, 400)], 1)
    at = LENS.bent(line) * K[[0, 1], [0, 1]] + K[:2, 2]
    away = (torch.stack([x, y], -1)[:, :, None] - at).norm(dim=-1).amin(2)
    straight, _ = straightened(torch.exp(-away.square())[None, None], K, LENS)
    column = 110 * 0.2 + 45 - 0.5
    rows = straight[0, 0, 25:105]
    middle = (rows * torch.arange(W)).sum(1) / rows.sum(1)
    assert (middle - column).abs().max() < 0.15


def test_what_was_never_filmed_is_no_performer():
    barrel = Lens((0.4,))  # reaches beyond the picture's rim
    frames, masks = waves()[None], torch.ones(1, 2, H, W)
    found = straight_views(Views(frames, masks, rig((barrel,))), rig((barrel,)))
    assert (found.masks[0, :, 0, 0] == 0).all() and (found.masks[0, :, 70, 45] == 1).all()
    assert found.rig.lenses == () and found.frames.isfinite().all()


def test_where_the_formula_folds_back_nothing_was_filmed():
    # r (1 - 0.6 r²) grows until r = 0.745; the picture's corners lie at 0.8 and more.
    _, filmed = straightened(waves(1), K, Lens((-0.6,)))
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    radius = torch.hypot((x - 45) / 110, (y - 70) / 105)
    assert radius.max() > 0.78
    assert (filmed[radius > 0.75] == 0).all() and (filmed[radius < 0.74] == 1).all()


def test_bytes_stay_bytes_and_straight_lenses_change_nothing():
    frames = (waves()[None] * 255).round().byte().repeat(2, 1, 1, 1, 1)
    seen = []
    found = straight_views(Views(frames), rig((LENS, Lens())), seen.append)
    assert found.frames.dtype == torch.uint8 and seen == [0, 1]
    assert torch.equal(found.frames[1], frames[1]) and not torch.equal(found.frames[0], frames[0])
    floats = straight_views(Views(frames.float() / 255), rig((LENS, Lens())))
    assert (floats.frames[0] * 255 - found.frames[0].float()).abs().max() < 0.51


def test_depth_is_refused():
    with pytest.raises(ValueError, match="hold depth"):
        straight_views(Views(torch.ones(1, 2, 1, H, W)), rig((LENS,)))


def test_lenses_stay_with_their_cameras():
    two = rig((LENS, Lens()))
    assert two.select([1, 0]).lenses == (Lens(), LENS)
    assert two.resized(W // 2, H // 2).lenses == two.lenses
    assert merge_rigs([rig((LENS,)), rig((Lens(),))]).lenses == (LENS, Lens())
    plain = Rig(two.K, two.T_camera_world, W, H)
    assert merge_rigs([plain, two]).lenses == (Lens(), Lens(), LENS, Lens())
    assert merge_rigs([plain, plain]).lenses == ()
    with pytest.raises(ValueError, match="2 cameras but 1 lenses"):
        Rig(two.K, two.T_camera_world, W, H, lenses=(LENS,))


TOML = """[cam]
size = [96, 128]
matrix = [[110.0, 0.0, 44.5], [0.0, 105.0, 69.5], [0.0, 0.0, 1.0]]
rotation = [0.0, 0.0, 0.0]
translation = [0.0, 0.0, 3.0]
distortions = {}
"""


def test_a_calibration_gives_its_lenses_in_opencvs_order():
    found, note = rig_from_text("c.toml", TOML.format("[-0.25, 0.1, 0.004, -0.003, 0.02]"))
    assert found.lenses == (LENS,) and "Straighten Views" in note
    found, note = rig_from_text("c.toml", TOML.format("[0.0, 0.0, 0.0, 0.0, 0.0]"))
    assert found.lenses == () and note == ""


@pytest.mark.parametrize("more", ["[0.1, 0, 0, 0, 0, 0.2, 0, 0]", "[0.1, 0.0]\nfisheye = true"])
def test_lenses_of_another_kind_are_said(more):
    found, note = rig_from_text("c.toml", TOML.format(more))
    assert found.lenses == () and "can't be straightened here" in note
