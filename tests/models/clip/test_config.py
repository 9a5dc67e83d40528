"""Configurations are checked, completed and normalised."""

import copy
import json

import ml_collections
import pytest

from trm_jax.models.clip.config import validate
from trm_jax.types import UserError

CONFIG = {
    "embed_dim": 8,
    "image": {"kind": "resnet", "layers": [1, 1], "width": 4, "heads": 2, "image_size": 16},
    "text": {
        "vocab_size": 9,
        "context_length": 7,
        "width": 4,
        "heads": 2,
        "layers": 1,
        "eos_id": 3,
    },
}


def test_defaults_are_filled_in_and_every_mapping_gives_the_same():
    full = validate(CONFIG)
    assert full["dense_pos_embed"] is False
    assert full["image"]["layers"] == (1, 1)
    assert full["text"]["activation"] == "quick_gelu"
    assert full["image"]["mean"] == (0.48145466, 0.4578275, 0.40821073)
    assert validate(full) == full
    assert validate(json.loads(json.dumps(full))) == full
    assert validate(ml_collections.ConfigDict(CONFIG)) == full
    assert validate(ml_collections.FrozenConfigDict(CONFIG)) == full


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("image.kind", "convnext", "model.clip.image.kind = 'convnext' must be one of resnet, vit"),
        ("image.depth", 3, "model.clip.image.depth is no field"),
        ("image.layers", (), "model.clip.image.layers must list"),
        ("image.layers", (1, 0), "model.clip.image.layers must list"),
        ("image.image_size", 20, "image_size = 20 must be a multiple of the total stride = 8"),
        ("image.heads", 0, "model.clip.image.heads must be a positive integer"),
        ("image.mean", (0.5,), "model.clip.image.mean must have three values"),
        ("text.heads", 3, "model.clip.text.width = 4 must be a multiple of heads = 3"),
        ("text.activation", "relu", "model.clip.text.activation = 'relu' must be one of gelu"),
        ("text.eos_id", 9, "model.clip.text.eos_id = 9 lies outside"),
        ("embed_dim", None, "model.clip.embed_dim must be a positive integer"),
        ("text", 3, "model.clip.text must be a mapping"),
    ],
)
def test_mistakes_are_named(path, value, message):
    config = copy.deepcopy(CONFIG)
    *parents, leaf = path.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    section[leaf] = value
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        validate(config)


def test_a_missing_field_is_named():
    config = copy.deepcopy(CONFIG)
    del config["text"]["eos_id"]
    with pytest.raises(UserError, match="model.clip.text.eos_id is missing"):
        validate(config)
