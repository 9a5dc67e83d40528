"""OpenAI's nine CLIP models and GroupViT: architectures, sizes, and where their weights are."""

from typing import Any, NamedTuple

from trm_jax.models.clip.config import CLIP_MEAN, CLIP_STD, validate
from trm_jax.types import UserError


def _clip(embed_dim: int, image: dict[str, Any], text_width: int = 512) -> dict[str, Any]:
    return {
        "embed_dim": embed_dim,
        "dense_pos_embed": False,
        "image": {**image, "mean": CLIP_MEAN, "std": CLIP_STD},
        "text": {
            "vocab_size": 49408,
            "context_length": 77,
            "width": text_width,
            "heads": text_width // 64,
            "layers": 12,
            "activation": "quick_gelu",
            "eos_id": 49407,
        },
    }


def _resnet(layers: tuple[int, ...], width: int, image_size: int) -> dict[str, Any]:
    heads = width * 32 // 64
    return {
        "kind": "resnet",
        "layers": layers,
        "width": width,
        "heads": heads,
        "image_size": image_size,
    }


def _vit(patch_size: int, width: int, layers: int, image_size: int = 224) -> dict[str, Any]:
    return {
        "kind": "vit",
        "patch_size": patch_size,
        "width": width,
        "layers": layers,
        "heads": width // 64,
        "activation": "quick_gelu",
        "image_size": image_size,
    }


def _groupvit() -> dict[str, Any]:
    """NVlabs' GroupViT-S: the published configuration, with the pixels it was trained on."""
    config = _clip(256, {}, text_width=256)
    image = {"kind": "groupvit", "patch_size": 16, "image_size": 224}
    return {**config, "projector_hidden": 4096, "image": image}


# Radford et al. 2021, Tables 19 and 20; Xu et al. 2022, section 4.1.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "RN50": _clip(1024, _resnet((3, 4, 6, 3), 64, 224)),
    "RN101": _clip(512, _resnet((3, 4, 23, 3), 64, 224)),
    "RN50x4": _clip(640, _resnet((4, 6, 10, 6), 80, 288), 640),
    "RN50x16": _clip(768, _resnet((6, 8, 18, 8), 96, 384), 768),
    "RN50x64": _clip(1024, _resnet((3, 15, 36, 10), 128, 448), 1024),
    "ViT-B/32": _clip(512, _vit(32, 768, 12)),
    "ViT-B/16": _clip(512, _vit(16, 768, 12)),
    "ViT-L/14": _clip(768, _vit(14, 1024, 24), 768),
    "ViT-L/14-336": _clip(768, _vit(14, 1024, 24, 336), 768),
    "groupvit": _groupvit(),
}
# Ends the name of the same towers with GELU, which OpenCLIP's own training uses and shapes hide.
GELU = "-gelu"
# As OpenAI's own program calls it.
_ALIASES = {"ViT-L/14@336px": "ViT-L/14-336"}


class Published(NamedTuple):
    """What is published of a model.

    Attributes:
      parameters: of both towers and the logit scale, without BatchNorm's running statistics.
      openai_file: the name of OpenAI's TorchScript archive; "" for a model of others.
      openai_sha256: of that file; OpenAI's download address contains it.
      repository: on the Hugging Face hub, with the weights as safetensors by OpenCLIP's names, or
        a GroupViT's by transformers'.
      revision: the commit that is fetched; None where none is known: then the branch "main".
      sha256: of the safetensors file at that commit.
    """

    parameters: int
    openai_file: str
    openai_sha256: str
    repository: str
    revision: str | None = None
    sha256: str | None = None


PUBLISHED = {
    "RN50": Published(
        102_007_137,
        "RN50.pt",
        "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
        "timm/resnet50_clip.openai",
        "ec3d92cf63a5f9d591f0d611b736895966c73076",
        "da0baa37fb2211eee5729ab69ed587eb10d48f5b7076ceeed01552fc3d4cb4ee",
    ),
    "RN101": Published(
        119_688_033,
        "RN101.pt",
        "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
        "timm/resnet101_clip.openai",
    ),
    "RN50x4": Published(
        178_300_601,
        "RN50x4.pt",
        "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
        "timm/resnet50x4_clip.openai",
    ),
    "RN50x16": Published(
        290_979_217,
        "RN50x16.pt",
        "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
        "timm/resnet50x16_clip.openai",
    ),
    "RN50x64": Published(
        623_258_305,
        "RN50x64.pt",
        "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
        "timm/resnet50x64_clip.openai",
    ),
    "ViT-B/32": Published(
        151_277_313,
        "ViT-B-32.pt",
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        "timm/vit_base_patch32_clip_224.openai",
        "a6f597a30f7b82c51704746581f9a4e41421e878",
        "e6d1bd7789aa45192b3bf90570a789b478bae1b74ebcce7eddd908e83a2b7c31",
    ),
    "ViT-B/16": Published(
        149_620_737,
        "ViT-B-16.pt",
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
        "timm/vit_base_patch16_clip_224.openai",
        "977e3dd0ec55ab8da155f2fbeb6b5f54948b6e3d",
        "4b8699299b1e8997753c64b052ba32031449d5d853f55a039148560ee02b820f",
    ),
    "ViT-L/14": Published(
        427_616_513,
        "ViT-L-14.pt",
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
        "timm/vit_large_patch14_clip_224.openai",
        "18d0535469bb561bf468d76c1d73aa35156c922b",
        "9ce2e8a8ebfff3793d7d375ad6d3c35cb9aebf3de7ace0fc7308accab7cd207e",
    ),
    "ViT-L/14-336": Published(
        427_944_193,
        "ViT-L-14-336px.pt",
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
        "timm/vit_large_patch14_clip_336.openai",
        "81e38efc4637de5023b10e75a7f9bd1c6fa6b010",
        "fbc415c3d0d7b79faed8f5ccfb740c32b7c4f5ffe7283b851f89c6231c01a8e0",
    ),
    "groupvit": Published(55_726_609, "", "", "nvidia/groupvit-gcc-yfcc"),
}
HUB = {name: published.repository for name, published in PUBLISHED.items()}
# Further weights of a known architecture: they are found by their repository, not by its name.
OTHER_WEIGHTS = {"nvidia/groupvit-gcc-redcaps": "groupvit"}


def known_name(name: str) -> str | None:
    """The key of ARCHITECTURES that a name, OpenAI's spelling of it or its repository means."""
    by_repository = {repository: known for known, repository in HUB.items()}
    known = _ALIASES.get(name, by_repository.get(name, name))
    return known if known in ARCHITECTURES else None


def architecture(name: str) -> dict[str, Any]:
    """The validated configuration of a named architecture or of a known hub repository.

    Args:
      name: may end in "-gelu": then every activation is GELU in place of QuickGELU.

    Raises:
      UserError: the name is unknown.
    """
    plain = name.removesuffix(GELU)
    known = OTHER_WEIGHTS.get(plain, known_name(plain))
    if known is None:
        raise UserError(
            f"model.architecture: {name!r} must be one of {', '.join(ARCHITECTURES)}, or one of "
            f"them with {GELU} at its end"
        )
    config = dict(ARCHITECTURES[known])
    if name.endswith(GELU):
        for tower in ("image", "text"):
            if "activation" in config[tower]:
                config[tower] = {**config[tower], "activation": "gelu"}
    return validate(config)


def published_as(sha256: str) -> str | None:
    """What a file with this SHA-256 was published as; None if it is none of the listed files."""
    for published in PUBLISHED.values():
        if sha256 == published.openai_sha256:
            return f"OpenAI's {published.openai_file}"
        if sha256 == published.sha256:
            return f"open_clip_model.safetensors of {published.repository}"
    return None
