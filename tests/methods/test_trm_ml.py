"""TRM-ML against its specification in numpy, its ablations, and what may not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods import small
from tests.oracles.trm_ml import Oracle, decoder, sigmoid, unit
from trm_jax.data.tokenizers import ClipTokenizer
from trm_jax.losses import partial_labels
from trm_jax.memory.pseudo_labels import create
from trm_jax.methods import trm_ml
from trm_jax.pretrained import registry
from trm_jax.types import ArraySpec, DataInfo, UserError

LITERAL = trm_ml.Loss(distillation="softmax", unknown="auto", negatives="other_classes")
CASES = {
    "both": ({}, {}, {}),
    "visual, single positive, Eq. 6": (
        {"loss": LITERAL, "single_positive": True},
        {"pseudo_labels": "visual"},
        {
            "distillation": "softmax",
            "unknown": "negative",
            "negatives": "other_classes",
            "single_positive": True,
            "modality": "visual",
        },
    ),
    "text": (
        {
            "loss": trm_ml.Loss(
                negatives="known_negatives", contrastive_weight=0.5, distillation_weight=0.7
            )
        },
        {"pseudo_labels": "text"},
        {"modality": "text", "negatives": "known_negatives", "gamma": 0.5, "beta": 0.7},
    ),
}


def _host(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@pytest.fixture(scope="module")
def whole():
    """(method, params, extras, loss function) with every part on."""
    method = small.make()
    return method, *small.start(method), small.loss_function(method)


@pytest.mark.parametrize("name", CASES)
def test_five_steps_equal_the_oracle(name):
    options, memory, settings = CASES[name]
    method = small.make(memory=small.memory(**memory), **options)
    oracle = Oracle(len(small.NAMES), slots=3, pixels=2, eta=0.7, stage_two=2, **settings)
    loss, prepare = small.loss_function(method), jax.jit(method.predict["prepare"])
    params, extras = small.start(method)
    labels = (0, 0, 1) if settings.get("single_positive") else (-1, 0, 1)
    assigned = set()
    for number in range(5):
        params = small.shaken(params, number)  # as an optimizer would move them
        text = prepare(params, extras, {})
        text = text["text_negative"], text["text_positive"]
        batch = small.batch(number, labels=labels)
        terms, pseudo, total = oracle.step(number, _host(params), _host(text), batch)
        out, _ = loss(params, extras, batch, number)
        found, extras = small.values(out), out.extras
        for term, value in terms.items():
            np.testing.assert_allclose(found[term], value, rtol=2e-4, atol=1e-6, err_msg=term)
        np.testing.assert_allclose(out.loss, total, rtol=2e-4)
        _check_memory(extras, oracle)
        _check_quality(out.metrics, pseudo, batch, number >= 2)
        assigned |= set(np.unique(pseudo))
        if number < 2:
            assert not pseudo.any()
    assert assigned == {-1, 0, 1}


def _check_memory(extras, oracle):
    bank = extras["bank"]
    counts = [len(arrived) for arrived in oracle.arrivals]
    np.testing.assert_array_equal(bank.count, np.minimum(counts, 3))
    np.testing.assert_array_equal(bank.pointer, np.mod(counts, 3))
    np.testing.assert_allclose(bank.slots, oracle.bank_array(small.WIDTH), atol=1e-5)
    for name in ("visual", "text"):
        if f"{name}_thresholds" not in extras:
            continue
        thresholds = extras[f"{name}_thresholds"]
        for sign, found, has in (
            (1, thresholds.positive, thresholds.has_positive),
            (-1, thresholds.negative, thresholds.has_negative),
        ):
            wanted = [theta[sign] for theta in oracle.thresholds[name]]
            np.testing.assert_array_equal(has, [w is not None for w in wanted])
            np.testing.assert_allclose(found, [w or 0.0 for w in wanted], atol=2e-5)
    if "text_prototypes" in extras:
        taken = np.zeros((5, small.WIDTH)) if oracle.prototypes is None else oracle.prototypes
        np.testing.assert_allclose(extras["text_prototypes"], taken, atol=1e-5)


def _check_quality(metrics, pseudo, batch, active):
    unknown = (batch["labels"] == 0) & batch["valid"][:, None] & active
    right, given = pseudo == batch["truth"], pseudo != 0
    wanted = {
        "pseudo_accuracy": (right & unknown, unknown),
        "pseudo_precision": (right & given & unknown, given & unknown),
        "pseudo_recall": (given & unknown, unknown),
        "pseudo_recall_positive": (
            right & unknown & (batch["truth"] == 1),
            unknown & (batch["truth"] == 1),
        ),
    }
    for name, (total, count) in wanted.items():
        found = float(metrics[name].total), float(metrics[name].count)
        assert found == (total.sum(), count.sum()), name


def test_text_prototypes_are_the_text_features_before_the_first_step_of_stage_two(whole):
    method, params, extras, loss = whole
    prepare = jax.jit(method.predict["prepare"])
    batch = small.batch(0)
    taken = {}
    for number in range(5):
        params = small.shaken(params, number)
        text = prepare(params, extras, {})["text_positive"]
        extras = loss(params, extras, batch, number)[0].extras
        taken[number] = (np.asarray(extras["text_prototypes"]), unit(np.asarray(text)))
    assert not taken[0][0].any() and not taken[1][0].any()
    np.testing.assert_allclose(taken[2][0], taken[2][1], atol=1e-6)
    for later in (3, 4):
        np.testing.assert_array_equal(taken[later][0], taken[2][0])
        assert np.abs(taken[later][1] - taken[2][1]).max() > 0.01


def test_the_hidden_truth_changes_nothing_but_metrics(whole):
    _, params, extras, loss = whole
    for number in range(4):
        batch = small.batch(number)
        noise = {
            **batch,
            "truth": np.random.default_rng(9).integers(-1, 2, batch["truth"].shape).astype(np.int8),
        }
        given, given_grads = loss(params, extras, batch, number)
        other, other_grads = loss(params, extras, noise, number)
        left, right = (
            (given.loss, given.extras, given_grads),
            (other.loss, other.extras, other_grads),
        )
        for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
            np.testing.assert_array_equal(x, y)
        extras = given.extras
    assert small.values(given)["pseudo_accuracy"] != small.values(other)["pseudo_accuracy"]


def test_a_bad_sample_has_no_influence(whole):
    _, params, extras, loss = whole
    batch = small.batch(0)
    other = {name: array.copy() for name, array in batch.items()}
    other["dense"][-1], other["labels"][-1] = 7.0, 1
    for number in range(4):
        left, right = (loss(params, extras, b, number) for b in (batch, other))
        assert left[0].loss == right[0].loss
        for x, y in zip(
            jax.tree.leaves((left[0].extras, left[1])),
            jax.tree.leaves((right[0].extras, right[1])),
            strict=True,
        ):
            np.testing.assert_array_equal(x, y)
        extras = left[0].extras


@pytest.mark.parametrize("case", ["no known positive", "nothing known", "nothing valid"])
def test_empty_batches_are_finite(whole, case):
    _, params, extras, loss = whole
    batch = small.batch(0)
    if case == "no known positive":
        batch["labels"] = np.minimum(batch["labels"], 0)
    elif case == "nothing known":
        batch["labels"][:] = 0
    else:
        batch["valid"][:] = False
    for number in (0, 2, 3):
        out, grads = loss(params, extras, batch, number)
        finite = [np.isfinite(x).all() for x in jax.tree.leaves((out.loss, out.extras, grads))]
        assert all(finite)
        assert not np.asarray(out.extras["bank"].count).any()
        assert small.values(out)["loss_contrastive"] == 0.0
        if case == "nothing known":
            assert small.values(out)["loss_region"] == 0.0
        if case == "nothing valid":
            assert out.loss == 0.0 and not any(np.asarray(g).any() for g in jax.tree.leaves(grads))


def test_only_prompts_train_through_the_frozen_text_tower(whole):
    _, params, extras, loss = whole
    _, grads = loss(params, extras, small.batch(0), 0)
    for name in ("prompts", "region_attention", "projections", "log_inverse_temperature"):
        assert min(np.abs(g).max() for g in jax.tree.leaves(grads[name])) > 0, name


ABLATIONS = {
    "baseline": ({"region_attention": False}, {}, set(), ("prompts",)),
    "+CARL": ({}, {}, set(), ("prompts", "region_attention")),
    "+KD": ({}, {"distillation_weight": 0.05}, set(), ("prompts", "region_attention")),
    "+MMCL": (
        {},
        {"contrastive_weight": 0.01},
        {"bank"},
        ("prompts", "projections", "region_attention"),
    ),
    "+MMCP visual": (
        {"modality": "visual"},
        {},
        {"bank", "visual_thresholds"},
        ("prompts", "region_attention"),
    ),
    "+MMCP text": (
        {"modality": "text"},
        {},
        {"text_thresholds", "text_prototypes"},
        ("prompts", "region_attention"),
    ),
    "+MMCP": (
        {"modality": "both"},
        {},
        {"bank", "visual_thresholds", "text_thresholds", "text_prototypes"},
        ("prompts", "region_attention"),
    ),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_each_ablation_is_the_sum_of_its_terms_and_keeps_only_its_memory(whole, name):
    options, weights, kept, trained = ABLATIONS[name]
    options = dict(options)
    memory = small.memory(pseudo_labels=options.pop("modality", "none"))
    weights = {"distillation_weight": 0.0, "contrastive_weight": 0.0} | weights
    if name == "baseline":  # one field: it takes what needs regions with it
        weights, memory = {}, small.memory()
    method = small.make(loss=trm_ml.Loss(**weights), memory=memory, **options)
    own, extras = jax.eval_shape(lambda k: method.init(k, pretrained=None), small.KEY)
    assert set(extras) == kept
    assert set(own) == {"clip", "log_inverse_temperature", *trained}
    params, batch = whole[1], small.batch(0)
    every = small.values(whole[3](params, whole[2], batch, 0)[0])
    extras = small.init(method)[1]
    subset = {part: params[part] for part in own}
    if name == "baseline":
        out, _ = small.loss_function(method)(subset, extras, batch, 0)
        np.testing.assert_allclose(out.loss, _baseline(method, subset, batch), rtol=1e-4)
        return
    out, _ = small.loss_function(method)(subset, extras, batch, 0)
    wanted = every["loss_query"] + every["loss_region"]
    wanted += weights["distillation_weight"] * every["loss_distillation"]
    wanted += weights["contrastive_weight"] * every["loss_contrastive"]
    np.testing.assert_allclose(out.loss, wanted, rtol=1e-5)
    if "bank" in kept:
        positives = ((batch["labels"] == 1) & batch["valid"][:, None]).sum(0)
        np.testing.assert_array_equal(out.extras["bank"].count, np.minimum(2 * positives, 3))


def _baseline(method, params, batch):
    """ASL on the mean of the dense features, known entries alone."""
    text = jax.jit(method.predict["prepare"])(params, {}, {})
    image = unit(batch["dense"].mean(1))
    scale = np.exp(params["log_inverse_temperature"])
    logit = (
        scale
        * image
        @ (unit(np.asarray(text["text_positive"])) - unit(np.asarray(text["text_negative"]))).T
    )
    p, labels = sigmoid(logit), batch["labels"]
    shifted = np.maximum(p - 0.05, 0)
    values = np.where(
        labels == 1,
        -(1 - p) * np.log(p),
        np.where(labels == -1, -(shifted**2) * np.log(1 - shifted), 0),
    )
    return values[batch["valid"]].sum(1).mean()


def test_predictions_are_the_region_level_and_its_soft_regions(whole):
    method, params, extras, _ = whole
    batch = small.batch(0)
    inputs = {name: batch[name] for name in small.INPUTS}
    text = jax.jit(method.predict["prepare"])(params, extras, {})
    shown = jax.jit(method.predict["regions"])(params, extras, inputs | text)
    energies, _, regions = decoder(
        _host(params["region_attention"]), batch["dense"].astype(np.float64)
    )
    scale = np.exp(params["log_inverse_temperature"])
    difference = unit(np.asarray(text["text_positive"])) - unit(np.asarray(text["text_negative"]))
    scores = sigmoid(scale * np.einsum("ncd,cd->nc", unit(regions), difference))
    np.testing.assert_allclose(shown["scores"], scores, atol=1e-4)
    np.testing.assert_allclose(
        shown["maps"], sigmoid(energies).reshape(small.ROWS, 5, *small.GRID), atol=1e-5
    )
    # Without the prepared text features the text tower is asked, with the same result.
    direct = jax.jit(method.predict["scores"])(params, extras, inputs)["scores"]
    np.testing.assert_allclose(direct, shown["scores"], atol=1e-6)


def test_the_papers_number_of_trained_parameters():
    clip = registry.architecture("RN101")
    info = DataInfo(class_names=tuple(f"class {i}" for i in range(80)))
    method = trm_ml.make(
        info=info,
        tokenizer=ClipTokenizer(),
        clip=clip,
        grid=(14, 14),
        inputs={"image": ArraySpec((None, 448, 448, 3), np.uint8)},
    )
    params, extras = jax.eval_shape(lambda k: method.init(k, pretrained=None), small.KEY)
    count = {
        name: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(part))
        for name, part in params.items()
    }
    assert count["prompts"] == 1_310_720
    assert count["region_attention"] + count["projections"] == 5_819_392
    assert sum(count.values()) - count["clip"] == 7_130_113
    assert extras["bank"].slots.shape == (80, 64, 512)
    assert jax.tree.structure(extras["text_thresholds"]) == jax.tree.structure(create(80))


def test_another_classification_loss_on_the_same_head_sees_unknown_labels_as_unknown():
    settings = trm_ml.Loss(classification="hill", reduction="mean")
    method = small.make(loss=settings, region_attention=False, single_positive=True)
    params, extras = small.init(method)
    batch = small.batch(0)
    out, _ = small.loss_function(method)(params, extras, batch, 0)
    scores = jax.jit(method.predict["scores"])(params, extras, batch)["scores"]
    logits = np.log(scores) - np.log1p(-np.asarray(scores))
    values = np.asarray(
        partial_labels.hill(jnp.asarray(logits), jnp.asarray(batch["labels"]))
    ).mean(-1)
    np.testing.assert_allclose(out.loss, values[batch["valid"]].mean(), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": trm_ml.Loss(reduction="max")}, "loss.reduction='max' is none of sum, mean"),
        ({"memory": small.memory(pseudo_labels="audio")}, "memory.pseudo_labels='audio'"),
        ({"query_init": "zeros"}, "query_init='zeros'"),
        ({"loss": trm_ml.Loss(classification="bce")}, "loss.classification='bce' is none of asl"),
        ({"loss": trm_ml.Loss(classification="epr")}, "needs loss.expected_positives"),
    ],
)
def test_choices_that_do_not_exist_are_named(options, message):
    with pytest.raises(UserError, match=message):
        small.make(**options)
