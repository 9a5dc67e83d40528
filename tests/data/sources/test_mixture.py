"""Mixtures: proportions by hand, every example in every epoch, ids, captions, configs."""

import json
from fractions import Fraction

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.data.sources.shards import caption, make_shards
from trm_jax.data.examples import CaptionExamples
from trm_jax.data.sources import open_source
from trm_jax.data.sources.base import Source
from trm_jax.data.sources.lazy import captioned
from trm_jax.data.sources.mixture import Mixture, Part, visits_per_epoch
from trm_jax.data.tokenizers import WordTokenizer
from trm_jax.train import workdirs
from trm_jax.types import UserError


class _Pairs:
    """`size` images of value `base` + index; those in `bare` have no caption."""

    class_names = ()

    def __init__(self, size, base=0, bare=()):
        self.ids = tuple(f"x{index}" for index in range(size))
        self.labels = np.zeros((size, 0), np.int8)
        self.base, self.bare = base, bare

    def __len__(self):
        return len(self.ids)

    def read(self, index):
        return {"image": np.full((2, 2, 3), self.base + index, np.uint8)}

    def captions(self, index):
        return () if index in self.bare else (caption(self.base + index),)


def test_visits_by_hand():
    # 3 of 10 visits to the part of 3, 7 to that of 7: an epoch of 10 is enough, in decimals too.
    assert visits_per_epoch([3, 7], [0.3, 0.7]) == [3, 7]
    assert visits_per_epoch([3, 7], [1, 1]) == [7, 7]
    assert visits_per_epoch([3, 7], [3, 1]) == [21, 7]
    # The part of 5 needs N = 5 * 6 / 2 = 15; 15/2 = 7.5 rounds to the even 8.
    assert visits_per_epoch([5, 1, 1], [2, 3, 1]) == [5, 8, 2]
    assert visits_per_epoch([10], [0.001]) == [10]


def test_visits_of_random_parts():
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(1, 6))
        sizes = rng.integers(1, 1000, count).tolist()
        weights = rng.uniform(0.01, 1, count).round(3).tolist()
        visits = visits_per_epoch(sizes, weights)
        share = [
            Fraction(str(weight)) / sum(map(Fraction, map(str, weights))) for weight in weights
        ]
        assert all(visit >= size for visit, size in zip(visits, sizes, strict=True))
        # No shorter epoch would do: the part that decides is not repeated, but for rounding.
        needed = max(size / part for size, part in zip(sizes, share, strict=True))
        assert any(visit <= size + 1 for visit, size in zip(visits, sizes, strict=True))
        for visit, part in zip(visits, share, strict=True):
            assert abs(visit - part * needed) <= Fraction(1, 2) + part


def _mixture(**options):
    return Mixture([Part("a", _Pairs(3), 7), Part("b", _Pairs(4, 100, **options), 4)])


def test_positions_ids_and_counts():
    mixture = _mixture()
    assert isinstance(mixture, Source) and len(mixture) == 11 and mixture.labels.shape == (11, 0)
    values = [int(mixture.read(i)["image"][0, 0, 0]) for i in range(11)]
    assert values == [0, 1, 2, 0, 1, 2, 0, 100, 101, 102, 103]
    assert [mixture.captions(i) for i in range(11)] == [(caption(v),) for v in values]
    assert mixture.ids[2:9] == ("a/x2", "a/x0", "a/x1", "a/x2", "a/x0", "b/x0", "b/x1")
    assert mixture.first_visit(np.arange(11)).tolist() == [0, 1, 2, 0, 1, 2, 0, 7, 8, 9, 10]
    assert mixture.counts == {
        "a": {"examples": 3, "visits": 7},
        "b": {"examples": 4, "visits": 4},
    }
    other = Mixture([Part("a", _Pairs(3), 6), Part("b", _Pairs(4, 100), 4)])
    assert mixture.fingerprint() == _mixture().fingerprint() != other.fingerprint()
    with pytest.raises(IndexError):
        mixture.read(11)


def test_captioned_positions():
    assert captioned(_mixture()) == range(11)
    mixture = Mixture([Part("a", _Pairs(3, bare=(1,)), 7), Part("b", _Pairs(4, bare=(0, 3)), 4)])
    expected = [i for i in range(11) if mixture.captions(i)]
    assert captioned(mixture).tolist() == expected == [0, 2, 3, 5, 6, 8, 9]
    data = CaptionExamples(mixture, WordTokenizer(["photo", "number"]), 4)
    assert len(data) == 7 and data.sample(5, np.random.default_rng(0))["index"] == 8


def _options(tmp_path):
    make_shards(tmp_path / "web/cc", (2, 1))
    make_shards(tmp_path / "web/red", (5,))
    return {
        "parts": (
            {"dataset": "webdataset", "root": "cc", "weight": 1.0, "options": {}},
            {
                "dataset": "webdataset",
                "root": str(tmp_path / "web/red"),
                "weight": 3.0,
                "name": "red",
                "options": {"shards": ("*0.tar",), "caption_key": "caption"},
            },
        )
    }


def test_parts_of_a_config(tmp_path):
    config = ConfigDict({"data": {"dataset": "mixture", "options": _options(tmp_path)}})
    config.data.root = str(tmp_path / "web")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(workdirs._plain(config)))
    workdirs.check(folder, config)
    for of in (config.lock(), workdirs.read_config(folder)):
        data = of.data
        source = open_source(data.dataset, "train", root=data.root, **dict(data.options))
        assert source.counts == {
            "0": {"examples": 3, "visits": 3},
            "red": {"examples": 5, "visits": 9},
        }
        assert source.ids[2:4] == ("0/00001/00002", "red/00000/00000")
        assert source.captions(1) == (caption(1),) and source.captions(10) == ("json 2",)
    config = config.copy_and_resolve_references().unlock()
    config.data.options.parts[1]["weight"] = 4.0
    with pytest.raises(UserError, match="differs in data.options.parts"):
        workdirs.check(folder, config)


def test_without_weights_it_is_a_concatenation(tmp_path):
    parts = _options(tmp_path)["parts"]
    bare = [{k: v for k, v in part.items() if k != "weight"} for part in parts]
    source = open_source("mixture", "train", root=str(tmp_path / "web"), parts=bare)
    assert len(source) == 8 and source.counts["0"]["visits"] == 3
    make_shards(tmp_path / "web/cc/test", (1,))
    make_shards(tmp_path / "web/red/test", (2,))
    test = open_source("mixture", "test", root=str(tmp_path / "web"), parts=parts)
    assert len(test) == 3 and test.ids[0] == "0/00000/00000"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"weight": 0.0}, r"parts\[1\].weight is 0.0; it must be above 0"),
        ({"weight": float("nan")}, r"parts\[1\].weight is nan"),
        ({"weight": "much"}, r"parts\[1\].weight is 'much', not a number"),
        ({"weight": None}, "either all parts have a weight or none"),
        ({"weight": 1e-9}, "an epoch of the mixture has .* more than 2,147,483,647"),
        ({"wieght": 2}, r"parts\[1\] has no field 'wieght'; it has dataset, root, options"),
        ({"dataset": None}, r"parts\[1\] names no dataset"),
        ({"dataset": "webdatset"}, "'webdatset' is unknown; did you mean 'webdataset'"),
        ({"root": "nowhere"}, "web/nowhere' is not a folder"),
        ({"root": ""}, "data.root is empty; dataset 'webdataset' needs"),
        ({"options": {"shard": 1}}, "'webdataset' has no option 'shard'"),
        ({"name": "0"}, "each of another name"),
        ({"dataset": "glyphs", "options": {"train_size": 5}}, "part 'red' .* has classes"),
    ],
)
def test_wrong_parts_are_refused(tmp_path, change, wanted):
    parts = _options(tmp_path)["parts"]
    parts[1].update(change)
    with pytest.raises(UserError, match=wanted):
        open_source("mixture", "train", root=str(tmp_path / "web"), parts=parts)


def test_no_parts():
    with pytest.raises(UserError, match="a mixture needs parts in data.options.parts"):
        open_source("mixture", "train")
    for parts in ({"dataset": "webdataset"}, ["cc3m"], "cc3m"):
        with pytest.raises(UserError, match="not a list of mappings"):
            open_source("mixture", "train", parts=parts)
