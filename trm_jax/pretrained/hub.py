"""Weights from the Hugging Face hub: fetched when a run asks for them, found in its cache later."""

import re
from pathlib import Path

from trm_jax.types import UserError

# What a repository of CLIP weights may hold, best first: OpenCLIP's file, transformers' file, and
# the same as a state dict of torch.
FILES = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)


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
        "are they in the cache; download them elsewhere and give their path, or use 'random'"
    ) from problem


def commit(path: Path) -> dict[str, str]:
    """{"repository", "commit"} of a file in the hub's cache, by its path; {} for other files."""
    match = re.search(r"/models--([^/]+)/snapshots/([0-9a-f]{40})/", path.absolute().as_posix())
    if not match:
        return {}
    return {"repository": match[1].replace("--", "/", 1), "commit": match[2]}
