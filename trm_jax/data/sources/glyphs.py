"""Glyph scenes: the endless, deterministic default data of this package.

A scene is a textured background with one to six coloured, rotated, sheared and partly hidden
symbols of forty categories, among clutter that belongs to none. Every sample is a pure function of
(seed, index): layout, pixels, captions and caption noise each have a random stream of their own,
so labels need no pixels and pixels do not depend on what was asked before.
"""

import bisect
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trm_jax.data.sources import glyph_captions
from trm_jax.data.sources.glyph_font import (
    AFFINITY,
    CATEGORIES,
    CLASS_NAMES,
    COLOR_NAMES,
    PALETTE,
    TEXTURES,
    THEMES,
    Background,
    Scene,
    SceneObject,
    blend,
)
from trm_jax.data.sources.glyph_paint import render, warp_object
from trm_jax.types import UserError

NUM_CAPTIONS = 5
# Probabilities of one to six objects; the next object is of the theme of one that is there, its
# affine partner, the same category again, or any category.
_COUNTS = (0.1, 0.19, 0.25, 0.22, 0.15, 0.09)
_SAME_THEME, _PARTNER, _AGAIN = 0.45, 0.28, 0.08
_LARGEST = (0.46, 0.44, 0.4, 0.36, 0.33, 0.3)  # by number of objects
_SMALLEST = 0.15
_RGB = tuple[int, int, int]
_STREAMS = {"classes": 0, "layout": 1, "pixels": 2, "captions": 3, "is_noisy": 4, "noise": 5}


def _cumulative(weights: Sequence[float]) -> list[float]:
    sums = list(itertools.accumulate(weights))
    return [value / sums[-1] for value in sums]


@functools.lru_cache(maxsize=1)
def _tables():
    """Cumulative class weights per theme and over all classes, and the partners of each class."""
    # A mild long tail in an order that is unrelated to the table's: weights from 0.4 to 1.4.
    weights = [0.4 + (17 * i % len(CATEGORIES)) / len(CATEGORIES) for i in range(len(CATEGORIES))]
    members = {t: [i for i, c in enumerate(CATEGORIES) if c.theme == t] for t in THEMES}
    themes = {t: (m, _cumulative([weights[i] for i in m])) for t, m in members.items()}
    partners: list[list[int]] = [[] for _ in CATEGORIES]
    for pair in AFFINITY:
        first, second = (CLASS_NAMES.index(name) for name in pair)
        partners[first].append(second)
        partners[second].append(first)
    return themes, _cumulative(weights), partners


def _pick(draw: Callable[[], float], cumulative: Sequence[float]) -> int:
    return min(bisect.bisect_right(cumulative, draw()), len(cumulative) - 1)


def _choose_classes(draw: Callable[[], float], most: int) -> list[int]:
    """The categories of a scene, with repetitions: a walk along themes and affinities."""
    themes, anything, partners = _tables()
    chosen = [_pick(draw, anything)]
    for _ in range(min(_pick(draw, _cumulative(_COUNTS)), most - 1)):
        anchor, move = chosen[int(draw() * len(chosen))], draw()
        if move < _SAME_THEME:
            members, cumulative = themes[CATEGORIES[anchor].theme]
            chosen.append(members[_pick(draw, cumulative)])
        elif move < _SAME_THEME + _PARTNER and partners[anchor]:
            chosen.append(partners[anchor][int(draw() * len(partners[anchor]))])
        elif move < _SAME_THEME + _PARTNER + _AGAIN:
            chosen.append(anchor)
        else:
            chosen.append(_pick(draw, anything))
    return chosen


def _jittered(draw: Callable[[], float], rgb: _RGB, amount: int) -> _RGB:
    r, g, b = (min(255, max(0, round(value + amount * (2 * draw() - 1)))) for value in rgb)
    return r, g, b


def _difference(first: _RGB, second: _RGB) -> int:
    return sum(abs(a - b) for a, b in zip(first, second, strict=True))


def _choose_background(draw: Callable[[], float]) -> Background:
    base = _jittered(draw, (130, 130, 130), 115)
    return Background(
        texture=int(draw() * len(TEXTURES)),
        rgb=base,
        second_rgb=_jittered(draw, base, 60),
        angle=np.pi * draw(),
        period=0.08 + 0.25 * draw(),
    )


def _choose_color(
    draw: Callable[[], float], behind: Background, typical: int | None = None
) -> tuple[int, _RGB]:
    """The first of six random colours unlike both of the background's, or the last.

    The first is `typical` if there is one.
    """
    color, rgb = 0, behind.rgb
    for attempt in range(6):
        color = int(draw() * len(COLOR_NAMES))
        if attempt == 0 and typical is not None:
            color = typical
        rgb = _jittered(draw, PALETTE[COLOR_NAMES[color]], 20)
        if _difference(rgb, behind.rgb) > 150 and _difference(rgb, behind.second_rgb) > 110:
            break
    return color, rgb


def _choose_place(draw: Callable[[], float], size: float, placed) -> tuple[float, float]:
    """The first of twelve places with little overlap, or the one with the least."""
    best, best_gap = (0.5, 0.5), -np.inf
    margin = 0.45 * size
    for _ in range(12):
        x, y = (margin + (1 - 2 * margin) * draw() for _ in range(2))
        gap = min(
            (np.hypot(x - o.x, y - o.y) / (0.5 * (size + o.size)) for o in placed), default=9.0
        )
        if gap > best_gap:
            best, best_gap = (x, y), gap
        if gap > 0.8:
            break
    return best


def _choose_layout(
    draw: Callable[[], float], classes: Sequence[int], scale: float, typical_color: float
) -> Scene:
    background = _choose_background(draw)
    largest = _LARGEST[len(classes) - 1]
    # Large objects are placed and painted first, so no object is hidden behind a larger one.
    drawn = (_SMALLEST + (largest - _SMALLEST) * draw() for _ in classes)
    sizes = sorted((scale * size for size in drawn), reverse=True)
    order = sorted(classes, key=lambda _: draw())
    objects: list[SceneObject] = []
    for category, size in zip(order, sizes, strict=True):
        typical = None
        if typical_color and draw() < typical_color:
            typical = category % len(COLOR_NAMES)
        color, rgb = _choose_color(draw, background, typical)
        x, y = _choose_place(draw, size, objects)
        objects.append(
            SceneObject(
                category=category,
                variant=int(draw() * len(CATEGORIES[category].code_points)),
                color=color,
                rgb=rgb,
                style=_pick(draw, (0.5, 0.7, 1.0)),
                x=x,
                y=y,
                size=size,
                angle=80 * draw() - 40,
                shear=0.6 * draw() - 0.3,
                mirrored=draw() < 0.5,
            )
        )
    return Scene(tuple(objects), background)


class GlyphScenes:
    """Random access to the glyph scenes (seed, 0) ... (seed, size - 1); a `MaskedSource`.

    Splits are made by different seeds. The categories, their themes and affinities, hence the
    label correlations, are the same for all seeds.

    Args:
        seed: which stream of scenes, from 0.
        size: number of scenes.
        image_size: side S of the square images in pixels.
        caption_noise: probability that all captions of an image are another scene's, truncated,
            or generic.
        clutter: amount of things of no category; 0 for none, 1 for the default.
        max_objects, object_scale: 1 to 6 and a factor of the sizes in (0, 2]: few large objects
            are a curriculum for encoders that start from nothing.
        typical_color: probability that an object has the colour that is typical of its category
            (three or four categories share one): real things have one, and encoders find it first.
        attributes: whether captions tell colours and sizes, which are easier to learn than names.
        categories: scenes hold the first so many of the forty categories.
        keep: images and captions stay in memory once they are made (3 S^2 bytes a scene), so that
            the epochs after the first cost no painting.

    Raises:
        UserError: an option is out of its range.
    """

    def __init__(
        self,
        seed: int,
        size: int,
        image_size: int = 96,
        caption_noise: float = 0.0,
        clutter: float = 1.0,
        max_objects: int = 6,
        object_scale: float = 1.0,
        typical_color: float = 0.0,
        attributes: bool = True,
        categories: int = len(CATEGORIES),
        keep: bool = False,
    ):
        if not 0 <= seed < 2**63:
            raise UserError(f"glyphs: seed must lie in [0, 2**63), it is {seed}")
        if size < 1:
            raise UserError(f"glyphs: size must be at least 1 scene, it is {size}")
        if image_size < 32:
            raise UserError(f"glyphs: image_size must be at least 32 pixels, it is {image_size}")
        if not 0.0 <= caption_noise <= 1.0:
            raise UserError(f"glyphs: caption_noise must lie in [0, 1], it is {caption_noise}")
        if not 0.0 <= clutter <= 10.0:
            raise UserError(f"glyphs: clutter must lie in [0, 10], it is {clutter}")
        if not (1 <= max_objects <= len(_COUNTS) and 0.0 < object_scale <= 2.0):
            raise UserError("glyphs: max_objects must lie in [1, 6], object_scale in (0, 2]")
        if not 1 <= categories <= len(CATEGORIES):
            most = len(CATEGORIES)
            raise UserError(f"glyphs: categories must lie in [1, {most}], it is {categories}")
        if not 0.0 <= typical_color <= 1.0:
            raise UserError(f"glyphs: typical_color must lie in [0, 1], it is {typical_color}")
        self.seed, self.size, self.image_size = seed, size, image_size
        self.caption_noise, self.clutter = caption_noise, clutter
        self.max_objects, self.object_scale = max_objects, object_scale
        self.typical_color, self.attributes = typical_color, attributes
        self.class_names: tuple[str, ...] = CLASS_NAMES[:categories]
        self.keep = keep
        self._kept: dict[tuple[str, int], Any] = {}

    def __len__(self) -> int:
        return self.size

    def __getstate__(self) -> dict:
        state = {k: v for k, v in self.__dict__.items() if k not in ("ids", "labels")}
        return {**state, "_kept": {}}

    @functools.cached_property
    def ids(self) -> tuple[str, ...]:
        """Stable image ids, one per scene."""
        return tuple(f"glyphs-{self.seed}-{index}" for index in range(self.size))

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int8 [N, C]: +1 where the category is in the scene, else -1; no pixel is painted."""
        labels = np.full((self.size, len(self.class_names)), -1, np.int8)
        for index in range(self.size):
            labels[index, self._classes(index)] = 1
        labels.flags.writeable = False
        return labels

    def scene(self, index: int) -> Scene:
        """The layout of scene `index`."""
        self._check(index)
        return self._scene(index)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """{"image": uint8 [S, S, 3] RGB}, read-only if it is kept."""
        return {"image": self._once("image", index, self._paint)}

    def masks(self, index: int) -> np.ndarray:
        """bool [objects, S, S]: the visible silhouette of each object of the scene.

        The silhouette is the glyph with its holes filled; where two overlap, the pixel belongs
        to the one in front.
        """
        scene, side = self.scene(index), self.image_size
        masks = np.zeros((len(scene.objects), side, side), bool)
        for mask, item in zip(masks, scene.objects, strict=True):
            patch, left, top = warp_object(item, side)
            canvas = np.zeros((side, side, 1), np.float32)
            blend(canvas, patch[..., 1], (255,), left, top)
            mask[:] = canvas[..., 0] > 127
        in_front = np.cumsum(masks[::-1], axis=0)[::-1] - masks
        return masks & (in_front == 0)

    def semantic_mask(self, index: int) -> np.ndarray:
        """int16 [S, S]: the category of each pixel, -1 on the background; see `MaskedSource`."""
        semantic = np.full((self.image_size, self.image_size), -1, np.int16)
        for mask, item in zip(self.masks(index), self.scene(index).objects, strict=True):
            semantic[mask] = item.category
        return semantic

    def boxes(self, index: int) -> list[tuple[int, int, int, int, int]]:
        """(category, x0, y0, x1, y1) of each visible mask; x1 and y1 are exclusive."""
        boxes = []
        for mask, item in zip(self.masks(index), self.scene(index).objects, strict=True):
            if not mask.any():  # only on images so small that a glyph is a pixel or two
                continue
            columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
            corners = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            boxes.append((item.category, *(int(value) for value in corners)))
        return boxes

    def is_noisy(self, index: int) -> bool:
        """Whether the captions of scene `index` are noise."""
        self._check(index)
        return self._draw("is_noisy", index)() < self.caption_noise

    def captions(self, index: int) -> tuple[str, ...]:
        """Five captions: true ones or, for a noisy scene, noise of one kind (see the class)."""
        return self._once("captions", index, self._describe)

    def _paint(self, index: int) -> np.ndarray:
        rng = self._rng("pixels", index)
        image = render(self.scene(index), self.image_size, self.clutter, rng)
        image.flags.writeable = not self.keep
        return image

    def _once(self, what: str, index: int, make: Callable[[int], Any]) -> Any:
        if not self.keep:
            return make(index)
        made = self._kept.get((what, index))
        if made is None:
            made = self._kept[what, index] = make(index)
        return made

    def _describe(self, index: int) -> tuple[str, ...]:
        scene, draw = self.scene(index), self._draw("captions", index)
        if not self.is_noisy(index):
            return tuple(
                glyph_captions.caption(scene, draw, self.attributes) for _ in range(NUM_CAPTIONS)
            )
        noise = self._draw("noise", index)
        # Scenes are endless, so that a source of one scene too has another to swap with.
        other = (index + 1 + int(noise() * max(1, self.size - 1))) % max(2, self.size)
        return glyph_captions.noisy_captions(scene, self._scene(other), draw, noise, NUM_CAPTIONS)

    def vocabulary(self) -> tuple[str, ...]:
        """All words that captions, class names and prompt templates can hold, sorted."""
        return glyph_captions.vocabulary()

    def noun_words(self) -> frozenset[str]:
        """The nouns of captions: all words that name a category, plurals and synonyms included."""
        return frozenset(glyph_captions.category_words())

    def _scene(self, index: int) -> Scene:
        classes = self._classes(index)
        draw = self._draw("layout", index)
        return _choose_layout(draw, classes, self.object_scale, self.typical_color)

    def _classes(self, index: int) -> list[int]:
        chosen = _choose_classes(self._draw("classes", index), self.max_objects)
        return [category % len(self.class_names) for category in chosen]

    def _check(self, index: int) -> None:
        if not 0 <= index < self.size:
            raise IndexError(f"scene {index} of {self.size}")

    def _rng(self, stream: str, index: int) -> np.random.Generator:
        counter = index * len(_STREAMS) + _STREAMS[stream]
        key = np.array([self.seed, counter], np.uint64)
        return np.random.Generator(np.random.Philox(key=key))

    def _draw(self, stream: str, index: int) -> Callable[[], float]:
        # One block of uniforms is much cheaper than single draws; no stream needs more.
        return iter(self._rng(stream, index).random(512).tolist()).__next__
