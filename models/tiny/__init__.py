"""Turnaround-Tiny: the embedded model family, its training and its conversion to native layouts.

`vae/`, `diffusion_models/` and `model_patches/` hold the weights that ComfyUI's loaders list;
`MODEL_CARD.md` says how they were made and how well they do.
"""
