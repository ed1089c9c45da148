"""How close sampled views come to the truth, on performers and motions that no training saw.

    .venv/bin/python tests/eval_views.py [--picture sheet.jpg]

For each clip: Turnaround-Tiny with trained view sync, with the training-free form, and with every
view on its own, all from the same noise; beside them what a graph has before sampling (the partial
colours) and what the VAE alone loses (its round trip of the truth, the ceiling). PSNR in dB inside
the true performer, there on the side that the source camera saw and on the side that it didn't;
IoU of the silhouette.
"""

import argparse
from pathlib import Path

import in_comfyui
import torch

CLIPS = [(p, m) for p in ("kira", "leo") for m in ("dance_a", "dance_b")]
VIEWS, STEPS, SEED = 8, 12, 7


def psnr(result, truth, where) -> float:
    """dB over the pixels [V, F, H, W] of a region."""
    error = (result - truth).square().mean(2)[where]
    return float(-10 * error.mean().log10())


def conditions(performer: str, motion: str, seed: int):
    """What the flagship graph makes of a sample performer."""
    from turnaround.nodes import cameras, geometry, views

    def source(rig=None):
        return views.SamplePerformer.execute(performer, motion, 13, 256, 320, 0.2, seed, rig).args

    video, depth, _ = source()
    cloud = geometry.PerformerGeometry.execute(
        video, "near is white", 40.0, 1.7, 1, depth_views=depth
    ).args[0]
    rig = cameras.OrbitRig.execute(
        VIEWS, 0.0, 360.0, 0.0, 1, 20.0, 35.0, 0.0, 128, 160, cloud
    ).args[0]
    return rig, geometry.RenderConditions.execute(cloud, rig, "blanked").args, source(rig)[2]


def results(model, vae, sync, rig, partial, normals) -> dict:
    """Views by method."""
    from turnaround.nodes import sampler, views

    positive, negative, latent, *_ = sampler.MultiViewConditioning.execute(
        vae, partial, normals
    ).args
    methods = {"trained sync": (sync, 1.0), "training-free": (None, 1.0), "no sync": (None, 0.0)}
    found = {"partial colour": partial.frames}
    for name, (weights, strength) in methods.items():
        samples = sampler.MultiViewSampler.execute(
            model, positive, negative, latent, SEED, STEPS, 1.0, "euler", "simple", 1.0, strength,
            sync=weights, rig=rig,
        ).args[0]  # fmt: skip
        found[name] = views.DecodeViews.execute(samples, vae, 16.0, rig).args[0].frames
    return found


def silhouette_iou(result, masks) -> float:
    """How well what is not background grey covers the true performer."""
    from turnaround.models.geometry import BACKGROUND

    drawn = (result - BACKGROUND).abs().amax(2) > 0.06
    true = masks > 0.5
    return float((drawn & true).sum() / (drawn | true).sum())


def evaluate(performer: str, motion: str, seed: int, models, sheets: list) -> dict[str, list]:
    from turnaround.models.views import Views, contact_sheet
    from turnaround.nodes import views

    model, vae, sync = models
    rig, (partial, normals, visibility, _), truth = conditions(performer, motion, seed)
    found = results(model, vae, sync, rig, partial, normals)
    frames, _ = views.fit_to_vae(truth)
    found["VAE round trip"] = views.decode_views(vae, views.encode_views(vae, frames))
    sheets.append(
        torch.cat([contact_sheet(Views(v, None, rig), 4) for v in
                   (truth.frames, partial.frames, found["trained sync"], found["no sync"])], 2)
    )  # fmt: skip
    inside = truth.masks > 0.5
    seen = inside & (visibility.frames[:, :, 0] == 1)
    return {
        name: [
            psnr(v, truth.frames, inside),
            psnr(v, truth.frames, seen),
            psnr(v, truth.frames, inside & ~seen),
            silhouette_iou(v, truth.masks),
        ]
        for name, v in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, help="truth | partial | trained sync | no sync")
    args = parser.parse_args()
    in_comfyui.start()
    scores, sheets = [], []
    with torch.inference_mode():
        models = in_comfyui.tiny_models()
        for n, (performer, motion) in enumerate(CLIPS):
            scores.append(evaluate(performer, motion, 1_000_003 + n, models, sheets))
            print(performer, motion, {k: [round(x, 2) for x in v] for k, v in scores[-1].items()})
    print(f"{'':16}  inside    seen  unseen  silhouette IoU   (mean of {len(CLIPS)} clips)")
    for name in scores[0]:
        mean = torch.tensor([s[name] for s in scores]).mean(0).tolist()
        print(f"{name:16}  {mean[0]:6.2f}  {mean[1]:6.2f}  {mean[2]:6.2f}  {mean[3]:.3f}")
    if args.picture:
        from turnaround.nodes.run import to_pil

        to_pil(torch.cat(sheets, 1)).save(args.picture, quality=88)


if __name__ == "__main__":
    main()
