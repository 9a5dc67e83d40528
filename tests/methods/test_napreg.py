"""NAPReg on tiny models: pair loss and noun term joined rightly, blocks, padding, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.losses.test_noun_proxies import noun_proxy_oracle
from tests.methods import small
from trm_jax.methods import napreg
from trm_jax.models.clip import towers
from trm_jax.models.matching.config import validate
from trm_jax.types import ArraySpec, DataInfo, UserError, check_batch

ROWS, REGIONS, WIDTH, LENGTH, PROXIES = 8, 4, 6, 7, 5
SCORERS = {
    "scan": ("scan", {"direction": "i2t", "pooling": "mean", "attention_scale": 4.0}),
    "t2i": ("scan", {"direction": "t2i", "pooling": "lse", "attention_scale": 9.0}),
    "sgr": ("sgraf", {"module": "sgr", "sim_dim": 4, "steps": 2, "dropout": 0.0}),
    "saf": ("sgraf", {"module": "saf", "sim_dim": 4, "dropout": 0.0}),
    "naaf": ("naaf", {}),
    "naaf_sequential": ("naaf", {"threshold_update": "sequential"}),
}
INPUTS = {"features": ArraySpec((None, REGIONS, WIDTH), np.float32)}
INFO = DataInfo(num_proxies=PROXIES, steps_per_epoch=10, total_steps=30)


def config(name):
    kind, scorer = SCORERS[name]
    return validate(
        {
            "kind": kind,
            "embed_dim": 8,
            "image": {"regions": REGIONS, "width": WIDTH},
            "text": {"kind": "gru", "vocab_size": 20, "embedding": 6},
            "scorer": scorer,
        }
    )


@functools.cache
def make(name="scan", loss=None, block=0, info=INFO):
    loss = loss or napreg.Loss(pair="infonce" if name == "t2i" else "triplet")
    return napreg.make(
        model=config(name), inputs=INPUTS, info=info, buckets=(LENGTH,), loss=loss, block=block
    )


@functools.cache
def start(name="scan"):
    """Params and state, shaken so that nothing is at its initial symmetry."""
    params, extras = small.init(make(name))
    rng = np.random.default_rng(5)
    shake = lambda x: x + np.asarray(0.3 * rng.normal(size=x.shape), np.float32)  # noqa: E731
    return jax.tree.map(shake, params), extras


@functools.cache
def batch():
    """Eight captions of 1 to 5 words of seven images; pair 6 has no noun, pair 7 is not valid."""
    rng = np.random.default_rng(0)
    tokens, nouns = np.zeros((ROWS, LENGTH), np.int32), np.full((ROWS, LENGTH), -1, np.int32)
    for row, size in enumerate((5, 3, 4, 1, 2, 5, 3, 2)):
        tokens[row, : size + 2] = [2, *rng.integers(4, 20, size), 3]
        nouns[row, 1 : size + 1] = rng.integers(-1, PROXIES, size)
    nouns[0, 1], nouns[6], nouns[7] = 2, -1, -1
    positives = np.full((ROWS, LENGTH), -1, np.int32)
    for row, found in enumerate(nouns):
        kept = np.unique(found[found >= 0])
        positives[row, : len(kept)] = kept
    return {
        "features": rng.normal(size=(ROWS, REGIONS, WIDTH)).astype(np.float32),
        "tokens": tokens,
        "noun_ids": nouns,
        "nouns": positives,
        "index": np.asarray([3, 1, 4, 1, 5, 9, 2, -1], np.int32),
        "valid": np.arange(ROWS) < 7,
    }


_compiled = {}


def evaluate(method, params, extras, rows, step=20, train=True):
    """(loss, metrics, gradient, extras) as numpy; a method is compiled once."""

    def loss(params, extras, rows, step):
        out = method.loss(params, extras, rows, key=jax.random.key(1), step=step, train=train)
        return out.loss, out

    devices = jax.sharding.get_abstract_mesh().size
    place = id(method), train, devices
    if place not in _compiled:  # the method is kept, so that its id stays its own
        _compiled[place] = jax.jit(jax.value_and_grad(loss, has_aux=True)), method
    run = _compiled[place][0]
    (_, out), gradient = run(params, extras, dict(rows), jnp.asarray(step))
    metrics = {name: float(mean.value()) for name, mean in out.metrics.items()}
    return jax.device_get((out.loss, metrics, gradient, out.extras))


def pairs_of(method, params, extras, rows):
    """Scores [n, n] and attention [n, T, r] by the functions of prediction."""
    sides = {
        **method.predict["embed_image"](params, extras, rows),
        **method.predict["embed_text"](params, extras, rows),
    }
    scores = method.predict["pair_scores"](params, extras, sides)["scores"]
    weights = method.predict["attention"](params, extras, rows)["weights"]
    return jax.device_get((scores, weights, sides))


def close(left, right, rtol=2e-5, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), left, right)


@pytest.mark.parametrize("context", ["mean_nouns", "per_noun"])
def test_the_loss_is_that_of_the_pairs_and_of_what_the_nouns_see(context):
    loss = napreg.Loss(
        pair="triplet", context=context, noun_weight=0.7, beta=3.0, same_image="ignore"
    )
    method, (params, extras), rows = make(loss=loss), start(), batch()
    value, metrics, _, _ = evaluate(method, params, extras, rows)
    scores, weights, sides = pairs_of(method, params, extras, rows)
    pair, nouns = [], []
    for i in range(7):
        others = [j for j in range(7) if rows["index"][j] != rows["index"][i]]
        row = max(0.2 + scores[i, j] - scores[i, i] for j in others)
        column = max(0.2 + scores[j, i] - scores[i, i] for j in others)
        pair.append(max(row, 0.0) + max(column, 0.0))
        marked = np.flatnonzero(rows["noun_ids"][i] >= 0)
        seen = weights[i, marked] @ sides["regions"][i]
        seen = seen / np.linalg.norm(seen, axis=1, keepdims=True)
        named = np.zeros((1, PROXIES), bool)
        named[0, rows["noun_ids"][i, marked]] = True
        options = {"alpha": 2.0, "beta": 3.0, "margin": 0.5}
        if not len(marked):
            nouns.append(0.0)
        elif context == "mean_nouns":
            scene = seen.mean(0)[None], params["proxies"], named
            nouns.append(noun_proxy_oracle(scene, **options)[0])
        else:
            own = np.eye(PROXIES, dtype=bool)[rows["noun_ids"][i, marked]]
            scene = seen, params["proxies"], own
            excluded = np.broadcast_to(named, own.shape)
            nouns.append(noun_proxy_oracle(scene, excluded=excluded, **options).mean())
    np.testing.assert_allclose(metrics["loss_pair"], np.mean(pair), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_nouns"], np.mean(nouns), rtol=1e-5)
    np.testing.assert_allclose(value, np.mean(pair) + 0.7 * np.mean(nouns), rtol=1e-5)
    assert metrics["named"] == pytest.approx(6 / 7) and metrics["active"] > 0


def test_a_sum_is_the_mean_times_the_pairs():
    params, extras = start()
    mean = evaluate(make(), params, extras, batch())
    total = evaluate(
        make(loss=napreg.Loss(pair="triplet", reduction="sum")), params, extras, batch()
    )
    np.testing.assert_allclose(total[0], 7 * mean[0], rtol=1e-5)


def test_proxies_learn_from_the_noun_term_alone():
    params, extras = start()
    for term in ("nap", "proxy_anchor"):
        for weight in (0.0, 1.0):
            loss = napreg.Loss(pair="triplet", nouns=term, noun_weight=weight)
            _, _, gradient, _ = evaluate(make(loss=loss), params, extras, batch())
            assert np.any(gradient["proxies"]) == bool(weight)
            assert np.any(gradient["matching"]["params"]["image"]["projection"]["kernel"])
    method = make(loss=napreg.Loss(pair="triplet", nouns="none"))
    assert "proxies" not in small.init(method)[0] and "nouns" not in method.specs["train"]


@pytest.mark.parametrize("name", ["scan", "t2i", "saf", "naaf_sequential"])
def test_blocks_change_nothing_and_padding_is_never_seen(name):
    params, extras = start(name)
    whole = evaluate(make(name), params, extras, batch())
    blocks = evaluate(make(name, block=3), params, extras, batch())
    close(whole, blocks, rtol=2e-4, atol=1e-5)
    rows = dict(batch())
    rows["features"], rows["tokens"] = rows["features"].copy(), rows["tokens"].copy()
    rows["features"][7], rows["tokens"][7, 1:4] = 1e3, (9, 8, 3)
    close(whole, evaluate(make(name), params, extras, rows), rtol=2e-4, atol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(whole))
    # All parameters learn, but those that the loss cannot see.
    _, _, gradient, _ = whole
    flat = {jax.tree_util.keystr(p): leaf for p, leaf in jax.tree.leaves_with_path(gradient)}
    still = [path for path, leaf in flat.items() if not np.any(leaf)]
    assert not still, still


@pytest.mark.parametrize("name", ["scan", "sgr"])
def test_prediction_scores_pairs_as_training_does(name):
    method, (params, extras) = make(name), start(name)
    scores, _, _ = pairs_of(method, params, extras, batch())
    _, metrics, _, _ = evaluate(method, params, extras, batch(), train=False)
    np.testing.assert_allclose(metrics["score_matched"], np.diag(scores)[:7].mean(), rtol=1e-5)
    for name, spec in method.specs.items():
        if name in ("train", "embed_image", "embed_text"):
            check_batch(batch(), spec)


def test_eight_devices_give_the_same_step():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    for name in ("saf", "naaf_sequential"):
        method, (params, extras) = make(name, block=3), start(name)
        alone = evaluate(method, params, extras, batch())
        rows = jax.device_put(dict(batch()), NamedSharding(mesh, PartitionSpec("data")))
        with jax.set_mesh(mesh):
            together = evaluate(method, params, extras, rows)
        close(alone, together, rtol=5e-4, atol=2e-5)


def test_the_warm_up_takes_the_mean_of_violations():
    loss = napreg.Loss(pair="triplet", nouns="none", warmup_epochs=2.0)
    params, extras = start()
    early, late = (
        evaluate(make(loss=loss), params, extras, batch(), step=step)[0] for step in (19, 20)
    )
    always = napreg.Loss(pair="triplet", nouns="none")
    np.testing.assert_allclose(
        late, evaluate(make(loss=always), params, extras, batch())[0], rtol=1e-6
    )
    assert 0 < early < late


def test_running_statistics_and_thresholds_are_state():
    for name, moved in (("sgr", "batch_stats"), ("saf", "batch_stats")):
        params, extras = start(name)
        _, _, _, new = evaluate(make(name), params, extras, batch())
        changed = [
            np.any(a != b)
            for a, b in zip(
                jax.tree.leaves(extras[moved]), jax.tree.leaves(new[moved]), strict=True
            )
        ]
        assert all(changed)
        _, _, _, same = evaluate(make(name), params, extras, batch(), train=False)
        close(same, extras, atol=0.0, rtol=0.0)
    params, extras = start("naaf")
    _, _, _, new = evaluate(make("naaf"), params, extras, batch())
    assert extras["naaf"].count == 0 <= new["naaf"].count


CLIP = towers.validate(small.CLIP)
DUAL = {"features": ArraySpec((None, 9, small.WIDTH), np.float32)}


@pytest.mark.parametrize("nouns", ["nap", "proxy_anchor"])
def test_two_towers_draw_both_sides_to_the_nouns(nouns):
    loss = napreg.Loss(pair="infonce", nouns=nouns, beta=3.0)
    method = napreg.make(model=CLIP, inputs=DUAL, info=INFO, buckets=(LENGTH,), loss=loss)
    params, extras = small.init(method)
    rows = dict(batch())
    rows["features"] = (
        np.random.default_rng(1).normal(size=(ROWS, 9, small.WIDTH)).astype(np.float32)
    )
    rows["tokens"] = np.minimum(rows["tokens"], small.TOKENIZER.vocab_size - 1)
    value, metrics, gradient, _ = evaluate(method, params, extras, rows)
    image = method.predict["embed_image"](params, extras, rows)["embedding"]
    text = method.predict["embed_text"](params, extras, rows)["embedding"]
    if nouns == "nap":
        positives = np.zeros((ROWS, PROXIES), bool)
        for row, found in enumerate(rows["nouns"]):
            positives[row, found[found >= 0]] = True
        both = sum(
            np.asarray(
                noun_proxy_oracle((np.asarray(x, float), params["proxies"], positives), beta=3.0)
            )
            for x in (image, text)
        )
        counted = np.where(positives.any(1), both, 0.0)[:7]
        np.testing.assert_allclose(metrics["loss_nouns"], counted.mean(), rtol=1e-5)
    assert np.isfinite(value) and np.any(gradient["proxies"])
    with pytest.raises(UserError, match="per_noun"):
        napreg.make(
            model=CLIP, inputs=DUAL, info=INFO, buckets=(7,), loss=loss._replace(context="per_noun")
        )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"pair": "hinge"}, "loss.pair='hinge' is none of triplet"),
        ({"nouns": "all"}, "loss.nouns='all'"),
        ({"temperature": 0.0}, "loss.temperature=0.0 must be positive"),
        ({"pair": "infonce", "warmup_epochs": 1.0}, "loss.warmup_epochs is for"),
    ],
)
def test_choices_that_cannot_be_are_refused(change, match):
    with pytest.raises(UserError, match=match):
        make(loss=napreg.Loss(**change))


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(UserError, match="LogSumExp"):
        make("t2i", loss=napreg.Loss(pair="multi_similarity"))
    with pytest.raises(UserError, match=r"lower nouns\.min_count"):
        make(info=INFO._replace(num_proxies=0))
    with pytest.raises(UserError, match="block=-1"):
        make(block=-1)
