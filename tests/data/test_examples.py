"""Examples: what a sample holds, how blanks look, where randomness comes from."""

import numpy as np
import pytest

from trm_jax.data import examples
from trm_jax.data.sources.caption_shuffle import ShuffledCaptions
from trm_jax.data.sources.glyphs import GlyphScenes
from trm_jax.data.sources.subset import Subset
from trm_jax.data.tokenizers import WordTokenizer
from trm_jax.data.transforms import image_transform
from trm_jax.types import BadSampleError, UserError


class _Source:
    """Images of constant value index, one of them bad; every third without captions."""

    ids = tuple("abcdef")
    class_names = ("cat", "dog")
    labels = np.array([[1, -1], [-1, 1], [1, 1], [-1, -1], [1, 0], [0, 0]], np.int8)

    def __len__(self):
        return 6

    def read(self, index):
        if index == 0:
            raise BadSampleError("broken")
        return {"image": np.full((4 + index, 5, 3), index, np.uint8)}

    def captions(self, index):
        return () if index % 3 == 2 else tuple(f"w{index} c{j}" for j in range(3))


class _Features(_Source):
    def read(self, index):
        return {
            "dense": np.full((4, 3), index, np.float16),
            "global_embedding": np.full(3, index, np.float16),
        }


def _tokenizer():
    return WordTokenizer([f"w{i}" for i in range(6)] + [f"c{j}" for j in range(3)])


def test_multi_label_sample_and_blank():
    observed = np.zeros((6, 2), np.int8)
    observed[1] = (-1, 0)
    data = examples.MultiLabelExamples(_Source(), observed, image_transform("none", 8))
    sample = data.sample(1, np.random.default_rng(0))
    assert sample["labels"].tolist() == [-1, 0] and sample["truth"].tolist() == [-1, 1]
    assert sample["index"] == 1 and sample["index"].dtype == np.int32
    assert sample["valid"] and np.all(sample["image"] == 1)
    with pytest.raises(BadSampleError):
        data.sample(0, np.random.default_rng(0))
    blank = data.blank(0)
    assert blank["index"] == 0 and not blank["valid"] and data.blank(-1)["index"] == -1
    assert {k: (v.shape, v.dtype) for k, v in blank.items()} == {
        k: (np.shape(v), v.dtype) for k, v in sample.items()
    }
    assert not blank["image"].any() and not blank["labels"].any() and not blank["truth"].any()


def test_two_views_are_independent_draws():
    source = _Source()
    source.read = lambda index: {
        "image": np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)
    }
    data = examples.MultiLabelExamples(source, None, image_transform("flip_crop", 16), views=2)
    sample = data.sample(1, np.random.default_rng(0))
    assert (sample["image"] != sample["image_2"]).any()
    again = data.sample(1, np.random.default_rng(0))
    np.testing.assert_array_equal(sample["image_2"], again["image_2"])


def test_cached_arrays_become_single_precision():
    sample = examples.MultiLabelExamples(_Features()).sample(2, np.random.default_rng(0))
    assert sample["dense"].dtype == np.float32 and np.all(sample["dense"] == 2)
    assert sample["global_embedding"].shape == (3,)


def test_observed_of_another_shape_is_refused():
    with pytest.raises(UserError, match="observed labels"):
        examples.MultiLabelExamples(_Source(), np.zeros((5, 2), np.int8))


def test_caption_examples_draw_one_caption_and_skip_uncaptioned():
    data = examples.CaptionExamples(_Source(), _tokenizer(), 6, image_transform("none", 4))
    assert data.indices.tolist() == [0, 1, 3, 4] and len(data) == 4
    drawn = set()
    for seed in range(30):
        sample = data.sample(2, np.random.default_rng(seed))
        assert sample["index"] == 3 and sample["tokens"][:2].tolist() == [2, 4 + 3]
        drawn.add(int(sample["tokens"][2]))
    assert drawn == {10, 11, 12}
    blank = data.blank(0)
    assert blank["index"] == 0 and blank["tokens"].tolist() == [0] * 6


def test_nouns_add_their_prompts_and_change_nothing_else():
    glyphs = GlyphScenes(seed=0, size=20, image_size=32)
    tokenizer = WordTokenizer(glyphs.vocabulary())
    words, names = {**dict(enumerate(tokenizer.words, 4)), 2: "", 3: "", 0: ""}, glyphs.noun_words()
    transform = image_transform("flip_crop", 16)
    # What wraps a source knows the nouns of its captions too.
    for source in (glyphs, Subset(glyphs, range(5, 15)), ShuffledCaptions(glyphs, 0.5, 0)):
        plain = examples.CaptionExamples(source, tokenizer, 18, transform)
        data = examples.CaptionExamples(source, tokenizer, 18, transform, nouns=3)
        expected = plain.sample(7, np.random.default_rng(4))
        sample = data.sample(7, np.random.default_rng(4))
        prompts = sample.pop("noun_tokens")
        assert prompts.shape == (3, 18) and prompts.dtype == np.int32
        assert sample.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(sample[name], value)
        caption = {words[token] for token in sample["tokens"]}
        for row in prompts:  # a photo of ... NOUN, of the caption that is in the sample
            text = [words[token] for token in row]
            assert text[0] == "" and set(text) & names <= caption & names
            assert len(set(text) & names) == 1 and {"a", "photo", "of"} < set(text)
        again = data.sample(7, np.random.default_rng(4))
        np.testing.assert_array_equal(again["noun_tokens"], prompts)
        blank = data.blank(-1)
        assert blank["noun_tokens"].shape == (3, 18) and not blank["noun_tokens"].any()
        assert not blank["valid"] and "noun_tokens" not in plain.blank(0)
    with pytest.raises(UserError, match="take 1 or more"):
        examples.CaptionExamples(glyphs, tokenizer, 18, transform, nouns=-1)


def test_caption_texts_and_images_share_the_source_index():
    source = _Source()
    texts = examples.CaptionTexts(source, _tokenizer(), 5)
    assert texts.image_index.tolist() == [0, 0, 0, 1, 1, 1, 3, 3, 3, 4, 4, 4]
    sample = texts.sample(7, np.random.default_rng(0))
    assert sample["image_index"] == 3 and sample["index"] == 7
    assert sample["tokens"].tolist() == [2, 7, 11, 3, 0]
    assert texts.blank(-1)["image_index"] == -1
    images = examples.ImageExamples(source, image_transform("none", 4), examples.captioned(source))
    assert images.sample(2, np.random.default_rng(0))["index"] == 3
    assert set(images.blank(-1)) == {"image", "index", "valid"}


def test_data_without_labels_or_captions_or_readable_images_is_refused():
    source = _Source()
    source.labels = np.zeros((6, 0), np.int8)
    with pytest.raises(UserError, match="no labels"):
        examples.MultiLabelExamples(source)
    source.captions = lambda index: ()
    for make in (examples.CaptionExamples, examples.CaptionTexts):
        with pytest.raises(UserError, match="no captions"):
            make(source, _tokenizer(), 5)

    def broken(index):
        raise BadSampleError("broken")

    source.read = broken
    with pytest.raises(UserError, match="not one example"):
        examples.ImageExamples(source).blank(0)
