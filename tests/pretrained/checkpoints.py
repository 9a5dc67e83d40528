"""One model in all published formats, made without torch."""

import numpy as np
import safetensors.numpy

from tests.oracles.random_variables import random_variables
from tests.pretrained import archives
from trm_jax.pretrained import convert

TEXT = {"vocab_size": 9, "context_length": 7, "width": 8, "heads": 1, "layers": 2, "eos_id": 8}
VIT = {"kind": "vit", "patch_size": 8, "width": 8, "layers": 2, "heads": 1, "image_size": 16}
RESNET = {"kind": "resnet", "layers": (2, 1), "width": 4, "heads": 1, "image_size": 16}
CONFIGS = {
    "vit": {"embed_dim": 6, "image": VIT, "text": TEXT},
    "resnet": {"embed_dim": 6, "image": RESNET, "text": TEXT},
}
# OpenAI's archives hold these as well.
SCALARS = {
    "input_resolution": np.int64(16),
    "context_length": np.int64(7),
    "vocab_size": np.int64(9),
}
BLOCK = {
    "attn.out_proj.": "self_attn.out_proj.",
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


def half_state(kind, seed=0):
    """An OpenCLIP state dict whose numbers float16 holds exactly, as float16."""
    state = convert.to_openclip(random_variables(CONFIGS[kind], seed))
    return {name: array.astype(np.float16) for name, array in state.items()}


def transformers_state(state):
    """A ViT's state dict by the names of transformers' CLIPModel, written down once more here."""
    renamed = {
        "logit_scale": state["logit_scale"],
        "text_projection.weight": state["text_projection"].T,
        "visual_projection.weight": state["visual.proj"].T,
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "vision_model.embeddings.position_ids": np.arange(5)[None],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
    }
    for leaf in ("weight", "bias"):
        renamed[f"vision_model.pre_layrnorm.{leaf}"] = state[f"visual.ln_pre.{leaf}"]
        renamed[f"vision_model.post_layernorm.{leaf}"] = state[f"visual.ln_post.{leaf}"]
        renamed[f"text_model.final_layer_norm.{leaf}"] = state[f"ln_final.{leaf}"]
        for tower, prefix in (("vision_model", "visual."), ("text_model", "")):
            for layer in range(2):
                old = f"{prefix}transformer.resblocks.{layer}."
                new = f"{tower}.encoder.layers.{layer}."
                for part, name in BLOCK.items():
                    renamed[f"{new}{name}{leaf}"] = state[f"{old}{part}{leaf}"]
                for letter, third in zip(
                    "qkv", np.split(state[f"{old}attn.in_proj_{leaf}"], 3), strict=True
                ):
                    renamed[f"{new}self_attn.{letter}_proj.{leaf}"] = third
    return renamed


def write_all(folder, kind):
    """{format: file} of the same model; transformers has no ResNet."""
    state = half_state(kind)
    full = {name: array.astype(np.float32) for name, array in state.items()}
    paths = {"openclip": folder / "open_clip_model.safetensors"}
    safetensors.numpy.save_file(full, paths["openclip"])
    paths["openai"] = archives.write_script(folder / "openai.pt", state | SCALARS)
    paths["state dict"] = archives.write_state_dict(folder / "state.pt", state)
    if kind == "vit":
        paths["transformers"] = folder / "model.safetensors"
        renamed = {k: np.array(v, order="C") for k, v in transformers_state(full).items()}
        safetensors.numpy.save_file(renamed, paths["transformers"])
    return paths
