"""A run of MASK: it learns from regions alone what captions of other images speak of."""

import numpy as np
import pytest

from tests import knowledge_data, tiny
from trm_jax.train import experiment, knowledge
from trm_jax.types import UserError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return knowledge_data.write(tmp_path_factory.mktemp("knowledge"))


def _build(config, tmp_path):
    return experiment.build(config.copy_and_resolve_references(), cache_dir=tmp_path)


def test_words_become_prototypes_that_match_captions(files, tmp_path):
    config = tiny.mask(*files)
    config.optimizer.learning_rate = 1e-2
    config.train.update({"steps": 60, "log_every": 30, "eval_every": 60, "checkpoint_every": 60})
    built = _build(config, tmp_path)
    assert (built.counts["words"], built.counts["words_without_vector"]) == (9, 1)
    assert built.counts["samples"] == built.counts["rows_samples"] == 200
    tiny.run(built.job, tmp_path / "run")
    first, *_, final = tiny.lines(tmp_path / "run")
    # By chance 21 %; of 24 images, five have both words of a caption.
    assert final["t2i_R@5"] > 60 and final["i2t_R@5"] > 60
    # Eight rows of five regions; one of all has a word without a vector.
    assert first["regions"] == 40.0 and 39.5 <= first["samples"] < 40


def test_unknown_words_are_made_of_their_neighbours(files, tmp_path):
    config = tiny.mask(*files)
    config.words.neighbours = 2
    built = _build(config, tmp_path)
    matcher = knowledge.CaptionMatcher(built.test, built.words, config.words)
    assert {"hound", "child", "oak", "and"} == {
        word for word, known in zip(matcher.captions.words, matcher.captions.known, strict=True)
        if not known
    }  # fmt: skip
    assert matcher.captions.dropped == {"A": 24, "the": 48}
    names = list(built.words.names)
    vectors = np.eye(len(names), 16, dtype=np.float32)
    found = matcher.prototypes(vectors)
    assert found.neighbours["hound"][0] == "dog" and len(found.neighbours["hound"]) == 2
    row = matcher.captions.words.index("hound")
    assert found.vectors[row].argmax() == names.index("dog")
    assert found.vectors[row].sum() == pytest.approx(1.0)
    light = matcher.captions.words.index("traffic light")
    np.testing.assert_array_equal(found.vectors[light], vectors[names.index("traffic light")])
    config.words.unknown = "drop"
    matcher = knowledge.CaptionMatcher(built.test, built.words, config.words)
    assert matcher.captions.known.all() and matcher.captions.dropped["oak"] > 0


def test_devices_and_a_change_of_the_batch_size_give_the_same_run(files, tmp_path):
    config = tiny.mask(*files)
    config.data.batch_size_schedule = ((1, 8), (1, 16))
    config.train.update({"epochs": 3, "log_every": 1, "eval_every": 100})
    config.train.steps = 7
    built = _build(config, tmp_path)
    # Forty rows: 5 steps of 8, then 2 of 16 an epoch.
    assert [step for step in range(9) if built.job.ends_epoch(step)] == [4, 6, 8]
    assert built.job.total_steps == 7
    one = tiny.run(built.job, tmp_path / "one", tiny.mesh(1))
    four = tiny.run(_build(config, tmp_path).job, tmp_path / "four", tiny.mesh(4))
    for mine, theirs in zip(
        tiny.lines(tmp_path / "one"), tiny.lines(tmp_path / "four"), strict=True
    ):
        np.testing.assert_allclose(mine.get("loss", 0), theirs.get("loss", 0), rtol=2e-4)
    for a, b in zip(one.extras["prototypes"], four.extras["prototypes"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words.vectors": ""}, "words.vectors is empty"),
        ({"words.vectors": "nowhere.txt"}, "nowhere.txt"),
        ({"words.unknown": "guess"}, "words.unknown='guess' is none of interpolate"),
        ({"words.pooling": "sum"}, "words.pooling=.sum. is none of"),
        ({"data.dataset": "coco"}, "data.dataset='coco' has no word-labelled regions"),
        ({"data.root": ""}, "data.root is empty"),
        ({"data.test_dataset": ""}, "data.test_dataset is empty"),
        ({"data.options.box_format": "yx"}, "box_format is 'yx'"),
        ({"rows.most": 3}, "has 4 regions, rows are declared for 3"),
        ({"rows.attention_set": "batch"}, "attention_set is 'batch'"),
        ({"loss.negatives": "none"}, "loss.negatives='none' is none of"),
        ({"loss.temperature": 0.0}, "loss.temperature=0.0 must be positive"),
        ({"memory.decay": 1.0}, "memory.decay=1.0 must be in"),
        ({"model.knowledge.width": 0}, "model.knowledge.width"),
        ({"data.batch_size_schedule": ((1,),)}, "must be pairs"),
    ],
)
def test_bad_settings(files, tmp_path, change, message):
    config = tiny.mask(*files)
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):  # before anything is trained
        _build(config, tmp_path)


def test_regions_without_any_vector(files, tmp_path):
    config = tiny.mask(*files)
    vectors = tmp_path / "others.txt"
    vectors.write_text("tulip 1.0 2.0\nrose 0.5 0.25\n")
    config.words.vectors = str(vectors)
    with pytest.raises(UserError, match="a vector for none of the 9 words of the regions"):
        _build(config, tmp_path)
