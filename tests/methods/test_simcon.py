"""The method on a tiny GroupViT: its parts joined rightly, micro-batches, devices, padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.methods import small
from tests.oracles.simcon import simcon as oracle
from trm_jax.methods import simcon
from trm_jax.models.clip import towers
from trm_jax.types import ArraySpec, DataInfo, UserError

ROWS, LENGTH = 16, 6
CLIP = towers.validate(
    {
        "embed_dim": 8,
        "projector_hidden": 12,
        "image": {
            "kind": "groupvit",
            "patch_size": 4,
            "width": 8,
            "heads": 2,
            "depths": (1, 1),
            "group_tokens": (3, 0),
            "output_groups": (3, 0),
            "drop_path": 0.3,
            "image_size": 8,
        },
        "text": small.CLIP["text"],
    }
)
INPUTS = {"image": ArraySpec((None, 8, 8, 3), np.uint8)}
LOSS = simcon.Loss(thresholds=(0.9, 0.6), changes=(0.5,), implementation="streaming", block=5)


def make(loss=LOSS, **options):
    info = DataInfo(total_steps=10)
    arguments = {"clip": CLIP, "inputs": INPUTS, "info": info, "text_length": LENGTH}
    return simcon.make(loss=loss, **arguments, **options)


@functools.cache
def start():
    """Params and statistics of MV-SimCon, shaken so that nothing is at its initial symmetry."""
    params, extras = small.init(make())
    rng = np.random.default_rng(5)
    noise = lambda x: x + np.asarray(0.2 * rng.normal(size=x.shape), np.float32)  # noqa: E731
    clip = {"params": jax.tree.map(noise, params["clip"]["params"])}
    clip["params"]["logit_scale"] = params["clip"]["params"]["logit_scale"]
    return {"clip": clip, "predictor": jax.tree.map(noise, params["predictor"])}, extras


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    words = ["sun", "a cat", "photo of star", "cloud"]
    valid = np.ones(ROWS, bool)
    valid[[3, 15]] = False
    images = rng.integers(0, 256, size=(2, ROWS, 8, 8, 3)).astype(np.uint8)
    images[:, 1] = images[:, 0]  # the same image twice: a positive
    return {
        "image": images[0],
        "image_2": images[1],
        "tokens": small.TOKENIZER([words[i % 4] for i in range(ROWS)], LENGTH),
        "index": np.arange(ROWS, dtype=np.int32),
        "valid": valid,
    }


def evaluate(method, params=None, data=None, step=7):
    """(StepOutput, gradients), compiled."""
    params = start()[0] if params is None else params

    def loss(p, data):
        out = method.loss(p, start()[1], data, key=small.KEY, step=jnp.int32(step), train=True)
        return out.loss, out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, data or batch())
    return jax.device_get((out, grads))


@functools.cache
def whole():
    return evaluate(make())


def assert_same(found, wanted, rtol=2e-4):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=2e-5 * (1 + np.abs(other).max()))


@functools.cache
def _embeddings(same_pixels=False):
    """The unit embeddings of both views and the texts by the towers' own functions."""
    model, (params, extras), data = towers.build(CLIP), start(), batch()
    pixels = jnp.stack([data["image"], data["image" if same_pixels else "image_2"]])

    def compute(variables, pixels):
        images = []
        for view in range(2):
            keys = jnp.stack(
                [jax.random.fold_in(jax.random.fold_in(small.KEY, view), r) for r in range(ROWS)]
            )
            z, _ = model.apply(
                variables,
                pixels[view],
                keys=keys,
                method=lambda m, x, keys: m.project_image(
                    m.image_features(x, True, keys), True, data["valid"]
                ),
                mutable=["batch_stats"],
            )
            images.append(z)
        text, _ = model.apply(
            variables,
            data["tokens"],
            method=lambda m, t: m.project_text(m.text_features(t), True, data["valid"]),
            mutable=["batch_stats"],
        )
        return images, text

    variables = {**params["clip"], "batch_stats": extras["batch_stats"]}
    images, text = jax.device_get(jax.jit(compute)(variables, pixels))
    unit = lambda x: (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float64)  # noqa: E731
    return [unit(z) for z in images], unit(text)


def _ncs(images):
    """L_NCS by numpy: Linear, BatchNorm over the valid rows, ReLU, Linear."""
    head, valid = start()[0]["predictor"]["params"], batch()["valid"]
    predicted = []
    for z in images:
        x = z @ head["down"]["kernel"]
        x = (x - x[valid].mean(0)) / np.sqrt(x[valid].var(0) + 1e-5)
        x = np.maximum(x * head["norm"]["scale"] + head["norm"]["bias"], 0)
        x = x @ head["up"]["kernel"] + head["up"]["bias"]
        predicted.append(x / np.linalg.norm(x, axis=-1, keepdims=True))
    values = -0.5 * ((predicted[0] * images[1]).sum(1) + (predicted[1] * images[0]).sum(1))
    return values[valid].mean()


def test_loss_equals_the_oracles_on_the_towers_embeddings():
    images, text = _embeddings()
    valid, metrics = batch()["valid"], small.values(whole()[0])
    values, positives, _, own = oracle(images, text, scale=1 / 0.07, threshold=0.6, where=valid)
    wanted = {
        "loss_contrastive": values[valid].mean(),
        "positives_image": positives[valid].mean(),
        "own_weight": own[valid].mean(),
        "loss_ncs": _ncs(images),
        "threshold": 0.6,
        "matched_cosine": (images[0] * text).sum(1)[valid].mean(),
    }
    assert wanted["positives_image"] > 1
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=1e-5, err_msg=name)
    total = wanted["loss_contrastive"] + wanted["loss_ncs"]
    np.testing.assert_allclose(whole()[0].loss, total, rtol=2e-4)


def test_infonce_is_half_of_both_directions():
    images, text = _embeddings()
    params = {"clip": start()[0]["clip"]}
    out, _ = evaluate(make(simcon.Loss(name="infonce")), params)
    valid = batch()["valid"]
    values = oracle(images[:1], text, scale=1 / 0.07, threshold=None, where=valid)[0]
    np.testing.assert_allclose(out.loss, 0.5 * values[valid].mean(), rtol=2e-4)
    assert "positives_image" not in out.metrics


def test_micro_batches_change_nothing():
    # Gumbel noise and dropped branches are those of the whole batch.
    assert_same(evaluate(make(microbatch=4)), whole())


def test_micro_batches_need_less_memory():
    params = {"clip": start()[0]["clip"]}
    data = {k: np.repeat(v, 32, axis=0) for k, v in batch().items() if k != "image_2"}

    def bytes_of(microbatch):
        method = make(simcon.Loss(name="infonce"), microbatch=microbatch)

        def loss(p, data):
            out = method.loss(p, start()[1], data, key=small.KEY, step=jnp.int32(0), train=True)
            return out.loss

        compiled = jax.jit(jax.grad(loss)).lower(params, data).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_of(32) < 0.5 * bytes_of(0)


def test_eight_devices_equal_one():
    devices = jax.devices()[:8]
    mesh = jax.make_mesh((8, 1), ("data", "fsdp"), (AxisType.Auto,) * 2, devices=devices)
    place = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    data = {name: jax.device_put(x, place) for name, x in batch().items()}
    with jax.set_mesh(mesh):
        found = evaluate(make(LOSS._replace(columns="ring", block=1)), data=data)
    assert_same(found, whole())


def test_rows_that_do_not_count_change_nothing():
    data = {name: x.copy() for name, x in batch().items()}
    for name in ("image", "image_2"):
        data[name][~data["valid"]] = 255
    data["tokens"][~data["valid"]] = data["tokens"][0]
    assert_same(evaluate(make(), data=data), whole())


def test_views_draw_their_own_noise():
    # With equal pixels and equal noise the predictor would see the same vectors twice.
    images, _ = _embeddings(same_pixels=True)
    assert np.abs(images[0] - images[1]).max() > 1e-2


def test_threshold_follows_the_paper_over_thirty_epochs():
    steps = np.arange(300)  # ten steps an epoch
    found = [float(simcon._threshold(simcon.Loss(), step, 300)) for step in steps]
    wanted = np.where(steps < 20, 0.95, np.where(steps < 150, 0.90, 0.85))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_segments_of_another_size():
    (params, extras), images = start(), np.repeat(batch()["image"][:2], 2, axis=1).repeat(2, axis=2)
    out = jax.jit(make().predict["segments"])(params, extras, {"image": images})
    assert out["assignment"].shape == (2, 4, 4, 3)
    np.testing.assert_allclose(out["assignment"].sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(out["groups"], axis=-1), 1.0, rtol=1e-4)
    np.testing.assert_allclose(out["logit_scale"], 1 / 0.07, rtol=1e-5)


RESNET = {**small.CLIP, "image": {"kind": "resnet", "layers": (1,), "width": 4, "heads": 2}}


@pytest.mark.parametrize(
    "loss, options, message",
    [
        ({"name": "triplet"}, {}, "loss.name='triplet'"),
        ({"thresholds": (0.9,)}, {}, "loss.thresholds has 1 values"),
        ({"changes": (0.5, 0.2)}, {}, "loss.changes"),
        ({"columns": "tree"}, {}, "loss.columns='tree'"),
        ({"dtype": "int8"}, {}, "loss.dtype='int8'"),
        ({}, {"microbatch": 4, "clip": RESNET}, "train.microbatch: a ResNet"),
    ],
)
def test_choices_that_cannot_be(loss, options, message):
    arguments = {"clip": CLIP, "inputs": INPUTS, "info": DataInfo(), "text_length": LENGTH}
    with pytest.raises(UserError, match=message):
        simcon.make(loss=simcon.Loss()._replace(**loss), **(arguments | options))


def test_micro_batch_that_does_not_divide():
    with pytest.raises(UserError, match="train.microbatch=5 does not divide the 16 rows"):
        evaluate(make(microbatch=5))
