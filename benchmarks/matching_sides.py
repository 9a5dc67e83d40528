"""What benchmarks/matching.py measures: images and captions, and three programs that match them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from trm_jax.data.caption_words import CaptionWords
from trm_jax.evaluate import knowledge_matching

# Words of captions by rank follow (rank + 2.7) ** -1.4: then 5,000 captions of 10 words have 3,200
# different ones and 25,000 have 7,200, as Flickr8k's test captions (3,132) and those of COCO's
# val2017 (7,857).
_SHIFT, _EXPONENT = 2.7, 1.4


class Task(NamedTuple):
    """One measurement; its rows are written together.

    part: of matching_workers.PARTS. sides: of SIDES. images, captions: of the evaluation. regions:
    of an image. width: Z. words: of a caption, in the mean. knowledge: K. torch_images: that
    PyTorch is timed with, 0 for all. memory_mb: of a block of images. threads: of a CPU, 0 on a
    GPU.
    """

    part: str
    sides: tuple[str, ...] = ()
    images: int = 0
    captions: int = 0
    regions: int = 36
    width: int = 512
    words: int = 10
    knowledge: int = 12_385
    torch_images: int = 50
    memory_mb: float = 16.0
    threads: int = 0
    rounds: int = 3

    @property
    def condition(self) -> dict[str, Any]:
        """Of the rows."""
        fields = self._asdict()
        names = ("threads", "regions", "width", "words", "knowledge", "memory_mb")
        size = {"size": f"{self.images} x {self.captions}"} if self.images else {}
        return {name: fields[name] for name in names} | size | {"dtype": "float32"}

    def label(self, device: str) -> str:
        """Names the measurement in the results file; the same for every number of rounds."""
        fields = {k: v for k, v in self._asdict().items() if k not in ("part", "rounds", "sides")}
        words = [device, self.part, "+".join(self.sides), *(f"{k}={v}" for k, v in fields.items())]
        return " ".join(filter(None, words))


def read_task(fields: Mapping[str, Any]) -> Task:
    """The task whose fields went through JSON."""
    return Task(**{**fields, "sides": tuple(fields["sides"])})


class Inputs(NamedTuple):
    """regions: [n, r, Z]. mask: [n, r]. captions: m of them. prototypes: [U, Z] of their words."""

    regions: np.ndarray
    mask: np.ndarray
    captions: CaptionWords
    prototypes: np.ndarray


def draw(task: Task, seed: int = 0) -> Inputs:
    """Random regions and prototypes of any length; captions with words as often as real ones."""
    rng = np.random.default_rng(seed)
    regions = rng.standard_normal((task.images, task.regions, task.width), np.float32)
    mask = np.ones(regions.shape[:2], bool)
    mask[::7, -1] = False  # not all images have as many
    captions = draw_captions(task, rng)
    prototypes = rng.standard_normal((len(captions.words), task.width), np.float32)
    return Inputs(regions, mask, captions, prototypes)


def draw_captions(task: Task, rng: np.random.Generator) -> CaptionWords:
    """Captions of `task.words` words in the mean, half as many to half as many again."""
    least, most = max(1, task.words - task.words // 2), task.words + task.words // 2
    lengths = rng.integers(least, most + 1, task.captions)
    frequency = (np.arange(task.knowledge) + _SHIFT) ** -_EXPONENT
    drawn = rng.choice(task.knowledge, lengths.sum(), p=frequency / frequency.sum())
    used, indices = np.unique(drawn, return_inverse=True)
    return CaptionWords(
        indptr=np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
        indices=indices.astype(np.int32),
        words=tuple(f"word{k}" for k in used),
        known=np.ones(len(used), bool),
        dropped={},
    )


def ours(task: Task, inputs: Inputs, out: np.ndarray) -> Callable[[], int]:
    """score_all into `out` [n, m], the regions as a batch on the host; returns the images done."""

    def run() -> int:
        knowledge_matching.score_all(
            [(inputs.regions, inputs.mask)],
            inputs.prototypes,
            inputs.captions,
            memory_mb=task.memory_mb,
            out=out,
        )
        return len(out)

    return run


def with_numpy(task: Task, inputs: Inputs, out: np.ndarray) -> Callable[[], int]:
    """The same algorithm by BLAS and SciPy: a table of images and words, and its sparse means."""
    lengths = np.diff(inputs.captions.indptr)
    shape = (len(lengths), len(inputs.captions.words))
    weights = np.repeat(1 / np.maximum(lengths, 1), lengths).astype(np.float32)
    means = sparse.csr_array((weights, inputs.captions.indices, inputs.captions.indptr), shape)
    block = max(1, int(task.memory_mb * 1e6 / (4 * task.regions * len(inputs.prototypes))))

    def run() -> int:
        words = np.ascontiguousarray(_unit(inputs.prototypes).T)
        for start in range(0, len(out), block):
            part = inputs.regions[start : start + block]
            cosines = _unit(part).reshape(-1, part.shape[2]) @ words
            cosines = cosines.reshape(*part.shape[:2], -1)
            kept = inputs.mask[start : start + block, :, None]
            table = np.where(kept, cosines, -np.inf).max(axis=1)
            out[start : start + block] = (means @ table.T).T
        return len(out)

    return run


def with_torch(task: Task, inputs: Inputs, out: np.ndarray) -> Callable[[], int]:
    """One image after the other, with the words of all captions: max over regions, mean over words.

    A word that several captions have meets every image as often. Only the first `torch_images` rows
    of `out` are written.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    count, lengths = task.torch_images or len(out), np.diff(inputs.captions.indptr)
    count = min(count, len(out))
    owner = torch.as_tensor(np.repeat(np.arange(len(lengths)), lengths), device=device)
    sizes = torch.as_tensor(np.maximum(lengths, 1), device=device)
    rows = torch.as_tensor(inputs.captions.indices, device=device)

    @torch.no_grad()
    def run() -> int:
        words = torch.as_tensor(inputs.prototypes, device=device)
        words = torch.nn.functional.normalize(words, dim=1)[rows]
        for image in range(count):
            regions = torch.as_tensor(inputs.regions[image], device=device)
            regions = torch.nn.functional.normalize(regions, dim=1)
            cosines = words @ regions[torch.as_tensor(inputs.mask[image], device=device)].T
            best = cosines.max(dim=1).values
            sums = torch.zeros(len(lengths), device=device).index_add_(0, owner, best)
            out[image] = (sums / sizes).cpu().numpy()
        return count

    return run


SIDES: dict[str, Callable[[Task, Inputs, np.ndarray], Callable[[], int]]] = {
    "ours": ours,
    "NumPy": with_numpy,
    "PyTorch": with_torch,
}


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
