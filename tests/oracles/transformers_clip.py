"""transformers' CLIPModel with random weights, and what it says of images and texts.

The pooled embeddings are the library's own. The dense features are computed here from its modules:
the last block's value path (MaskCLIP, Zhou et al. 2022), then post_layernorm and projection.
"""

import re

import torch
import transformers


def randomised(vision, text, embed_dim, seed=0):
    """An evaluation-mode CLIPModel in which no weight has its default value.

    Linear maps keep the scale of their inputs, so that activations neither vanish nor explode at
    any depth; queries and keys are larger, so that attention is not flat; position embeddings are
    as large as what they are added to.

    Args:
      vision, text: fields of transformers' CLIPVisionConfig and CLIPTextConfig.
      embed_dim: d of the joint space.
      seed: of the weights.
    """
    config = transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=embed_dim
    )
    model = transformers.CLIPModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, _deviation(name, parameter), generator=generator)
            if re.search(r"norm\d?\.weight", name):
                parameter.add_(1.0)
    return model


def _deviation(name, parameter):
    if parameter.ndim < 2:
        return 0.2
    if "embedding" in name and "patch" not in name:
        return 0.5
    fan_in = parameter[0].numel()
    return (2.0 if "q_proj" in name or "k_proj" in name else 1.0) * fan_in**-0.5


def state_dict(model):
    """The weights as numpy arrays."""
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def image_features(model, pixels):
    """Normalised images [n, 3, H, W] of any size -> (pooled [n, d], dense [n, hw, d]) in numpy."""
    output = model.vision_model(
        torch.from_numpy(pixels), interpolate_pos_encoding=True, output_hidden_states=True
    )
    pooled = model.visual_projection(output.pooler_output)
    block = model.vision_model.encoder.layers[-1]
    tokens = output.hidden_states[-2][:, 1:]
    attention = block.self_attn
    tokens = tokens + attention.out_proj(attention.v_proj(block.layer_norm1(tokens)))
    tokens = tokens + block.mlp(block.layer_norm2(tokens))
    dense = model.visual_projection(model.vision_model.post_layernorm(tokens))
    return pooled.numpy(), dense.numpy()


@torch.no_grad()
def text_features(model, tokens):
    """Token ids [n, T] -> [n, d] in numpy."""
    pooled = model.text_model(torch.from_numpy(tokens).long()).pooler_output
    return model.text_projection(pooled).numpy()
