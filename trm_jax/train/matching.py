"""What runs that match images and captions need of a config: words, nouns, weights, examples."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from trm_jax.data import noun_vocabulary, tokenizers, word_vectors, wordpiece
from trm_jax.data.caption_pairs import CaptionPairs
from trm_jax.data.nouns import noun_words_of
from trm_jax.data.sources.base import Source
from trm_jax.models.matching.config import validate
from trm_jax.pretrained import convert_bert
from trm_jax.train import paths
from trm_jax.types import PyTree, UserError

_EMBEDDING = "matching/params/text/word_embedding"


class Nouns:
    """The nouns of training captions that have a proxy; a data.caption_pairs.Nouns.

    vocabulary: the kept nouns; proxy k belongs to its k-th.
    """

    def __init__(self, found, vocabulary, texts: tuple[str, ...], tokenizer):
        self.vocabulary = vocabulary
        self._found, self._texts, self._tokenizer = found, texts, tokenizer

    def ids(self, number: int, length: int) -> np.ndarray:
        """int32 [length]: the proxy of the noun that begins at a token, -1 for none."""
        spans = self._tokenizer.spans(self._texts[number])
        return noun_vocabulary.noun_ids(self._found[number], spans, self.vocabulary, length)

    def of_caption(self, number: int) -> np.ndarray:
        """int32 [k] proxies of the nouns of a caption, each once."""
        found = (self.vocabulary.index.get(noun) for _, _, noun in self._found[number])
        return np.asarray(sorted({k for k in found if k is not None}), np.int32)

    def report(self) -> dict[str, int]:
        """How many captions and proxies there are, and captions that name no proxy."""
        without = sum(not len(self.of_caption(number)) for number in range(len(self._texts)))
        return {
            "captions": len(self._texts),
            "proxies": len(self.vocabulary),
            "captions_without_noun": without,
        }


def open_nouns(config: ConfigDict, train: Source, tokenizer, cache_dir: Path) -> Nouns | None:
    """Tags the training captions, or reads the tags made before; None for methods without nouns.

    Raises:
      UserError: the tagger cannot be had, or no noun is frequent enough.
    """
    if config.method != "napreg" or config.loss.nouns == "none":
        return None
    texts = tuple(text for i in range(len(train)) for text in train.captions(i))
    known = noun_words_of(train)
    if known is not None:
        found = noun_vocabulary.of_known_words(texts, known)
    else:
        found = noun_vocabulary.annotate(
            texts,
            tagger=config.nouns.tagger,
            lemmatise=config.nouns.lemmatise,
            cache=getattr(train, "nouns_file", None),
            fallback=cache_dir,
        )
    least = config.nouns.min_count
    vocabulary = noun_vocabulary.NounVocabulary.from_annotations(found, min_count=least)
    return Nouns(found, vocabulary, texts, tokenizer)


def tokenizer(model: ConfigDict, train: Source) -> tokenizers.Tokenizer:
    """That of `model.matching.text`: words of the training captions, or BERT's word pieces."""
    text = model.matching.text
    if text.kind == "bert":
        return wordpiece.WordpieceTokenizer.from_folder(_bert_folder(text))
    if text.vocabulary:
        return tokenizers.WordTokenizer(tokenizers.scan_words(text.vocabulary))
    texts = (caption for index in range(len(train)) for caption in train.captions(index))
    return tokenizers.WordTokenizer.from_captions(texts, text.min_count)


def resolve(model: ConfigDict, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """The matching model's architecture: `model.matching` with what words and weights say."""
    given = model.matching.to_dict()
    text = {"kind": given["text"]["kind"], "vocab_size": tokenizer.vocab_size}
    text["dropout"] = given["text"]["dropout"]
    if text["kind"] == "bert":
        text["bert"] = convert_bert.read_config(_bert_folder(model.matching.text))
        if text["vocab_size"] > text["bert"]["vocab_size"]:
            raise UserError(
                f"model.matching.text.weights={model.matching.text.weights}: its vocabulary has "
                f"{text['vocab_size']} words, its BERT {text['bert']['vocab_size']}"
            )
    else:
        text["embedding"] = given["text"]["embedding"]
    return validate({**given, "text": text})


def start_from(params: PyTree, model: ConfigDict, tokenizer: tokenizers.Tokenizer) -> PyTree:
    """`params` with the word vectors or the BERT that `model.matching.text.weights` names."""
    text = model.matching.text
    if not text.weights:
        return params
    flat = paths.flatten(params)
    if text.kind == "gru":
        words = ("", "", "", "", *getattr(tokenizer, "words", ()))
        vectors, found = word_vectors.read(Path(text.weights), words, text.embedding)
        flat[_EMBEDDING] = jnp.where(jnp.asarray(found)[:, None], vectors, flat[_EMBEDDING])
    else:
        given = convert_bert.read(Path(text.weights))
        flat |= {f"matching/params/text/bert/{k}": v for k, v in paths.flatten(given).items()}
    return paths.unflatten(flat)


def examples(config: ConfigDict, train: Source, tokenizer, nouns: Nouns | None, transform):
    """Every caption of the training images with its image."""
    return CaptionPairs(
        train,
        tokenizer,
        config.data.length_buckets,
        transform,
        nouns=nouns,
        all_captions=nouns is not None and config.loss.positives == "image",
    )


def _bert_folder(text: ConfigDict) -> Path:
    folder = Path(text.weights)
    if not text.weights or not folder.is_dir():
        raise UserError(
            f"model.matching.text.weights={text.weights!r} must be a folder with a BERT's "
            "config.json, model.safetensors and vocab.txt"
        )
    return folder
