"""Our names of a GroupViT's variables and those of transformers' GroupViTModel.

It is the only public form of these weights: nvidia/groupvit-gcc-yfcc and -redcaps have it. Names
map one to one, query, key and value included.
"""

import re
from collections.abc import Iterable

Path = tuple[str, ...]

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_RULES = (
    (r"^image\.stage_(\d+)\.", r"vision_model.encoder.stages.\1."),
    (r"^image\.patch_embedding\.", "vision_model.embeddings.patch_embeddings.projection."),
    (r"^image\.patch_norm\.", "vision_model.embeddings.layernorm."),
    (r"^image\.positional_embedding$", "vision_model.embeddings.position_embeddings"),
    (r"^image\.norm\.", "vision_model.layernorm."),
    (r"\.blocks_(\d+)\.attn\.", r".layers.\1.self_attn."),
    (r"\.blocks_(\d+)\.norm", r".layers.\1.layer_norm"),
    (r"\.blocks_(\d+)\.mlp\.", r".layers.\1.mlp."),
    (r"\.projector_norm\.", ".group_projector.0."),
    (r"\.projector\.", ".group_projector.1."),
    (r"\.grouping\.norm_post\.", ".grouping.norm_post_tokens."),
    (r"\.grouping\.norm_new\.", ".grouping.norm_new_x."),
    (r"\.token_mlp\.", ".mlp_inter."),
    (r"\.channel_mlp\.", ".mlp_channels."),
    (r"\.cross\.", ".pre_assign_attn."),
    (r"\.assign\.out_proj\.", ".assign.proj."),
    (r"\.grouping\.", ".downsample."),
    (r"^text\.token_embedding$", "text_model.embeddings.token_embedding.weight"),
    (r"^text\.positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^text\.ln_final\.", "text_model.final_layer_norm."),
    (r"^text\.resblocks_(\d+)\.attn\.", r"text_model.encoder.layers.\1.self_attn."),
    (r"^text\.resblocks_(\d+)\.ln_", r"text_model.encoder.layers.\1.layer_norm"),
    (r"^text\.resblocks_(\d+)\.mlp\.c_fc\.", r"text_model.encoder.layers.\1.mlp.fc1."),
    (r"^text\.resblocks_(\d+)\.mlp\.c_proj\.", r"text_model.encoder.layers.\1.mlp.fc2."),
    (r"^(visual|text)_projector\.fc1\.", r"\1_projection.0."),
    (r"^(visual|text)_projector\.bn\.", r"\1_projection.1."),
    (r"^(visual|text)_projector\.fc2\.", r"\1_projection.3."),
)


def is_groupvit(names: Iterable[str]) -> bool:
    """Whether a state dict with these names is a GroupViT of transformers."""
    return any(name.startswith("vision_model.encoder.stages.") for name in names)


def has_groups(paths: Iterable[Path]) -> bool:
    """Whether variables with these paths are those of a GroupViT."""
    return ("params", "image", "stage_0", "group_token") in paths


def name_of(path: Path) -> str:
    """transformers' name of a variable; one that it does not have keeps ours."""
    name = ".".join((*path[1:-1], _LEAVES.get(path[-1], path[-1])))
    name = re.sub(r"^image_projector\.", "visual_projector.", name)
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def has_batch_axis(name: str) -> bool:
    """Whether transformers keeps a tensor with a first axis of one, which we leave out."""
    return name.endswith((".position_embeddings", ".group_token"))
