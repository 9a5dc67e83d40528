"""A trained model from its workdir alone: no training data, no pretrained file is needed."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from trm_jax.data import tokenizers
from trm_jax.data.transforms import image_transform
from trm_jax.evaluate import segmentation, zero_shot
from trm_jax.evaluate.segmentation_windows import Protocol
from trm_jax.train import architecture, checkpoints, datasets, experiment, paths, sharding, workdirs
from trm_jax.types import BatchSpec, DataInfo, Method, PyTree, UserError


class Predictor(NamedTuple):
    """A method with its weights, and what is needed to feed it."""

    method: Method
    params: PyTree
    extras: PyTree
    class_names: tuple[str, ...]
    tokenizer: tokenizers.Tokenizer
    clip: dict[str, Any]
    config: Any
    step: int
    nouns: tuple[str, ...] = ()  # that have a proxy

    @property
    def inputs(self) -> BatchSpec:
        """The image entry of a batch."""
        name = "scores" if "scores" in self.method.specs else "embed_image"
        return self.method.specs[name]

    def images(self, images: Iterable[np.ndarray], size: int = 16) -> Iterator[dict[str, Any]]:
        """Batches of `size` from RGB uint8 images of any size; the last one is padded with 0."""
        name = self.config.data.get("test_augment", "none")
        transform = image_transform(name, self.config.data.image_size)
        rows = [transform(image, np.random.default_rng(0)) for image in images]
        for start in range(0, len(rows), size):
            part = np.stack(rows[start : start + size])
            yield {"image": np.pad(part, ((0, size - len(part)), (0, 0), (0, 0), (0, 0)))}

    def run(self, name: str, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, np.ndarray]]:
        """method.predict[name] over batches, on the host."""
        if name not in self.method.predict:
            raise UserError(f"this run's method ({self.config.method}) cannot predict {name!r}")
        function = jax.jit(self.method.predict[name])
        shared = {}
        if "prepare" in self.method.predict:
            shared = jax.jit(self.method.predict["prepare"])(self.params, self.extras, {})
        for batch in batches:
            yield jax.device_get(function(self.params, self.extras, {**batch, **shared}))

    def regions(
        self, batches: Iterable[dict[str, Any]], count: int
    ) -> Iterator[tuple[dict[str, float], dict[str, np.ndarray]]]:
        """({class: probability}, {class: map [h, w] in [0, 1]}) of the first `count` images."""
        outputs = self.run("regions", batches)
        rows = (row for part in outputs for row in zip(part["scores"], part["maps"], strict=True))
        for scores, maps in itertools.islice(rows, count):
            yield (
                dict(zip(self.class_names, scores.tolist(), strict=True)),
                dict(zip(self.class_names, maps, strict=True)),
            )

    @property
    def protocol(self) -> Protocol:
        """The run's own, of segmentation."""
        return Protocol(**self.config.evaluate.segmentation.to_dict())

    def match(self, features: np.ndarray, captions: Sequence[str], size: int = 64) -> np.ndarray:
        """Scores [N, M] float32 of all images and captions, for runs that score pairs.

        Args:
          features: [N, r, D] regions of the images.
          captions: at least one.
          size: images, and captions, that meet at a time.
        """
        if "pair_scores" not in self.method.predict:
            raise UserError(f"this run's method ({self.config.method}) scores no pairs")
        images = _chunks(features.astype(np.float32), size)
        texts = _chunks(self.tokens(captions), size)
        sides = list(self.run("embed_image", ({"features": part} for part in images)))
        columns = []
        for text in self.run("embed_text", ({"tokens": part} for part in texts)):
            blocks = self.run("pair_scores", ({**side, **text} for side in sides))
            columns.append(np.concatenate([block["scores"] for block in blocks]))
        return np.concatenate(columns, axis=1)[: len(features), : len(captions)]

    def tokens(self, captions: Sequence[str]) -> np.ndarray:
        """int32 [M, T], T the shortest of the run's lengths that holds the longest caption."""
        buckets = self.config.data.length_buckets or (self.config.data.text_length,)
        rows = self.tokenizer(captions, buckets[-1])
        longest = int((rows != 0).sum(1).max())
        return rows[:, : next(length for length in buckets if length >= longest)]

    def segment(
        self, images: Iterable[np.ndarray], class_names: Sequence[str]
    ) -> Iterator[np.ndarray]:
        """int16 [H, W] of each RGB uint8 image: the class of every pixel, -1 background.

        Any class names will do: it is zero-shot, by the run's own protocol and templates.
        """
        if "segments" not in self.method.predict:
            raise UserError(f"this run's method ({self.config.method}) cannot segment images")
        settings = self.config.evaluate
        protocol = self.protocol
        embed_text = jax.jit(self.method.predict["embed_text"])
        segments = jax.jit(self.method.predict["segments"])
        classes = zero_shot.class_embeddings(
            lambda tokens: embed_text(self.params, self.extras, {"tokens": tokens})["projection"],
            self.tokenizer,
            class_names,
            settings.templates,
            length=self.config.data.text_length,
            normalize_first=False,
        )
        for image in images:
            yield segmentation.label_map(
                lambda rows: segments(self.params, self.extras, rows), classes, image, protocol
            )


def load(workdir: str | Path, features: np.ndarray | None = None) -> Predictor:
    """The newest checkpoint of a run.

    Args:
      workdir: of a run of launch/train.py.
      features: [N, r, D] that will be predicted on, if r is not that of the training data.

    Raises:
      UserError: no run or no checkpoint is there, or `features` do not fit it.
    """
    folder = Path(workdir)
    config = workdirs.read_config(folder)
    if config.method == "mask":
        raise UserError(f"{folder} is a run of MASK; launch/match.py builds and uses its knowledge")
    saved = workdirs.read_json(folder / "vocabulary.json")
    tokenizer = tokenizers.from_config(saved["tokenizer"])
    # Prediction needs no kernel of a certain device.
    clip = architecture.restored(saved["clip"])
    names = tuple(saved["class_names"])
    if "features" not in saved["inputs"]:
        inputs, grid = datasets.image_spec(clip, config.data.image_size)
    else:
        shape = saved["inputs"]["features"] if features is None else features.shape[1:]
        inputs, grid = datasets.feature_spec(tuple(shape), clip)
    nouns = tuple((saved.get("nouns") or {"nouns": ()})["nouns"])
    info = DataInfo(class_names=names, num_proxies=len(nouns))
    method = experiment.make_method(config, info, tokenizer, clip, inputs, grid)
    mesh = sharding.make_mesh()
    params, extras = jax.eval_shape(lambda k: method.init(k, pretrained=None), jax.random.key(0))
    everywhere = sharding.replicated(mesh)
    params, extras = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), (params, extras)
    )
    trained, frozen = paths.split(params, tuple(config.optimizer.freeze), field="optimizer.freeze")
    files = checkpoints.Checkpoints(folder, read_only=True)
    weights, extras = files.restore_weights(trained, extras, config.optimizer.ema > 0)
    frozen = files.restore_frozen(frozen, jax.tree.map(lambda x: x.sharding, frozen))
    step = files.latest_step() or 0
    files.close()
    return Predictor(
        method, paths.merge(weights, frozen), extras, names, tokenizer, clip, config, step, nouns
    )


def _chunks(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """`size` rows at a time; the last ones are filled up with zeros, so that one shape is run."""
    count = -(-len(rows) // size)
    padded = np.pad(rows, ((0, count * size - len(rows)), *((0, 0),) * (rows.ndim - 1)))
    return np.split(padded, count)
