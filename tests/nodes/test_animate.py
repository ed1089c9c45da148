"""Animate Points in the real ComfyUI: from a picture and a body to conditions of every frame."""

import math
from dataclasses import replace

import pytest
import torch
from turnaround.models.body import performer_centre
from turnaround.models.fit_body import Stand, stood
from turnaround.models.metrics import mask_iou
from turnaround.nodes import animate, body, cameras, conditions, geometry, views

pytestmark = pytest.mark.usefixtures("one_thread")

WHO, CLOTHES, START = "kira", 1_000_003, 1.2
MOTION, FRAMES = "dance_b", 5


def sample_body(frames=FRAMES, motion=MOTION, start=START, who=WHO):
    return body.SampleBody.execute(who, motion, frames, start, CLOTHES).args[0]


@pytest.fixture(scope="module")
def picture():
    """The cloud of one picture."""
    with torch.inference_mode():
        video, depth, _ = views.SamplePerformer.execute(
            WHO, MOTION, 1, 128, 160, START, CLOTHES
        ).args
        return geometry.PerformerGeometry.execute(
            video, "near is white", 40.0, 1.7, 1, depth_views=depth
        ).args[0]


def animated(cloud, motion, fits_frame=0, align="place and size", picture_body=None):
    return animate.AnimatePoints.execute(
        cloud, motion, fits_frame, align, "of the body", "near the body", picture_body
    ).args


def refusal(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and ". " not in text and "\n" not in text, "not one sentence"
    return text


def test_one_picture_and_a_body_become_the_performer_in_motion(picture):
    """The rig's true pictures lie on what is drawn, though the cloud's world was another."""
    cloud, standing, note = animated(picture, sample_body())
    assert cloud.frame_count == standing.frame_count == FRAMES and cloud.fps == 16
    assert "sized by 1.00" in note and "lies 0.0 cm" in note and "covers 100 %" in note
    rig = cameras.OrbitRig.execute(4, 0.0, 360.0, 0.0, 1, 20.0, 35.0, 0.0, 64, 80, cloud).args[0]
    partial, *_ = conditions.RenderConditions.execute(cloud, rig, "kept").args
    *_, truth = views.SamplePerformer.execute(WHO, MOTION, FRAMES, 64, 64, START, CLOTHES, rig).args
    drawn = (partial.frames != 128).any(2)
    for f in (0, FRAMES - 1):
        # Points are as large as the picture's coarse pixels, so they stand out a little.
        assert mask_iou(drawn[:, f].float(), truth.masks[:, f]) > 0.7
    # The side that the picture showed, still from the front in the last frame.
    front = truth.masks[0, -1] == 1
    error = (partial.frames[0, -1].float() / 255 - truth.frames[0, -1]).abs().mean(0)
    assert error[front].median() < 0.1
    torch.testing.assert_close(
        standing.vertices, sample_body().vertices, atol=1e-3, rtol=0
    )  # the sample's own world


def test_body_comes_out_where_the_points_are(picture):
    moved = stood(sample_body(), Stand(0.8, 0.0, (3.0, 1.0, -2.0)))
    cloud, standing, note = animated(picture, moved)
    assert "sized by 1.25" in note
    low, high = cloud.positions.amin(0), cloud.positions.amax(0)
    box = standing.vertices.flatten(0, 1)
    torch.testing.assert_close(low, box.amin(0), atol=0.03, rtol=0)
    torch.testing.assert_close(high, box.amax(0), atol=0.03, rtol=0)
    assert performer_centre(standing.vertices).norm() < 1e-4


def test_frame_that_fits_may_be_any(picture):
    motion = sample_body(FRAMES, start=START - 2 / 16)
    cloud, _, note = animated(picture, motion, fits_frame=2)
    assert "lies 0.0 cm" in note
    wrong = animated(picture, sample_body(FRAMES, "walk", 0.2))[2]
    assert "poor fit" in wrong and "in frame 0" in wrong


def test_picture_has_a_body_of_its_own_in_another_pose(picture):
    motion = sample_body(2, "walk", 0.2, "leo")
    motion = replace(motion, vertices=motion.vertices + 5)
    cloud, standing, note = animated(picture, motion, picture_body=sample_body(1))
    assert cloud.frame_count == motion.frame_count and "lies 0.0 cm" in note
    # The camera looks at the performer from as far away as it did.
    away = picture.source.centers[0].norm()
    assert cloud.source.centers[0].norm() == pytest.approx(float(away), abs=0.2)
    assert performer_centre(standing.vertices).norm() < 1e-4


def test_wrong_input_is_refused_in_one_sentence(picture):
    motion = sample_body()
    two = replace(picture, frame_offsets=torch.tensor([0, 5, len(picture.positions)]))
    assert "'cloud' has 2 frames" in refusal(lambda: animated(two, motion))
    text = refusal(lambda: animated(picture, motion, fits_frame=5))
    assert "'fits_frame' is 5, but 'body' has 5 frames: use 0 to 4" in text
    text = refusal(lambda: animated(picture, motion, fits_frame=1, picture_body=sample_body(1)))
    assert "'picture_body' has 1 frames" in text
    away = stood(motion, Stand(place=(1.0, 0.0, 0.0)))
    text = refusal(lambda: animated(picture, away, align="off"))
    assert "cm from the picture's points" in text and "switch 'align' on" in text
    fewer = replace(motion, faces=motion.faces[:-1])
    text = refusal(lambda: animated(picture, motion, picture_body=fewer))
    assert f"{len(fewer.faces)} triangles but 'body'" in text
    nothing = replace(picture, positions=picture.positions * math.nan)
    assert "no points" in refusal(lambda: animated(nothing, motion))


def test_far_too_long_a_motion_is_refused_before_it_is_computed(picture):
    still = sample_body(1)
    long = replace(still, vertices=still.vertices.expand(1_000, -1, -1))
    many = picture.select(torch.zeros(4_000_000, dtype=torch.int64), torch.tensor([0, 4_000_000]))
    text = refusal(lambda: animated(many, long))
    assert "4,000,000 points in 1000 frames need 352 GB" in text


def test_bad_points_are_left_out_and_said(picture):
    positions = picture.positions.clone()
    positions[:3] = math.nan
    cloud, _, note = animated(replace(picture, positions=positions), sample_body(1))
    assert note.startswith("3 points with NaN or infinity were left out")
    assert cloud.positions.isfinite().all()


def test_every_input_and_output_has_a_tooltip():
    for node in animate.NODES:
        schema = node.define_schema()
        assert schema.description
        for part in [*schema.inputs, *schema.outputs]:
            assert part.tooltip, (schema.node_id, part)
