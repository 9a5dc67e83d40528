"""The data of a config: sources, observed labels, the shapes of a batch, cached features."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from trm_jax.data import partial_labels, pipeline, sources
from trm_jax.data.examples import MultiLabelExamples, entered
from trm_jax.data.feature_cache import CachedFeatures, cache_key, data_hash, write_cache
from trm_jax.data.sources.base import Source
from trm_jax.data.sources.caption_shuffle import ShuffledCaptions
from trm_jax.data.sources.subset import Subset, hold_out
from trm_jax.data.transforms import ImageTransform, image_transform
from trm_jax.train import checkpoints, sharding
from trm_jax.train.bad_samples import BadSamples
from trm_jax.train.preemption import Preempted, StopRequest
from trm_jax.types import ArraySpec, BadSampleError, BatchSpec, Method, PyTree, UserError

# Options of sources that choose labels, not pixels.
_LABEL_OPTIONS = ("difficult", "check_counts", "allow_empty_classes", "unlisted", "classes")


def open_data(data: ConfigDict) -> tuple[Source, Source, str]:
    """(training source, evaluation source, "test" or "val") of a config's data section."""
    train = _part(data, data.dataset, "train", data.root, data.options.to_dict(), data.train_size)
    if data.label_protocol == "single_positive_largeloss":
        train = _largeloss_train(train)
    if data.holdout and data.test_dataset:
        raise UserError("data.holdout and data.test_dataset are both set; there is one test set")
    if data.holdout:
        if not 0.0 < data.holdout < 1.0:
            raise UserError(f"data.holdout={data.holdout} must be in (0, 1), or 0 for the test set")
        train, test = hold_out(train, data.holdout)
    elif data.test_dataset:
        test = open_test(data)
    else:
        options = data.options.to_dict()
        test = _part(data, data.dataset, "test", data.root, options, data.test_size)
    if data.caption_shuffle:
        train = ShuffledCaptions(train, data.caption_shuffle, data.label_seed)
    return train, test, "val" if data.holdout else "test"


def open_test(data: ConfigDict) -> Source:
    """The evaluation source that `data.test_dataset` names."""
    if not data.test_dataset:
        raise UserError("data.test_dataset is empty; name the dataset to be evaluated on")
    if data.test_dataset not in ("glyphs", "mixture") and not data.test_root:
        raise UserError(
            f"data.test_root is empty; '{data.test_dataset}' needs the place of its files"
        )
    options = data.test_options.to_dict()
    return _part(data, data.test_dataset, "test", data.test_root, options, data.test_size)


def _part(data: ConfigDict, dataset: str, split: str, root: str, options, size: int) -> Source:
    """One split, or its first `size` examples if that is not 0; empty options are not given."""
    options = {name: value for name, value in options.items() if value not in ("", ())}
    if dataset == "glyphs":
        if split == "train" and data.train_size < 1:
            raise UserError("data.train_size must be at least 1: glyph scenes are endless")
        sizes = {"train_size": data.train_size, "test_size": data.test_size}
        options |= {name: value for name, value in sizes.items() if value}
        options.setdefault("image_size", data.image_size)
        return sources.open_source(dataset, split, root=root, **options)
    source = sources.open_source(dataset, split, root=root, **options)
    return Subset(source, range(size)) if 0 < size < len(source) else source


def observed_labels(data: ConfigDict, train: Source) -> np.ndarray:
    """int8 [N, C] in {-1, 0, +1}: what the config's label protocol shows of the training labels.

    Masks are drawn over the whole split, so that a part of it sees the same labels.
    """
    if isinstance(train, Subset):
        return observed_labels(data, train.source)[train.indices]
    return partial_labels.observe_source(
        train,
        protocol=data.label_protocol,
        known_fraction=data.known_fraction,
        seed=data.label_seed,
        mask_file=data.mask_file,
    )


def input_spec(
    source: Source, clip: dict[str, Any], image_size: int
) -> tuple[BatchSpec, tuple[int, int]]:
    """(the image entry of a batch, (h, w) of its dense map), from the first readable example."""
    for index in range(len(source)):
        try:
            sample = source.read(index)
            break
        except BadSampleError:
            continue
    else:
        raise UserError("not one example of the data can be read; check data.root")
    if "dense" in sample:
        names = ("dense", "global_embedding")
        spec = {n: ArraySpec((None, *np.shape(sample[n])), entered(sample[n]).dtype) for n in names}
        return spec, _square(len(sample["dense"]))
    if "features" in sample:
        return feature_spec(np.shape(sample["features"]), clip)
    return image_spec(clip, image_size)


def feature_spec(shape: tuple[int, ...], clip: dict[str, Any]) -> tuple[BatchSpec, tuple[int, int]]:
    """The batch entry for precomputed features [r, D], checked against the towers."""
    image = clip["image"]
    if "scorer" in clip:  # a matching model
        if (image["regions"], image["width"]) != tuple(shape):
            raise UserError(
                f"the data has {shape[0]} regions of width {shape[1]}: set "
                f"model.matching.image.regions={shape[0]} and .width={shape[1]}"
            )
    elif image["kind"] != "features" or image["width"] != shape[-1]:
        raise UserError(
            f"the data has precomputed features of width {shape[-1]}: set model.clip.image to "
            f"kind 'features' and width {shape[-1]}"
        )
    return {"features": ArraySpec((None, *shape), np.float32)}, _square(shape[0])


def image_spec(clip: dict[str, Any], image_size: int) -> tuple[BatchSpec, tuple[int, int]]:
    """The batch entry for images of `image_size` pixels, checked against the towers' stride."""
    image = clip["image"]
    if "scorer" in clip:
        raise UserError("model.matching reads precomputed regions, but the data gives images")
    if image["kind"] == "features":
        raise UserError("model.clip.image.kind is 'features', but the data gives images")
    name, cell = "patch size", image.get("patch_size")
    if image["kind"] == "resnet":
        name, cell = "stride", 4 * 2 ** (len(image["layers"]) - 1)
    if image_size % cell or image_size < cell:
        raise UserError(
            f"data.image_size={image_size} is no multiple of {cell}, the {name} of the encoder; "
            f"try {max(1, image_size // cell) * cell}"
        )
    spec = {"image": ArraySpec((None, image_size, image_size, 3), np.uint8)}
    return spec, (image_size // cell, image_size // cell)


def transform(data: ConfigDict, *, train: bool) -> ImageTransform:
    """What happens to an image on its way into a batch."""
    return image_transform(data.augment if train else data.test_augment, data.image_size)


def cached(
    of: tuple[Source, Source],
    config: ConfigDict,
    clip: dict[str, Any],
    method: Method,
    params: PyTree,
    dtype: Any,
    cache_dir: Path,
) -> tuple[Source, Source]:
    """Both sources with their features read from `cache_dir`, computed first where missing.

    A cache's folder is named by the settings and the images' ids; the weights and the files must
    be those it was made of. `clip` is the towers' resolved config, `dtype` that of the compute.

    Raises:
      UserError: `data.augment` is not "none", or a cache is stale.
    """
    if config.data.augment != "none":
        raise UserError(
            f"data.cache_features needs data.augment='none', not {config.data.augment!r}: cached "
            "features cannot be augmented"
        )
    if "dense" not in method.specs:
        raise UserError(
            f"data.cache_features: method={config.method} trains its image side, there is nothing "
            "to cache; set data.cache_features=False"
        )
    encode, size = _encoder(method, params, config.evaluate.batch_size)
    random = config.model.pretrained == "random"
    settings = {
        "dataset": config.data.dataset,
        "options": {k: v for k, v in config.data.options.items() if k not in _LABEL_OPTIONS},
        "image_size": config.data.image_size,
        "clip": clip,
        "pretrained": f"random {config.seed}" if random else config.model.pretrained,
        "compute": str(dtype),
    }
    encoder = checkpoints.weights_hash(jax.device_get(params["clip"]))

    def one(source: Source) -> CachedFeatures:
        folder = cache_dir / cache_key(source, kind=type(source).__name__, **settings)
        made_of = {"encoder": encoder, "data": data_hash(source)}
        if not folder.is_dir():
            _compute(source, folder, made_of, encode, size, config.data)
        return CachedFeatures(source, folder, made_of)

    train, test = of
    if isinstance(train, Subset) and isinstance(test, Subset) and train.source is test.source:
        whole = one(train.source)  # a hold-out and what it was taken from
        return Subset(whole, train.indices), Subset(whole, test.indices)
    return one(train), one(test)


def _compute(source: Source, folder: Path, made_of, encode, size: int, data: ConfigDict) -> None:
    """Writes the cache of one split; a signal or too many unreadable images leave none."""
    examples = MultiLabelExamples(source, None, transform(data, train=False))
    batches = pipeline.eval_batches(examples, batch_size=size, workers=data.workers)
    shown = tqdm(batches, total=-(-len(source) // size), disable=None, desc="features")
    bad = BadSamples(len(source), data.max_bad_fraction, lambda index: str(source.ids[index]))

    def counted():
        for batch in shown:
            real = batch["index"] >= 0
            bad.count({name: batch[name][real] for name in ("index", "valid")})
            yield batch

    print(f"computing the features of {len(source):,} images once, into {folder}")
    with StopRequest() as stop:

        def tick() -> None:
            if stop.requested:
                raise Preempted("stopped while features were computed; start again to compute them")

        write_cache(folder, counted(), encode, size=len(source), made_of=made_of, tick=tick)


def _largeloss_train(train: Source) -> Subset:
    """The 80 % that LargeLoss trains on; the rest chooses its settings."""
    order = np.argsort(np.asarray([str(name) for name in train.ids]), kind="stable")
    kept, _ = partial_labels.largeloss_split(len(train))
    return Subset(train, np.sort(order[kept]))


def _encoder(method: Method, params: PyTree, batch_size: int):
    """(host batch -> features, a batch size that this process's devices divide)."""
    mesh = sharding.make_mesh(devices=jax.local_devices())
    function = jax.jit(lambda p, batch: method.predict["dense"](p, {}, batch))
    params = jax.device_put(params, sharding.replicated(mesh))
    names = list(method.specs["dense"])

    def encode(batch):
        return function(params, sharding.put_batch({n: batch[n] for n in names}, mesh))

    return encode, -(-batch_size // mesh.size) * mesh.size


def _square(count: int) -> tuple[int, int]:
    side = int(count**0.5)
    return (side, side) if side * side == count else (1, count)
