"""Animate Avatar: a distilled performer in another motion or another build."""

from dataclasses import replace

from comfy_api.latest import io

from ..models.avatar import Avatar
from ..models.body import Body
from ..models.fit_skeleton import TOTAL_STEPS
from ..models.repose import moved_like, same_mesh
from . import run
from .distill_avatar import CATEGORY
from .sockets import AVATAR, BODY


class AnimateAvatar(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundAnimateAvatar",
            display_name="Animate Avatar",
            category=CATEGORY,
            description="Gives an avatar another motion, and another build if you like: whatever a "
            "body does, of any source, the avatar does in its own looks.",
            inputs=[
                AVATAR.Input("avatar", tooltip="From Distill Avatar with a body connected, or from "
                             "Load Avatar."),
                BODY.Input("body", tooltip="The motion: Body from BVH, Sample Body, Anny Body, Body "
                           "from SAM 3D Body, Body from Mesh or Load Body. It need not be of the "
                           "avatar's mesh."),
                io.Float.Input("build", default=0.0, min=0.0, max=1.0, step=0.05,
                               tooltip="Whose build: 0 = the avatar's own, 1 = that of 'body', "
                               "between = mixed. Only bodies of one mesh can lend their build."),
                io.Int.Input("frames", default=0, min=0, max=1001,
                             tooltip="Frames of the result, spread over the same time; 0 = as many as "
                             "the body has."),
                io.Float.Input("speed", default=1.0, min=0.05, max=20.0, step=0.05,
                               tooltip="2 = plays twice as fast."),
            ],
            outputs=[
                AVATAR.Output(display_name="avatar", tooltip="For Preview Avatar, Render Avatar and "
                              "Save Avatar."),
                BODY.Output(display_name="body", tooltip="The avatar's body in that motion, for "
                            "Render Body Maps."),
                io.String.Output(display_name="note", tooltip="How the motion came over."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, avatar: Avatar, body: Body, build: float, frames: int, speed: float
    ) -> io.NodeOutput:
        if not avatar.on_body:
            raise ValueError(
                "'avatar' was distilled without a body, so it can't take another motion: connect "
                "'body' at Distill Avatar and distil it again."
            )
        own = avatar.motion.body
        if frames:
            body = body.resampled(frames)
        body = replace(body, fps=body.fps * speed)
        # Bones are looked for in either mesh where the two are different.
        bar = run.counted(2 * TOTAL_STEPS)
        moved = moved_like(own, body.to(own.rest.device), build, bar)
        note = run.say(cls, _described(own, body, build))
        return io.NodeOutput(avatar.moved(moved), moved, note)


def _described(own: Body, body: Body, build: float) -> str:
    said = f"{body.frame_count} frames at {body.fps:g} a second"
    if same_mesh(own, body):
        return said
    said += "; the body is of another mesh, so its motion was carried over by bones"
    if build > 0:
        said += "; the build stays the avatar's own, as only bodies of one mesh can lend theirs"
    return said


NODES: list[type[io.ComfyNode]] = [AnimateAvatar]
