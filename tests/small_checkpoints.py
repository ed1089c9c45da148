"""Published checkpoints in small: their own keys, few and narrow layers, random weights.

ComfyUI's own detection and loaders take them for the real ones. Only the text encoder's width is
fixed there by a file of its own, so as a pack in `custom_nodes` this module writes all files and
brings a loader that names a smaller width; everything behind that loader is ComfyUI's.
"""

import io as bytes_io
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

DIM = 128
"""ComfyUI takes heads of 128."""
VACE_FILE = "diffusion_models/wan2.1_vace_1.3B_fp16.safetensors"
TEXT_FILE = "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors"
VAE_FILE = "vae/wan_2.1_vae.safetensors"
TEXT_LAYERS = 24
"""In the file, as ComfyUI knows umt5_xxl by its 24th block; one is used."""
TEXT_CONFIG = {
    "d_ff": 8, "d_kv": 8, "d_model": 4096, "num_heads": 1, "num_layers": 1,
    "vocab_size": 400, "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True,
    "model_type": "umt5",
}  # fmt: skip
TEXT_OPTIONS = {"umt5xxl_model_config": TEXT_CONFIG}
"""As ComfyUI's loader reads them."""
CORPUS = (
    "a performer in a red coat turns, front back side three-quarter view facing left right above"
)


def random_weights(module: torch.nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Weights that keep signals near unit size."""
    weights = {}
    for n, (name, value) in enumerate(module.state_dict().items()):
        fan_in = value[0].numel() if value.ndim > 1 else DIM
        generator = torch.Generator().manual_seed(seed + n)
        weights[name] = torch.randn(value.shape, generator=generator) * fan_in**-0.5
        if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
            weights[name] += 1
    return weights


def transformer(kind: str = "t2v", in_dim: int = 16, **more) -> dict[str, Tensor]:
    """A Wan of two blocks; kind: t2v, i2v or vace."""
    import comfy.ops
    from comfy.ldm.wan import model

    network = model.VaceWanModel if kind == "vace" else model.WanModel
    return random_weights(network(
        model_type=kind, in_dim=in_dim, dim=DIM, ffn_dim=256, num_heads=1, num_layers=2,
        operations=comfy.ops.disable_weight_init, dtype=torch.float32, **more,
    ))  # fmt: skip


def vace() -> dict[str, Tensor]:
    """VACE tells of 32 channels of frames and 64 of mask."""
    return transformer("vace", vace_layers=2, vace_in_dim=96)


def vae() -> dict[str, Tensor]:
    from comfy.ldm.wan.vae import WanVAE

    return random_weights(WanVAE(
        dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
        temperal_downsample=[False, True, True],
    ))  # fmt: skip


def loaded_large_vae():
    """The VAE of Wan 2.2 5B. ComfyUI knows it by its keys and fixes its width, which is shrunk."""
    import comfy.sd
    from comfy.ldm.wan import vae2_2

    network = vae2_2.WanVAE

    def narrow(**config):
        return network(**{**config, "dim": 8, "dec_dim": 8})

    weights = random_weights(narrow(
        z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
        temperal_downsample=[False, True, True],
    ))  # fmt: skip
    vae2_2.WanVAE = narrow
    try:
        return comfy.sd.VAE(sd=weights)
    finally:
        vae2_2.WanVAE = network


def text_encoder() -> dict[str, Tensor]:
    """With a tokenizer that knows a few words and spells the rest."""
    import comfy.ops
    from comfy.text_encoders.t5 import T5
    from sentencepiece import SentencePieceTrainer

    tokenizer = bytes_io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([CORPUS]), model_writer=tokenizer, vocab_size=320,
        byte_fallback=True, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    config = {**TEXT_CONFIG, "num_layers": TEXT_LAYERS}
    weights = random_weights(T5(config, torch.float32, "cpu", comfy.ops.disable_weight_init))
    spiece = torch.frombuffer(bytearray(tokenizer.getvalue()), dtype=torch.uint8)
    return {**weights, "spiece_model": spiece}


def clip(weights: dict[str, Tensor]):
    """The small text encoder as ComfyUI loads it."""
    import comfy.sd

    return comfy.sd.load_text_encoder_state_dicts(
        [weights], clip_type=comfy.sd.CLIPType.WAN, model_options=TEXT_OPTIONS
    )


def write_all(models: Path) -> None:
    """The three files of the VACE workflow, below ComfyUI's folder of models."""
    for file, make in ((VACE_FILE, vace), (TEXT_FILE, text_encoder), (VAE_FILE, vae)):
        (models / file).parent.mkdir(parents=True, exist_ok=True)
        save_file(make(), models / file)


async def comfy_entrypoint():
    """What ComfyUI calls when this file lies among its custom nodes."""
    import comfy.sd
    import folder_paths
    from comfy_api.latest import ComfyExtension, io

    write_all(Path(folder_paths.models_dir))

    class SmallCLIPLoader(io.ComfyNode):
        """CLIPLoader, told of the smaller width."""

        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(
                node_id="SmallCLIPLoader",
                inputs=[
                    io.Combo.Input(
                        "clip_name", options=folder_paths.get_filename_list("text_encoders")
                    ),
                    io.String.Input("type"),
                    io.String.Input("device"),
                ],
                outputs=[io.Clip.Output()],
            )

        @classmethod
        def execute(cls, clip_name, type, device) -> io.NodeOutput:
            path = folder_paths.get_full_path_or_raise("text_encoders", clip_name)
            kind = getattr(comfy.sd.CLIPType, type.upper())
            loaded = comfy.sd.load_clip([path], clip_type=kind, model_options=TEXT_OPTIONS)
            return io.NodeOutput(loaded)

    class Extension(ComfyExtension):
        async def get_node_list(self) -> list[type[io.ComfyNode]]:
            return [SmallCLIPLoader]

    return Extension()
