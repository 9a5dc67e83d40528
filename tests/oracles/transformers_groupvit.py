"""transformers' GroupViTModel with random weights, and what it makes of images and texts.

All numbers are the library's own; only the order of calls is ours where its forward pass does not
offer what is compared (other image sizes, the groups before pooling).
"""

import re

import torch
import transformers

from tests.oracles import transformers_clip

state_dict = transformers_clip.state_dict


def tiny(seed=0):
    """An evaluation-mode GroupViTModel in which no number has its default value."""
    text = {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "vocab_size": 20, "max_position_embeddings": 7}
    vision = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 4}
    vision |= {"depths": [2, 1, 1], "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    vision |= {"num_group_tokens": [6, 3, 0], "num_output_groups": [6, 3, 0]}
    config = transformers.GroupViTConfig(
        text_config=text | {"bos_token_id": 18, "eos_token_id": 19, "pad_token_id": 0},
        vision_config=vision,
        projection_dim=6,
        projection_intermediate_dim=12,
    )
    model = transformers.GroupViTModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, _deviation(name, parameter), generator=generator)
            if re.search(r"norm\w*\.weight|projection\.1\.weight|projector\.0\.weight", name):
                parameter.add_(1.0)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.normal_(generator=generator).abs_().add_("running_var" in name)
    return model


def _deviation(name, parameter):
    if parameter.ndim < 2:
        return 0.2
    if "embedding" in name and "patch" not in name or "group_token" in name:
        return 0.5
    fan_in = parameter[0].numel()
    return (2.0 if "q_proj" in name or "k_proj" in name else 1.0) * fan_in**-0.5


def parameters_of_the_published_model():
    """How many parameters transformers' default configuration has; allocates none."""
    with torch.device("meta"):
        model = transformers.GroupViTModel(transformers.GroupViTConfig())
    return sum(parameter.numel() for parameter in model.parameters())


def image_features(model, pixels):
    """Normalised images [n, 3, H, W] of any size -> (embedding, groups, soft assignments).

    [n, d], [n, G, d] and, of each stage that groups, [n, G, N]; torch tensors.
    """
    vision = model.vision_model
    hidden = vision.embeddings(torch.as_tensor(pixels), interpolate_pos_encoding=True)
    encoded = vision.encoder(
        hidden_states=hidden, output_hidden_states=False, output_attentions=True, return_dict=True
    )
    groups = vision.layernorm(encoded.last_hidden_state)
    embedding = model.visual_projection(groups.mean(dim=1))
    if model.training:
        return embedding, None, encoded.attentions
    projected = model.visual_projection(groups.reshape(-1, groups.shape[-1]))
    return embedding, projected.reshape(*groups.shape[:2], -1), encoded.attentions


@torch.no_grad()
def outputs(model, pixels, tokens):
    """Of the forward pass itself: (image embeddings, text embeddings), unit norm, in numpy."""
    out = model(input_ids=torch.as_tensor(tokens).long(), pixel_values=torch.as_tensor(pixels))
    return out.image_embeds.numpy(), out.text_embeds.numpy()


@torch.no_grad()
def text_features(model, tokens):
    """Token ids [n, T] -> [n, d] in numpy."""
    pooled = model.text_model(torch.as_tensor(tokens).long()).pooler_output
    return model.text_projection(pooled).numpy()
