"""Footage of several cameras: one size that keeps to K, one moment, one length."""

import pytest
import torch
import torch.nn.functional as F
from turnaround.models.camera_views import (
    as_calibrated,
    read_offsets,
    read_together,
    rig_of_size,
    same_shape,
)
from turnaround.models.cameras import Rig, project
from turnaround.models.lenses import Lens


def camera(width: int, height: int, lenses: tuple[Lens, ...] = ()) -> Rig:
    K = torch.tensor([[1.1 * height, 0, width * 0.48], [0, 1.1 * height, height * 0.53], [0, 0, 1]])
    T = torch.eye(4)
    T[2, 3] = 3
    return Rig(K[None], T[None], width, height, ("left",), lenses)


def spot(
    at: torch.Tensor, width: int, height: int, sigma: float
) -> torch.Tensor:  # [3, H, W] bytes
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    away = (x - at[0]).square() + (y - at[1]).square()
    return (torch.exp(-away / 2 / sigma**2) * 255).round().byte().expand(3, -1, -1)


def place(picture: torch.Tensor) -> torch.Tensor:  # [2]
    light = picture[0].float()
    y, x = torch.meshgrid(
        torch.arange(light.shape[0]) + 0.5, torch.arange(light.shape[1]) + 0.5, indexing="ij"
    )
    return torch.stack([(light * x).sum(), (light * y).sum()]) / light.sum()


@pytest.mark.parametrize(
    ("calibrated", "longest", "size"),
    [
        ((1088, 1920), 960, (544, 960)),
        ((1088, 1920), 0, (1088, 1920)),
        ((1920, 1080), 960, (960, 544)),
        ((640, 480), 320, (320, 240)),
        ((100, 100), 0, (96, 96)),
    ],
)
def test_the_new_size_has_the_rigs_shape_in_steps_of_16(calibrated, longest, size):
    lens = (Lens((0.1,)),)
    new = rig_of_size(camera(*calibrated, lens), longest)
    assert (new.width, new.height) == size and new.lenses == lens and new.names == ("left",)


@pytest.mark.parametrize(
    ("file", "calibrated", "longest"),
    [
        ((272, 480), (272, 480), 240),  # the calibration's own pictures
        ((544, 960), (272, 480), 240),  # the same, larger
        ((200, 300), (200, 300), 160),  # another shape in steps of 16: something is cut away
        ((400, 300), (400, 300), 0),
    ],
)
def test_what_stands_at_a_point_stands_where_the_new_k_projects_it(file, calibrated, longest):
    rig = camera(*calibrated)
    sized = rig_of_size(rig, longest)
    point = torch.tensor([[0.31, -0.22, 0.4]])
    at = project(point, rig)[0][0, 0] * file[0] / calibrated[0]
    picture = as_calibrated(spot(at, *file, 12.0), rig, sized.width, sized.height)
    assert picture.shape == (3, sized.height, sized.width) and picture.dtype == torch.uint8
    assert (place(picture) - project(point, sized)[0][0, 0]).norm() < 0.5


def test_bars_that_were_added_to_a_shrunk_file_are_cut_away():
    # As Pose2Sim's cameras 1 and 2: shrunk across by 8 of 1088, and black rows above and below.
    rig = camera(1088, 1920)
    point = torch.tensor([[0.31, -0.5, 0.4]])
    calibrated = spot(project(point, rig)[0][0, 0], 1088, 1920, 40.0)
    shrunk = F.interpolate(calibrated[None].float(), (1906, 1080), mode="area")[0].byte()
    file = F.pad(shrunk, (0, 0, 7, 7))
    sized = rig_of_size(rig, 960)
    found = as_calibrated(file, rig, sized.width, sized.height)
    assert (place(found) - project(point, sized)[0][0, 0]).norm() < 0.2
    white = F.pad(torch.full((3, 1906, 1080), 255, dtype=torch.uint8), (0, 0, 7, 7))
    assert as_calibrated(white, rig, 544, 960).min() > 250


@pytest.mark.parametrize(
    ("size", "calibrated", "same"),
    [
        ((1080, 1920), (1088, 1920), True),
        ((540, 960), (1088, 1920), True),
        ((640, 360), (640, 368), True),  # rounded to steps of 16 by Rig from File
        ((1920, 1080), (1088, 1920), False),
        ((1440, 1080), (1920, 1088), False),
    ],
)
def test_pictures_of_another_shape_are_told_apart(size, calibrated, same):
    assert same_shape(*size, camera(*calibrated)) == same


@pytest.mark.parametrize(
    ("text", "frames"),
    [
        ("", [0, 0, 0]),
        ("  ", [0, 0, 0]),
        ("12, 15, 10", [2, 5, 0]),
        ("0,3,-2", [2, 5, 0]),
        ("7 7;8,", [0, 0, 1]),
    ],
)
def test_offsets_make_one_moment_the_first(text, frames):
    assert read_offsets(text, 3) == frames


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0, 1", "'offsets' has 2 numbers, but there are 3 videos"),
        ("0, 1, two", "takes whole numbers with commas"),
        ("0, 1.5, 2", "takes whole numbers with commas"),
        ("0, __import__('os'), 2", "takes whole numbers with commas"),
        ("1" * 5000, "takes whole numbers with commas"),
    ],
)
def test_offsets_that_are_none_are_refused_in_one_sentence(text, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        read_offsets(text, 3)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_the_shortest_ends_all_and_nothing_is_read_beyond_it():
    read, seen = [0, 0, 0], []

    def reader(v: int, count: int):
        for f in range(count):
            read[v] += 1
            yield torch.full((3, 2, 4), 10 * v + f, dtype=torch.uint8)

    readers = [reader(v, count) for v, count in enumerate((5, 3, 9))]
    found = read_together(
        readers, 7, (4, 2), lambda done, moment: seen.append((done, moment.shape))
    )
    assert found.ended == 1 and read == [4, 3, 3]
    assert found.frames[..., 0, 0, 0].tolist() == [[0, 1, 2], [10, 11, 12], [20, 21, 22]]
    assert seen == [(n, (3, 3, 2, 4)) for n in (1, 2, 3)]
    whole = read_together([reader(v, 9) for v in range(2)], 4, (4, 2), lambda *_: None)
    assert whole.ended is None and whole.frames.shape == (2, 4, 3, 2, 4)
