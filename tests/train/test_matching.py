"""What a matching run makes of its config: words, nouns, weights of the text side."""

import json

import numpy as np
import pytest
import safetensors.numpy

from tests import precomputed, tiny
from tests.pretrained.test_convert_bert import CONFIG, PLACES
from trm_jax.train import experiment, paths
from trm_jax.types import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return precomputed.write(tmp_path_factory.mktemp("precomp"))


def _config(data, kind="scan"):
    config = tiny.napreg(kind)
    root, tagger = data
    config.data.update({"root": str(root)})
    config.data.options.captions_per_image = 2
    config.nouns.tagger = str(tagger)
    return config


def _build(config, tmp_path):
    return experiment.build(config.copy_and_resolve_references(), cache_dir=tmp_path)


def test_nouns_are_marked_at_their_tokens(data, tmp_path):
    built = _build(_config(data), tmp_path)
    assert built.nouns.vocabulary.nouns[:2] == ("dog", "kid")
    assert built.info.num_proxies == 5 and built.info.steps_per_epoch == 3
    words = built.tokenizer.words
    (batch,) = [next(iter(built.job.batches(0)))]
    for tokens, marks, near in zip(batch["tokens"], batch["noun_ids"], batch["nouns"], strict=True):
        # The plural is another word, and the same noun.
        named = {"dog": "dog", "dogs": "dog", "kids": "kid", "box": "box", "paris": "paris"}
        named["alps"] = "alp"
        for token, mark in zip(tokens, marks, strict=True):
            word = words[token - 4] if token >= 4 else ""
            wanted = built.nouns.vocabulary.index[named[word]] if word in named else -1
            assert mark == wanted
        assert set(marks[marks >= 0].tolist()) == set(near[near >= 0].tolist())


def test_words_start_from_glove_where_it_knows_them(data, tmp_path):
    glove = tmp_path / "glove.txt"
    rows = {"dog": np.arange(8) / 10, "kids": -np.arange(8) / 10}
    glove.write_text("".join(f"{w} {' '.join(map(str, row))}\n" for w, row in rows.items()))
    config = _config(data)
    plain = paths.flatten(_build(config, tmp_path).job.init()[0])
    config.model.matching.text.weights = str(glove)
    built = _build(config, tmp_path)
    name = "matching/params/text/word_embedding"
    table = np.asarray(paths.flatten(built.job.init()[0])[name])
    known = [4 + built.tokenizer.words.index(word) for word in rows]
    np.testing.assert_allclose(table[known], np.stack(list(rows.values())), rtol=1e-6)
    rest = np.setdiff1d(np.arange(len(table)), known)
    np.testing.assert_array_equal(table[rest], np.asarray(plain[name])[rest])
    config.model.matching.text.embedding = 7
    with pytest.raises(UserError, match="set model.matching.text.embedding=8"):
        _build(config, tmp_path)


def test_a_vocabulary_of_scan_gives_the_words(data, tmp_path):
    path = tmp_path / "vocab.json"
    ids = {"<pad>": 0, "<start>": 1, "<end>": 2, "<unk>": 3, "kids": 5, "dog": 4, "zebra": 6}
    path.write_text(json.dumps({"word2idx": ids, "idx": 7}))
    config = _config(data)
    config.model.matching.text.vocabulary = str(path)
    assert _build(config, tmp_path).tokenizer.words == ("dog", "kids", "zebra")
    path.write_text("[1]")
    with pytest.raises(UserError, match="no vocabulary of SCAN"):
        _build(config, tmp_path)


def test_a_bert_brings_its_words_sizes_and_weights(data, tmp_path):
    rng = np.random.default_rng(0)
    state = {name: rng.normal(size=shape).astype(np.float32) for name, (shape, _) in PLACES.items()}
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "dog", "##s", "kid", "a", ".", "al", "##ps"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    safetensors.numpy.save_file(state, folder / "model.safetensors")
    config = _config(data)
    config.data.length_buckets = (6, 7)
    config.model.matching.text.update({"kind": "bert", "weights": str(folder)})
    built = _build(config, tmp_path)
    flat = paths.flatten(built.job.init()[0])
    np.testing.assert_array_equal(
        flat["matching/params/text/bert/word_embedding"], state["embeddings.word_embeddings.weight"]
    )
    assert built.clip["text"]["bert"]["num_hidden_layers"] == 2
    batch = next(iter(built.job.batches(0)))
    # "dogs" is two pieces: the first stands for the noun.
    rows = [list(row) for row in batch["tokens"]]
    row = next(number for number, tokens in enumerate(rows) if tokens[1:3] == [4, 5])
    dog = built.nouns.vocabulary.index["dog"]
    assert batch["noun_ids"][row][1] == dog and batch["noun_ids"][row][2] == -1
    state = tiny.run(built.job, tmp_path / "run")
    assert int(state.step) == 6 and np.isfinite(tiny.lines(tmp_path / "run")[-1]["Rsum"])
