"""What a matching run retrieves for given images and captions: rankings, pictures, attention."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trm_jax.data.nouns import singular
from trm_jax.train.predictor import Predictor
from trm_jax.types import UserError
from trm_jax.visualize.regions import render_heatmaps
from trm_jax.visualize.retrievals import (
    FoundImage,
    FoundText,
    attention_map,
    render_images,
    render_texts,
)


class Captions(NamedTuple):
    """texts: of a file, in its order; owners: the image each describes, "" where nobody knows."""

    texts: tuple[str, ...]
    owners: tuple[str, ...]


def read_captions(path: str | Path) -> Captions:
    """Captions of a text file, one a line: "caption", "image<TAB>caption" or "image#k<TAB>caption".

    Raises:
      UserError: no such file, not UTF-8, an empty line in it or nothing else.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").rstrip("\r\n").split("\n")
    except OSError as error:
        raise UserError(f"--captions: {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise UserError(f"--captions: {path} is not UTF-8; save it in that encoding") from None
    texts, owners = [], []
    for number, line in enumerate(lines, start=1):
        owner, tab, text = line.rpartition("\t")
        if not text.strip():
            raise UserError(f"--captions: {path}, line {number}: the caption is empty")
        texts.append(text.strip())
        owners.append(Path(owner.partition("#")[0]).stem if tab else "")
    return Captions(tuple(texts), tuple(owners))


def rankings(scores: np.ndarray, names: Sequence[str], captions: Captions) -> list[dict[str, Any]]:
    """The lines of predictions.jsonl: images for each caption, then captions for each image.

    Args:
      scores: [N, M] of image n and caption m.
      names: [N] of the images.
      captions: [M].
    """
    lines: list[dict[str, Any]] = []
    for text, column in zip(captions.texts, scores.T, strict=True):
        order = np.argsort(-column, kind="stable")
        found = [{"id": str(names[i]), "score": float(column[i])} for i in order]
        lines.append({"query": text, "results": found})
    for name, row in zip(names, scores, strict=True):
        order = np.argsort(-row, kind="stable")
        found = [{"text": captions.texts[j], "score": float(row[j])} for j in order]
        lines.append({"image": str(name), "results": found})
    return lines


def draw(
    scores: Mapping[str, np.ndarray],
    images: Mapping[Path, np.ndarray],
    captions: Captions,
    out: Path,
    *,
    top: int,
    rows: int = 8,
) -> list[Path]:
    """Writes images_of_captions.png and captions_of_images.png, of the first `rows` of each.

    Args:
      scores: name of a run -> [N, M]; several runs stand side by side.
      images: file -> [H, W, 3] uint8 RGB, N of them.
      captions: M of them; a hit is an image that is the caption's own.
      out: folder of the pictures.
      top: how many are shown.
      rows: captions, and images, in a picture.
    """
    files = list(images)

    def hit(i: int, j: int) -> bool | None:
        return captions.owners[j] == files[i].stem if captions.owners[j] else None

    def images_of(j: int, matrix: np.ndarray) -> list[FoundImage]:
        order = np.argsort(-matrix[:, j], kind="stable")[:top].tolist()
        return [FoundImage(images[files[i]], float(matrix[i, j]), hit(i, j)) for i in order]

    def texts_of(i: int, matrix: np.ndarray) -> list[FoundText]:
        order = np.argsort(-matrix[i], kind="stable")[:top].tolist()
        return [FoundText(captions.texts[j], float(matrix[i, j]), hit(i, j)) for j in order]

    lines = [
        (text, {name: images_of(j, matrix) for name, matrix in scores.items()})
        for j, text in enumerate(captions.texts[:rows])
    ]
    blocks = [
        (images[file], {name: texts_of(i, matrix) for name, matrix in scores.items()})
        for i, file in enumerate(files[:rows])
    ]
    return [
        render_images(lines, path=out / "images_of_captions.png"),
        render_texts(blocks, path=out / "captions_of_images.png"),
    ]


def draw_attention(
    model: Predictor,
    features: np.ndarray,
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    out: Path,
    *,
    boxes: Sequence[np.ndarray | None] | None = None,
    top: int = 5,
) -> list[Path]:
    """Writes attention_k.png: where the words of caption k look in image k.

    Nouns with a proxy come first; a word's title is its greatest weight.

    Args:
      model: of a matching run.
      features: [K, r, D] regions of the images.
      images, captions: K of each.
      out: folder of the pictures.
      boxes: [r, 4] of each image, x1, y1, x2, y2 in its pixels; None: regions are a square grid.
      top: words in a picture.
    """
    tokens = model.tokens(captions)
    parts = model.run("attention", [{"features": features.astype(np.float32), "tokens": tokens}])
    weights = next(iter(parts))["weights"]
    boxes = boxes or [None] * len(captions)
    written = []
    tokenizer: Any = model.tokenizer  # of words or word pieces, which know their places
    for k, caption in enumerate(captions):
        maps, order = {}, {}
        for position, (start, end) in enumerate(
            tokenizer.spans(caption)[: tokens.shape[1] - 2], start=1
        ):
            word = caption[start:end].lower()
            if not word[0].isalnum() or word in maps:
                continue
            maps[word] = attention_map(weights[k, position], images[k].shape[:2], boxes[k])
            order[word] = float(weights[k, position].max())
        known = {word for word in maps if {word, singular(word)} & {*model.nouns}}
        chosen = sorted(maps, key=lambda word: (word not in known, -order[word]))[:top]
        written.append(
            render_heatmaps(
                images[k],
                {word: maps[word] for word in chosen},
                {word: order[word] for word in chosen},
                path=out / f"attention_{k}.png",
                top_k=top,
                scaling="map",
            )
        )
    return written
