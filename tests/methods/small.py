"""Methods on five classes and 3 x 3 positions of width 8, fed with dense features."""

import jax
import jax.numpy as jnp
import numpy as np

from trm_jax.data.tokenizers import WordTokenizer
from trm_jax.methods import frozen_clip, trm_ml
from trm_jax.models.clip import towers as clip_towers
from trm_jax.types import ArraySpec, DataInfo

NAMES = ("sun", "cloud", "star", "cat", "top hat")
WIDTH, GRID, ROWS = 8, (3, 3), 6
TOKENIZER = WordTokenizer(("a", "photo", "of", ".", "sun", "cloud", "star", "cat", "top", "hat"))
CLIP = {
    "embed_dim": WIDTH,
    "dense_pos_embed": False,
    "image": {"kind": "features", "width": WIDTH, "hidden": WIDTH},
    "text": {
        "vocab_size": TOKENIZER.vocab_size,
        "context_length": 16,
        "width": 8,
        "heads": 1,
        "layers": 1,
        "eos_id": TOKENIZER.eos_id,
    },
}
INPUTS = {
    "dense": ArraySpec((None, 9, WIDTH), np.float32),
    "global_embedding": ArraySpec((None, WIDTH), np.float32),
}
KEY = jax.random.key(3)


def make(module=trm_ml, *, single_positive=False, **options):
    """The method of `module`; stage two starts at step 2."""
    info = DataInfo(class_names=NAMES, steps_per_epoch=2, single_positive=single_positive)
    if module is trm_ml:
        options.setdefault("memory", memory())
    options.setdefault("prompts", frozen_clip.Prompts(length=2))
    options.setdefault("clip", CLIP)
    return module.make(
        info=info,
        tokenizer=TOKENIZER,
        inputs=INPUTS,
        grid=GRID,
        **options,
    )


def memory(**options):
    """Three slots a class, two pixels a positive, fast thresholds."""
    settings = {"slots": 3, "pixels": 2, "decay": 0.7, "stage_one_epochs": 1.0}
    return trm_ml.Memory(**(settings | options))


def towers():
    """The towers of `CLIP`."""
    return clip_towers.build(CLIP)


def init(method):
    """(params, extras) of random towers, as numpy."""
    return jax.device_get(jax.jit(lambda key: method.init(key, pretrained=None))(KEY))


def shaken(tree, seed: int, scale: float = 0.1):
    """Params with noise on everything but the towers, as an optimizer would move them."""
    rng = np.random.default_rng(seed)

    def shake(x):
        return x + np.asarray(scale * rng.normal(size=x.shape), np.float32)

    return {
        name: part if name == "clip" else jax.tree.map(shake, part) for name, part in tree.items()
    }


def start(method, seed: int = 0):
    """(params far enough from init's that no bias is 0, empty extras)."""
    params, extras = init(method)
    return shaken(params, seed, 0.3), extras


def batch(seed: int, *, labels=(-1, 0, 1)):
    """Random features and labels; the last row is a bad sample full of NaN-free noise."""
    rng = np.random.default_rng(100 + seed)
    valid = np.ones(ROWS, bool)
    valid[-1] = False
    return {
        "dense": rng.normal(size=(ROWS, 9, WIDTH)).astype(np.float32),
        "global_embedding": rng.normal(size=(ROWS, WIDTH)).astype(np.float32),
        "labels": rng.choice(labels, size=(ROWS, len(NAMES))).astype(np.int8),
        "truth": rng.choice((-1, 1), size=(ROWS, len(NAMES))).astype(np.int8),
        "index": np.arange(ROWS, dtype=np.int32),
        "valid": valid,
    }


def loss_function(method):
    """Jitted (params, extras, batch, step) -> (StepOutput, gradient of all but the towers)."""

    def function(trained, clip, extras, data, step):
        def loss(p):
            out = method.loss(p | {"clip": clip}, extras, data, key=KEY, step=step, train=True)
            return out.loss, out

        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        return out, grads

    compiled = jax.jit(function)

    def call(tree, extras, data, step):
        trained = {name: part for name, part in tree.items() if name != "clip"}
        return compiled(trained, tree["clip"], extras, data, jnp.int32(step))

    return call


def values(out) -> dict[str, float]:
    """The metrics of a StepOutput as floats."""
    return {name: float(mean.value()) for name, mean in out.metrics.items()}
