"""Fine-tuning against Adam in numpy, and on a world where a turn stands between the two sides."""

import functools
import re

import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracles import domain_matching as oracle
from trm_jax.data.caption_words import CaptionWords
from trm_jax.evaluate.knowledge_matching import score_all
from trm_jax.evaluate.retrieval import recalls as retrieval_recalls
from trm_jax.memory import knowledge_file
from trm_jax.train import finetune
from trm_jax.types import UserError


def captions_of(rows, count):
    """Captions as lists of word numbers."""
    return CaptionWords(
        indptr=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        indices=np.array([word for row in rows for word in row], np.int32),
        words=tuple(f"word{number}" for number in range(count)),
        known=np.ones(count, bool),
        dropped={},
    )


def test_steps_are_adam_on_the_sum_over_different_words_and_real_regions():
    rng = np.random.default_rng(0)
    prototypes = rng.normal(size=(6, 3))
    regions, mask = rng.normal(size=(3, 4, 3)).astype(np.float32), np.ones((3, 4), bool)
    mask[1], mask[2, 1:] = False, False
    regions[~mask] = np.nan
    # Word 4 is in no caption; 0 and 2 are in several, and twice in one.
    captions = captions_of([[0, 2, 0], [], [2, 1], [5, 3, 2]], 6)
    tuned = finetune.fit(
        finetune.list_regions([(regions[:2], mask[:2]), (jnp.asarray(regions[2:]), mask[2:])]),
        prototypes,
        captions,
        steps=3,
        learning_rate=0.1,
    )
    sides = prototypes[[0, 1, 2, 3, 5]], regions[mask].astype(np.float64)
    matrix, mean, square = np.eye(3), np.zeros((3, 3)), np.zeros((3, 3))
    for step in range(3):
        terms = oracle.cycle_consistency(matrix, *sides)
        of_word, of_region = (values.mean() for values in terms)
        np.testing.assert_allclose(tuned.loss[step], sum(map(np.sum, terms)), rtol=1e-5)
        np.testing.assert_allclose(tuned.per_word[step], of_word, rtol=1e-5)
        np.testing.assert_allclose(tuned.per_region[step], of_region, rtol=1e-5)
        gradient = np.zeros((3, 3))
        for place in np.ndindex(3, 3):
            bump = np.zeros((3, 3))
            bump[place] = 1e-6
            values = (oracle.cycle_consistency(matrix + s * bump, *sides) for s in (1, -1))
            up, down = (sum(map(np.sum, terms)) for terms in values)
            gradient[place] = (up - down) / 2e-6
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        fair = mean / (1 - 0.9 ** (step + 1)), square / (1 - 0.999 ** (step + 1))
        matrix = matrix - 0.1 * fair[0] / (np.sqrt(fair[1]) + 1e-8)
    np.testing.assert_allclose(tuned.matrix, matrix, rtol=1e-3, atol=1e-4)
    assert tuned.matrix.dtype == np.float32


SHARED, PLANE, WORDS = 8, 4, 40


def world():
    """(prototypes, regions [400, 4, Z], their words [400, 4]): what words mean is in `SHARED`.

    The other directions tell no words apart. A quarter turn of them stands between the two sides,
    so that the noise of a region decides which words it is like.
    """
    rng = np.random.default_rng(0)
    meaning = rng.normal(size=(WORDS, SHARED))
    meaning /= np.linalg.norm(meaning, axis=1, keepdims=True)
    ones, zeros = np.ones((WORDS, PLANE)), np.zeros((WORDS, PLANE))
    prototypes = np.concatenate([meaning, ones, zeros], axis=1)
    centres = np.concatenate([meaning, zeros, ones], axis=1)
    labels = np.stack([rng.choice(WORDS, 4, replace=False) for _ in range(400)])
    regions = centres[labels] + 0.15 * rng.normal(size=(400, 4, SHARED + 2 * PLANE))
    return prototypes.astype(np.float32), regions.astype(np.float32), labels


TRAINED, HELD_OUT = slice(200), slice(200, 400)


@functools.cache
def tuned_world(seed=0, steps=300):
    prototypes, regions, labels = world()
    images = finetune.list_regions([(regions[TRAINED], np.ones((200, 4), bool))])
    # Texts of other scenes: not one image has its caption among them.
    texts = [np.random.default_rng([7, i]).choice(WORDS, 4).tolist() for i in range(150)]
    return finetune.fit(
        images,
        prototypes,
        captions_of(texts, WORDS),
        steps=steps,
        batch_images=32,
        batch_texts=32,
        learning_rate=0.02,
        seed=seed,
    )


def test_a_turn_between_the_sides_is_weighed_down_and_held_out_images_match_better():
    prototypes, regions, labels = world()
    tuned = tuned_world()
    assert tuned.per_word[:10].mean() > 0.98 * np.log(WORDS)
    assert tuned.per_region[:10].mean() > 0.98 * np.log(32 * 4)
    assert tuned.per_word[-10:].mean() < 0.5 * np.log(WORDS)
    assert tuned.per_region[-10:].mean() < 0.5 * np.log(32 * 4)
    form = np.diag(tuned.matrix @ tuned.matrix.T)
    assert form[:SHARED].mean() > 5 * form[SHARED:].mean()

    captions = captions_of(labels[HELD_OUT].tolist(), WORDS)
    images = [(regions[HELD_OUT], np.ones((200, 4), bool))]

    def both(prototypes, matrix):
        scores = score_all(finetune.transformed(images, matrix), prototypes, captions)
        found = retrieval_recalls(scores, np.arange(200))
        return found["i2t_R@1"], found["t2i_R@1"]

    before = both(prototypes, None)
    after = both(prototypes @ tuned.matrix, tuned.matrix)
    assert before[0] < 80 and before[1] < 40, before
    assert min(after) > 85, after


def test_same_seed_same_bits_other_seed_other_batches():
    one, again, other = (tuned_world.__wrapped__(seed, 5) for seed in (3, 3, 4))
    for a, b in zip(one, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one.matrix != other.matrix).any() and (one.loss != other.loss).all()
    # Images and texts are not drawn alike, and no batch has one twice.
    items = np.arange(100)
    orders = [finetune._batches(items, 32, np.random.default_rng([3, stream])) for stream in (0, 1)]
    drawn = np.array([[next(order) for order in orders] for _ in range(6)])
    assert (drawn[:, 0] != drawn[:, 1]).any(1).all()
    assert all(len(np.unique(drawn[n : n + 3, s])) == 96 for n in (0, 3) for s in (0, 1))


def test_only_what_counts_is_drawn(capsys):
    rng = np.random.default_rng(1)
    prototypes = rng.normal(size=(9, 4)).astype(np.float32)
    regions, mask = rng.normal(size=(12, 5, 4)).astype(np.float32), rng.random((12, 5)) < 0.6
    mask[:, 0] = True
    texts = [rng.integers(0, 9, size=size).tolist() for size in rng.integers(1, 5, size=11)]
    options = {"steps": 6, "batch_images": 5, "batch_texts": 4, "learning_rate": 0.05}

    def run(regions, mask, texts):
        images = finetune.list_regions([(regions, mask)])
        return finetune.fit(images, prototypes, captions_of(texts, 9), **options)

    plain = run(regions, mask, texts)
    assert capsys.readouterr().out.count("fine-tuning: step") == 6
    # Wider rows, images without a region and texts without a word change not one bit.
    wide, kept = np.full((14, 8, 4), np.inf, np.float32), np.zeros((14, 8), bool)
    wide[1:13, 2:7], kept[1:13, 2:7] = regions, mask
    again = run(wide, kept, [[], *texts[:4], [], *texts[4:]])
    for a, b in zip(plain, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_few_shapes_are_compiled():
    assert [finetune._room(n) for n in (1, 15, 16, 17, 600, 4608, 4609)] == [
        *(1, 15, 16, 18, 640, 4608, 5120)
    ]
    assert all(n <= finetune._room(n) <= n * 1.125 for n in range(1, 3000))


def test_a_tuned_knowledge_matches_regions_that_went_through_its_map():
    rng = np.random.default_rng(2)
    known = knowledge_file.Knowledge(
        words=("a", "b", "c"),
        word_vectors=np.zeros((3, 2), np.float32),
        prototypes=rng.normal(size=(3, 4)).astype(np.float32),
        counts=np.ones(3, np.int64),
        random_regions=np.ones((3, 4), np.float32),
        provenance={},
    )
    matrix = rng.normal(size=(4, 4)).astype(np.float32)
    tuned = knowledge_file.transform(known, matrix)
    regions = rng.normal(size=(2, 1, 4)).astype(np.float32)
    batch = [(regions, np.ones((2, 1), bool))]
    captions = captions_of([[0], [1], [2]], 3)
    scores = score_all(finetune.transformed(batch, tuned.region_map), tuned.prototypes, captions)
    form = matrix.astype(np.float64) @ matrix.T
    length = lambda x: np.sqrt(np.einsum("nz,zy,ny->n", x, form, x))  # noqa: E731
    expected = regions[:, 0] @ form @ known.prototypes.T
    expected /= length(regions[:, 0])[:, None] * length(known.prototypes)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    (same, _), *rest = finetune.transformed(batch, known.region_map)
    assert same is regions and not rest
    with pytest.raises(UserError, match="regions are 4 wide, the knowledge was fine-tuned on 3"):
        next(finetune.transformed(batch, np.eye(3)))


def fitted(images=None, prototypes=None, rows=((0, 1), (1,)), **settings):
    images = images or [(np.eye(4, dtype=np.float32)[None], np.ones((1, 4), bool))]
    prototypes = np.eye(2, 4) if prototypes is None else prototypes
    listed = finetune.list_regions(images)
    return finetune.fit(listed, prototypes, captions_of(rows, 2), **{"steps": 2, **settings})


ONES = np.ones((1, 2), bool)
REFUSED = [
    ({"steps": 0}, "steps=0 must be 1 or more"),
    ({"batch_images": 0}, "batch_images=0 must"),
    ({"batch_texts": -1}, "batch_texts=-1 must"),
    ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
    ({"learning_rate": float("nan")}, "learning_rate=nan must be positive"),
    ({"learning_rate": 1e38}, "the loss of step 2 is not finite; take a smaller learning_rate"),
    ({"rows": ((), ())}, "no text has a word to fine-tune on"),
    ({"images": [(np.zeros((1, 2, 4)), ~ONES)]}, "no image has a region to fine-tune on"),
    ({"images": [(np.full((1, 2, 4), np.nan), ONES)]}, "regions of the images are not finite"),
    ({"images": [(np.zeros((1, 2, 3)), ONES)]}, "prototypes are 4 wide, regions 3"),
    ({"images": [(np.zeros((1, 3, 4)), ONES)]}, r"\[1, 3, 4\] and a mask bool\[1, 2\]"),
    ({"images": [(np.zeros((1, 2, w)), ONES) for w in (4, 5)]}, "4 wide in one batch and 5 in"),
    ({"prototypes": np.eye(3, 4)}, "3 prototypes and 2 words of the texts"),
    ({"prototypes": np.array([[0, 1, 0, 0], [0, np.inf, 0, 0]])}, "1 of 2 .* 'word1' the first"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED, ids=[m[:25] for _, m in REFUSED])
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(UserError, match=message) as caught:
        fitted(**wrong)
    assert "\n" not in str(caught.value)


def test_no_image_is_refused():
    with pytest.raises(UserError, match=re.escape("there is no image to fine-tune on")):
        finetune.list_regions([])
