"""Weights from the Hugging Face hub: fetched when a run asks for them, found in its cache later."""

import re
from pathlib import Path

from trm_jax.pretrained.architectures import PUBLISHED
from trm_jax.types import UserError

# What a repository of CLIP weights may hold, best first: OpenCLIP's file, transformers' file, and
# the same as a state dict of torch.
FILES = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
# What may lie beside them and says what no tensor tells.
OPENCLIP_CONFIG = "open_clip_config.json"
TRANSFORMERS_CONFIG = "config.json"
PREPROCESSOR_CONFIG = "preprocessor_config.json"


def fetch(repository: str, revision: str | None = None) -> Path:
    """The local copy of the weights of a repository "owner/name"; downloads them if need be.

    Args:
      repository: on the hub.
      revision: a commit, a tag or a branch; None is the branch "main".

    Raises:
      UserError: the hub cannot be reached and has no cached copy, or the repository has no weights.
    """
    # Imported here: it is slow, and most runs need no hub.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    where = f"{repository}@{revision}" if revision else repository
    problem: Exception | None = None
    offline = False
    for name in FILES:
        try:
            return Path(
                hf_hub_download(repository, name, revision=revision, local_files_only=offline)
            )
        except LocalEntryNotFoundError as error:
            offline, problem = True, error  # another of the files may be in the cache
        except EntryNotFoundError:
            continue
        # Other errors come from whichever HTTP library the hub's client uses.
        except Exception as error:
            problem = error
            break
    if problem is None:
        raise UserError(
            f"model.pretrained: {where} on the hub holds none of {', '.join(FILES)}; give the path "
            "of a file"
        )
    raise UserError(
        f"model.pretrained: cannot fetch the weights of {where} ({type(problem).__name__}), nor "
        f"are they in the cache; {_elsewhere(repository, where)}, or use 'random'"
    ) from problem


def _elsewhere(repository: str, where: str) -> str:
    """What can be done on a machine that does not reach the hub."""
    for name, published in PUBLISHED.items():
        if published.repository == repository and published.openai_file:
            return (
                f"elsewhere, download {FILES[0]} of {where} and give its path, or put OpenAI's "
                f"{published.openai_file} into ~/.cache/clip and set model.pretrained={name}"
            )
    return (
        f"elsewhere, download one of {', '.join(FILES)} of {where}, and {OPENCLIP_CONFIG} or "
        f"{TRANSFORMERS_CONFIG} beside it, and give its path"
    )


def fetch_beside(path: Path) -> None:
    """Fetches what the repository of weights says of them, if it does, from the same commit.

    Args:
      path: what `fetch` returned.
    """
    from huggingface_hub import hf_hub_download

    found = commit(path)
    if not found:
        return
    own = (OPENCLIP_CONFIG,) if path.name.startswith("open_clip") else ()
    for name in own or (TRANSFORMERS_CONFIG, PREPROCESSOR_CONFIG):
        try:
            hf_hub_download(
                found["repository"], name, revision=found["commit"], local_files_only=False
            )
        # The weights can do without: whoever loads them is told what is assumed instead.
        except Exception:
            return


def commit(path: Path) -> dict[str, str]:
    """{"repository", "commit"} of a file in the hub's cache, by its path; {} for other files."""
    match = re.search(r"/models--([^/]+)/snapshots/([0-9a-f]{40})/", path.absolute().as_posix())
    if not match:
        return {}
    return {"repository": match[1].replace("--", "/", 1), "commit": match[2]}
