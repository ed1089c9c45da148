"""The sockets of the pack and the `models/` class that travels on each."""

from comfy_api.latest import io

RIG = io.Custom("TURNAROUND_RIG")  # models.cameras.Rig
VIEWS = io.Custom("TURNAROUND_VIEWS")  # models.views.Views
CLOUD = io.Custom("TURNAROUND_CLOUD")  # models.points.OrientedPoints
SYNC = io.Custom("TURNAROUND_SYNC")  # ModelPatcher of a models.view_sync.ViewSync
BODY = io.Custom("TURNAROUND_BODY")  # models.body.Body
WEIGHTS = io.Custom("TURNAROUND_WEIGHTS")  # models.view_weights.ViewWeights
POSE = io.Custom("TURNAROUND_POSE")  # models.pose.Pose
FLOW = io.Custom("TURNAROUND_FLOW")  # models.flow.Flow
IMPLICIT = io.Custom("TURNAROUND_IMPLICIT")  # models.implicit_video.ImplicitVideo
SUBJECT = io.Custom("TURNAROUND_SUBJECT")  # models.subject.Subject
AVATAR = io.Custom("TURNAROUND_AVATAR")  # models.avatar.Avatar
