"""The LoRA of a subject as ComfyUI's own patches of a model's weights."""

import comfy.lora
from comfy.model_patcher import ModelPatcher

from ..models.subject import SubjectNet


def with_lora(model: ModelPatcher, net: SubjectNet) -> ModelPatcher:
    """A clone with the subject's LoRA on it; the model itself when there is none."""
    if net.lora is None:
        return model
    weights, names = {}, {}
    for name, (up, down) in net.lora.layers().items():
        weights[f"{name}.lora_up.weight"], weights[f"{name}.lora_down.weight"] = up, down
        names[name] = f"diffusion_model.{name}.weight"
    patched = model.clone()
    patched.add_patches(comfy.lora.load_lora(weights, names, log_missing=False))
    return patched
