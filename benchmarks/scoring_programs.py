"""What benchmarks/scoring.py measures: images and captions, the programs, and their FLOPs.

An evaluation is cut as the evaluator cuts it: captions sorted by length in batches, each padded to
one of data.length_buckets, every batch of images with every batch of captions.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs import common_napreg
from trm_jax.methods import pair_models
from trm_jax.models.matching import model as matching
from trm_jax.models.matching.config import validate

# Name -> (kind, fields of the scorer).
SCORERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SCAN i2t": ("scan", {"direction": "i2t"}),
    "SCAN t2i": ("scan", {"direction": "t2i"}),
    "NAAF": ("naaf", {}),
    "SAF": ("sgraf", {"module": "saf"}),
    "SGR": ("sgraf", {"module": "sgr"}),
}
# Of 30,000 captions of Flickr8k: how many have 4, 5, .. tokens, <start> and <end> included.
LENGTHS = (
    8, 27, 176, 396, 956, 1983, 2519, 2823, 3210, 3173, 3045, 2692, 2323, 1841, 1371, 966, 722, 569,
    385, 257, 150, 134, 91, 64, 37, 31, 16, 6, 7, 10, 5, 1, 3, 2, 0, 0, 0, 0, 1,
)  # fmt: skip
SHORTEST = 4
# Regions and words of one concept have a cosine near 0.8, others near 0: no score of NAAF hangs on
# the rounding of a similarity at its threshold.
CONCEPTS, THRESHOLD = 200, 0.4
SPREAD = 50.0  # of SGRAF's last map, whose scores are all alike at the start


class Task(NamedTuple):
    """One measurement; its rows are written together.

    part: a function of scoring_workers.py. scorer: of SCORERS. threads: CPU threads, 0 on a GPU.
    images: of a batch, of as many captions. captions: those of a batch that PyTorch is timed with,
    0 for all. block: model.options.block, -1 for that of the configs. buckets: lengths of captions.
    sizes: (images, captions) of the evaluations; whole: the first is run, and not a batch of each
    length.
    """

    part: str
    scorer: str
    threads: int = 0
    images: int = 128
    captions: int = 32
    width: int = 1024
    sim_dim: int = 256
    regions: int = 36
    block: int = -1
    buckets: tuple[int, ...] = (12, 16, 24, 32, 48, 80)
    sizes: tuple[tuple[int, int], ...] = ()
    whole: bool = False
    rounds: int = 5

    @property
    def captions_at_a_time(self) -> int:
        """`block`, or what the configs have."""
        if self.block >= 0:
            return self.block
        return common_napreg.napreg(SCORERS[self.scorer][0], "").model.options.block

    @property
    def condition(self) -> dict[str, Any]:
        """Of the rows."""
        fields = self._asdict()
        names = ["threads", "images", "regions", "width"]
        names += ["sim_dim"] if SCORERS[self.scorer][0] == "sgraf" else []
        condition = {name: fields[name] for name in (*names, "buckets")}
        return condition | {"block": self.captions_at_a_time, "dtype": "float32"}

    def label(self, device: str) -> str:
        """Names the measurement in the results file; the same for every number of rounds."""
        fields = {k: v for k, v in self._asdict().items() if k not in ("part", "scorer", "rounds")}
        return " ".join([device, self.part, self.scorer, *(f"{k}={v}" for k, v in fields.items())])


def read_task(fields: Mapping[str, Any]) -> Task:
    """The task whose fields went through JSON."""
    tuples = {"buckets": tuple(fields["buckets"]), "sizes": tuple(map(tuple, fields["sizes"]))}
    return Task(**{**fields, **tuples})


class Batches(NamedTuple):
    """Caption batches of one padded length; zeros are captions that fill a batch up.

    lengths: [batches, captions].
    """

    length: int
    lengths: np.ndarray


def layout(captions: int, batch: int, buckets: Sequence[int]) -> list[Batches]:
    """Batches of captions whose lengths are distributed as those of Flickr8k, shortest first.

    Raises:
      ValueError: a caption is longer than all buckets.
    """
    known = np.repeat(np.arange(SHORTEST, SHORTEST + len(LENGTHS)), LENGTHS)
    lengths = known[((np.arange(captions) + 0.5) * len(known) / captions).astype(int)]
    rows = np.pad(lengths, (0, -captions % batch)).reshape(-1, batch)
    if rows.max() > max(buckets):
        raise ValueError(f"a caption of {rows.max()} tokens, and buckets up to {max(buckets)}")
    padded = np.array([min(size for size in buckets if size >= row.max()) for row in rows])
    return [Batches(int(size), rows[padded == size]) for size in np.unique(padded)]


def samples(all_batches: Sequence[Batches]) -> list[Batches]:
    """One batch for each padded length, its captions spread over those of all its batches."""
    chosen = []
    for size, rows in all_batches:
        real, batch = rows[rows > 0], rows.shape[1]
        if len(real) > batch:
            real = real[((np.arange(batch) + 0.5) * len(real) / batch).astype(int)]
        chosen.append(Batches(size, np.pad(real, (0, batch - len(real)))[None]))
    return chosen


def config(task: Task) -> dict[str, Any]:
    """The matching model's configuration, as the configs have it, without dropout."""
    kind, fields = SCORERS[task.scorer]
    given = common_napreg.napreg(kind, "").model.matching.to_dict()
    scorer = given["scorer"] | fields
    if kind == "sgraf":
        scorer |= {"sim_dim": task.sim_dim, "dropout": 0.0}
    return validate({
        "kind": kind,
        "embed_dim": task.width,
        "image": {"width": 8, "regions": task.regions},
        "text": {"kind": "gru", "vocab_size": 4, "embedding": 4},
        "scorer": scorer,
    })  # fmt: skip


class Model(NamedTuple):
    """A model whose biases, scales and statistics are not those of its start.

    pair: its functions in evaluation. params, extras: of them.
    """

    module: matching.MatchingModel
    pair: pair_models.PairModel
    params: Any
    extras: Any

    @property
    def variables(self) -> dict[str, Any]:
        """Of the module."""
        return {**self.params["matching"], **{k: v for k, v in self.extras.items() if k != "naaf"}}


def make_model(task: Task) -> Model:
    """The model of a task; its thresholds are `THRESHOLD`."""
    settings = config(task)
    pair = _pair(settings, task)
    params, extras = pair.init(jax.random.key(0), None)
    rng = np.random.default_rng(1)

    def moved(x):
        noise = 0.01 * rng.standard_normal(x.shape, np.float32)
        return x + noise if x.ndim < 2 else x

    params, extras = jax.tree.map(moved, (params, extras))
    if SCORERS[task.scorer][0] == "sgraf":
        last = params["matching"]["params"]["scorer"]["score"]
        last["kernel"] = SPREAD * last["kernel"]
    if "naaf" in extras:
        safe = jnp.float32(THRESHOLD)
        extras["naaf"] = extras["naaf"]._replace(threshold=safe, safe_threshold=safe)
    return Model(matching.build(settings), pair, params, extras)


def with_block(model: Model, task: Task) -> Model:
    """The same model with the task's block."""
    return model._replace(pair=_pair(model.module.config, task))


def _pair(settings: Mapping[str, Any], task: Task) -> pair_models.PairModel:
    return pair_models.build(settings, {}, dtype=jnp.float32, block=task.captions_at_a_time)


class Draw:
    """Draws images and captions whose regions and words belong to a few hundred concepts."""

    def __init__(self, width: int, seed: int = 0):
        self._rng = np.random.default_rng(seed)
        self._concepts = _unit(self._rng.standard_normal((CONCEPTS, width), np.float32))

    def regions(self, images: int, regions: int) -> np.ndarray:
        """[n, r, d] of unit norm."""
        return self._near((images, regions))

    def words(self, lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(words [m, T, d] of unit norm, zero at padding; mask [m, T])."""
        mask = np.arange(length)[None] < lengths[:, None]
        return self._near(mask.shape) * mask[..., None], mask

    def _near(self, shape: tuple[int, ...]) -> np.ndarray:
        chosen = self._concepts[self._rng.integers(0, CONCEPTS, shape)]
        noise = _unit(self._rng.standard_normal(chosen.shape, np.float32))
        return _unit(chosen + np.float32(0.5) * noise)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def image_side(model: Model, regions: np.ndarray) -> dict[str, jax.Array]:
    """What `pair_scores` reads of images, on the device."""
    whole = _prepare(model, "prepare_images", regions)
    return {"regions": jnp.asarray(regions), "image_global": whole}


def caption_side(model: Model, words: np.ndarray, mask: np.ndarray) -> dict[str, jax.Array]:
    """What `pair_scores` reads of captions, on the device."""
    whole = _prepare(model, "prepare_captions", words, mask)
    return {"words": jnp.asarray(words), "mask": jnp.asarray(mask), "caption_global": whole}


def _prepare(model: Model, method: str, *sides: np.ndarray) -> jax.Array:
    return jax.jit(functools.partial(model.module.apply, method=method))(model.variables, *sides)


def evaluation(model: Model) -> Callable[[Any, Any, dict[str, jax.Array]], jax.Array]:
    """(params, extras, both sides) -> scores [n, m]: the evaluator's own program, jitted."""
    scores = model.pair.predict["pair_scores"]
    return jax.jit(lambda params, extras, sides: scores(params, extras, sides)["scores"])


def training(task: Task, model: Model) -> Callable[..., tuple[Any, Any]]:
    """(params, regions, whole, words, mask, weights) -> ((sum of weighted scores, scores),
    gradients of all but the last two), as a training step scores a batch; not jitted."""
    statistics = {k: v for k, v in model.variables.items() if k != "params"}

    def weighted(params, regions, whole, words, mask, weights):
        def apply(*arguments, method):
            variables = {"params": params, **statistics}
            return model.module.apply(variables, *arguments, True, method=method)

        def score(*both) -> Any:
            return apply(*both, method="score")

        captions: Any = apply(words, mask, method="prepare_captions")
        texts = words, mask, captions, jnp.full(len(words), THRESHOLD)
        images, settings = (regions, whole), model.module.config
        scores, _ = pair_models.in_blocks(settings, score, images, texts, task.captions_at_a_time)
        return jnp.sum(weights * scores), scores

    return jax.value_and_grad(weighted, argnums=(0, 1, 2, 3), has_aux=True)


def product(side: int) -> tuple[Callable[[], Any], float]:
    """A product of two matrices in float32, and its FLOPs."""
    matrix = jnp.full((side, side), 1 / side)
    run = jax.jit(lambda a: jnp.dot(a, a, precision="highest")).lower(matrix).compile()
    return lambda: jax.block_until_ready(run(matrix)), 2.0 * side**3


def flop(task: Task, images: int, lengths: np.ndarray) -> float:
    """FLOPs of the products that scores of `images` and captions of these lengths cannot do
    without, each image prepared once.

    With L words, r regions, d and s = sim_dim, a pair has 2 L r d for the similarities, and

        SCAN t2i, NAAF, SGRAF   2 L r r           norms, by the Gram matrix of the regions
        SCAN i2t                2 r L L           the same of the words
        NAAF                    2 L L             what its neighbours say of a word
        SGRAF                   2 L r d + 2 (L + 1) d s + 2 s    contexts, similarity vectors, score
        SAF                     4 (L + 1) s       gates, and the sum with them
        SGR, K = L + 1          4 K s s + 4 K K s each step but the last, 4 s s + 4 K s the last

    beside the Gram matrices, 2 r r d an image or 2 L L d a caption, and NAAF's products of the
    words of a caption. SGR's query and key are one product here, two in its public program.
    """
    kind, fields = SCORERS[task.scorer]
    r, d, s = task.regions, task.width, task.sim_dim
    words = lengths.astype(np.float64)
    nodes = words + (words > 0)  # captions without words are padding
    pair, image, caption = 2 * words * r * d, 2.0 * r * r * d, 0.0 * words
    if fields.get("direction") == "i2t":
        pair, image, caption = pair + 2 * r * words**2, 0.0, 2 * words**2 * d
    else:
        pair = pair + 2 * words * r**2
    if kind == "naaf":
        pair, caption = pair + 2 * words**2, 2 * words**2 * d
    if kind == "sgraf":
        pair = pair + 2 * words * r * d + 2 * nodes * d * s + 2 * s * (words > 0)
        if fields["module"] == "saf":
            pair = pair + 4 * nodes * s
        else:
            steps = config(task)["scorer"]["steps"]
            pair = pair + (steps - 1) * (4 * nodes * s * s + 4 * nodes**2 * s)
            pair = pair + 4 * s * s * (words > 0) + 4 * nodes * s
    return float(images * pair.sum() + images * image + caption.sum())


def torch_arguments(task: Task, model: Model) -> dict[str, Any]:
    """What torch_matching.make needs, as arrays."""
    variables: Mapping[str, Any] = model.variables
    return {
        "config": config(task),
        "params": variables["params"].get("scorer", {}),
        "statistics": variables.get("batch_stats", {}).get("scorer", {}),
        "threshold": THRESHOLD,
    }
