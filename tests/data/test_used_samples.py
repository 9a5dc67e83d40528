"""Which samples a run used: what the pipeline itself visited, and the same batches after a resume.

Both on tar shards with a torn image and an empty caption, alone and as a part of a mixture.
"""

import numpy as np
import pytest

from tests.data.sources.shards import image, make_shards, members, write_tar
from trm_jax.data import pipeline, used_samples
from trm_jax.data.examples import CaptionExamples
from trm_jax.data.sources import open_source
from trm_jax.data.sources.subset import Subset
from trm_jax.data.tokenizers import WordTokenizer
from trm_jax.data.transforms import image_transform
from trm_jax.types import UserError

_WORDS = WordTokenizer(["photo", "number", *(str(n) for n in range(30))])


class _Positions:
    """Samples that are their positions."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def sample(self, position, rng):
        return {"index": np.asarray(position, np.int32), "valid": np.asarray(True)}

    def blank(self, position):
        raise AssertionError


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 5, 7, 12])
def test_visits_are_those_of_the_pipeline(steps):
    # 23 examples in batches of 5: 4 steps an epoch, 3 examples left over.
    batches = pipeline.train_batches(_Positions(23), batch_size=5, seed=9, num_steps=steps)
    seen = [index for batch in batches for index in batch["index"].tolist()]
    counts = used_samples.visits(23, 5, seed=9, steps=steps)
    assert counts.tolist() == np.bincount(seen, minlength=23).tolist()


def test_few_places_are_looked_up(monkeypatch):
    looked = []
    position = pipeline.position

    def counted(place, *arguments, **keywords):
        looked.append(place)
        return position(place, *arguments, **keywords)

    monkeypatch.setattr(pipeline, "position", counted)
    counts = used_samples.visits(10_007, 8, seed=0, steps=100 * 1250 + 3)
    # 7 in each of 100 epochs and 24 in the last.
    assert len(looked) == 724 and counts.sum() == 8 * (100 * 1250 + 3)
    with pytest.raises(UserError, match="larger than the 3 training examples"):
        used_samples.visits(3, 4, seed=0, steps=1)


def _web(folder, count=14):
    """Shards of `count` samples; the image of 3 is torn, the caption of 6 empty."""
    content = members(range(count))
    content[3 * 3] = (content[9][0], image(3)[:60])
    content[6 * 3 + 2] = (content[20][0], b"\n")
    write_tar(folder / "0.tar", content[:15])
    write_tar(folder / "1.tar", content[15:])
    return open_source("webdataset", "train", root=str(folder))


def _mixed(folder):
    _web(folder / "web")
    make_shards(folder / "other", (2, 3))
    parts = [
        {"dataset": "webdataset", "root": "web", "weight": 1},
        {"dataset": "webdataset", "root": "other", "weight": 1},
    ]
    return open_source("mixture", "train", root=str(folder), parts=parts)


def _batches(source, start, end, **options):
    data = CaptionExamples(source, _WORDS, 6, image_transform("tai", 16), views=2)
    return list(
        pipeline.train_batches(
            data, batch_size=6, seed=4, start_step=start, num_steps=end - start, **options
        )
    )


def _equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("make", [_web, _mixed])
def test_a_resumed_run_sees_the_same_batches(tmp_path, make):
    source = make(tmp_path)
    whole = _batches(source, 0, 6)
    for start in (1, 4):
        _equal(_batches(source, start, 6), whole[start:])
    parts = [_batches(source, 2, 6, process_index=p, process_count=2) for p in (0, 1)]
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)]
    _equal(joined, whole[2:])
    if make is _mixed:
        _equal(_batches(source, 3, 6, workers=2), whole[3:])
    invalid = {int(i) for b in whole for i in b["index"][~b["valid"]]}
    assert invalid and {source.ids[i].rpartition("/")[2] for i in invalid} == {"00003", "00006"}
    rows = whole[0]["valid"]
    assert (whole[0]["image"][rows] != whole[0]["image_2"][rows]).any()


@pytest.mark.parametrize("make", [_web, _mixed])
def test_used_samples_are_the_valid_ones(tmp_path, make):
    source = make(tmp_path)
    steps = 9
    seen, skipped = {}, set()
    for batch in _batches(source, 0, steps):
        for index, valid in zip(batch["index"].tolist(), batch["valid"].tolist(), strict=True):
            name = source.ids[index]
            seen[name] = seen.get(name, 0) + 1
            if not valid:
                skipped.add(name)
    counts = used_samples.visits(len(source), 6, seed=4, steps=steps)
    used = list(used_samples.used_samples(source, range(len(source)), counts, skipped))
    assert len(skipped) == 2 and sum(seen.values()) == 6 * steps
    assert dict(used) == {name: count for name, count in seen.items() if name not in skipped}
    assert len(used) == len(dict(used))  # a sample of a mixture is listed once


class _Five:
    """Images of noise, each with five captions."""

    class_names = ()

    def __init__(self, ids):
        self.ids = tuple(ids)
        self.labels = np.zeros((len(self.ids), 0), np.int8)

    def __len__(self):
        return len(self.ids)

    def read(self, index):
        return {"image": np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)}

    def captions(self, index):
        return tuple(str(number) for number in range(5))


def test_examples_without_captions_are_not_among_them():
    source, counts = _Five("abcd"), np.array([2, 0, 1], np.int32)
    used = used_samples.used_samples(source, np.array([0, 2, 3]), counts)
    assert list(used) == [("a", 2), ("d", 1)]


def test_lines():
    assert used_samples.line("a/b c", 3) == "a/b c\t3\n"
    assert used_samples.line("a\tb\n", 1) == '"a\\tb\\n"\t1\n'


def test_captions_are_not_read_to_count_them(tmp_path, monkeypatch):
    source = _mixed(tmp_path)
    monkeypatch.setattr(type(source), "captions", lambda *_: pytest.fail("read"))
    assert CaptionExamples(source, _WORDS, 4).indices == range(28)
    part = Subset(source, np.arange(0, 28, 3))
    assert CaptionExamples(part, _WORDS, 4).indices == range(10)
    some = _Five(map(str, range(28)))
    some.captioned = np.array([0, 4, 6, 9])
    assert CaptionExamples(Subset(some, part.indices), _WORDS, 4).indices.tolist() == [0, 2, 3]


def test_the_caption_is_drawn_once_for_both_views():
    one, two = (
        CaptionExamples(_Five("a"), _WORDS, 4, image_transform("tai", 16), views=views)
        for views in (1, 2)
    )
    tokens = set()
    for seed in range(60):
        first, second = (data.sample(0, np.random.default_rng(seed)) for data in (one, two))
        # The first view and the caption are those of a run with one view.
        np.testing.assert_array_equal(first["tokens"], second["tokens"])
        np.testing.assert_array_equal(first["image"], second["image"])
        assert (second["image"] != second["image_2"]).any()
        tokens.add(int(second["tokens"][1]))
    assert len(tokens) == 5
    assert set(two.blank(-1)) == {"image", "image_2", "tokens", "index", "valid"}
