"""Cached features: equal to computing them, refused when stale, damaged or unreadable."""

import pickle
import shutil
import threading
from collections import namedtuple

import jax.numpy as jnp
import numpy as np
import pytest

from trm_jax.data import feature_cache, pipeline
from trm_jax.data.examples import MultiLabelExamples
from trm_jax.data.feature_cache import CachedFeatures, cache_key, data_hash, write_cache
from trm_jax.data.sources.glyphs import GlyphScenes
from trm_jax.types import BadSampleError, UserError

MADE_OF = {"encoder": "e", "data": "d"}


class _OneBroken(GlyphScenes):
    def read(self, index):
        if index == 3:
            raise BadSampleError("broken")
        return super().read(index)


def _encode(batch):
    mean = batch["image"].astype(np.float32).mean((1, 2))
    dense = np.repeat(mean[:, None], 4, 1).astype(jnp.bfloat16)
    return {"dense": dense, "global_embedding": mean}


@pytest.fixture
def source():
    return _OneBroken(0, 7, image_size=32)


@pytest.fixture
def folder(source, tmp_path):
    batches = pipeline.eval_batches(MultiLabelExamples(source), batch_size=4)
    write_cache(tmp_path / "cache", batches, _encode, size=len(source), made_of=MADE_OF)
    return tmp_path / "cache"


def test_a_cache_answers_as_the_encoder_would(source, folder):
    cached = CachedFeatures(source, folder, MADE_OF)
    for index in (6, 0, 4):
        expected = _encode({"image": source.read(index)["image"][None]})
        for reader in (cached, pickle.loads(pickle.dumps(cached))):
            got = reader.read(index)
            assert got["dense"].dtype == jnp.bfloat16
            np.testing.assert_array_equal(got["dense"], expected["dense"][0])
            np.testing.assert_array_equal(got["global_embedding"], expected["global_embedding"][0])
    np.testing.assert_array_equal(cached.labels, source.labels)
    with pytest.raises(BadSampleError, match=r"glyphs-0-3"):
        cached.read(3)
    assert not list(folder.parent.glob(".cache*"))  # nothing half-written stays


@pytest.mark.parametrize("changed", ["encoder", "data"])
def test_a_stale_cache_is_refused_by_what_changed(source, folder, changed):
    with pytest.raises(UserError, match=f"stale: the {changed} changed .* delete that folder"):
        CachedFeatures(source, folder, {**MADE_OF, changed: "another"})


def test_a_damaged_cache_is_refused_in_one_line(source, folder):
    shorter = GlyphScenes(0, 6, image_size=32)
    with pytest.raises(UserError, match="damaged"):
        CachedFeatures(shorter, folder, MADE_OF)
    records = folder / "features.array_record"
    records.write_bytes(records.read_bytes()[:-70_000])
    with pytest.raises(UserError, match=r"are damaged \(.*\); delete that folder") as caught:
        CachedFeatures(source, folder, MADE_OF).read(0)
    assert "\n" not in str(caught.value)
    (folder / "meta.json").unlink()
    with pytest.raises(UserError, match="delete that folder"):
        CachedFeatures(source, folder, MADE_OF)


def test_an_interrupted_cache_leaves_nothing(source, tmp_path):
    def batches():
        yield from pipeline.eval_batches(MultiLabelExamples(source), batch_size=4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path / "cache", batches(), _encode, size=7, made_of=MADE_OF)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_it_happens(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(100))
    batches = pipeline.eval_batches(MultiLabelExamples(source), batch_size=4)
    with pytest.raises(UserError, match=r"need .* GB, .* has .* GB; set data\.cache_dir"):
        write_cache(tmp_path / "cache", batches, _encode, size=7, made_of=MADE_OF)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_cache_is_not_made_again(source, folder):
    def batches():
        raise AssertionError("is not asked")
        yield

    write_cache(folder, batches(), _encode, size=7, made_of={"encoder": "later", "data": "d"})
    CachedFeatures(source, folder, MADE_OF)


def test_a_second_run_waits_for_the_first(source, tmp_path):
    waits, entered, go_on = [], threading.Event(), threading.Event()

    def slow():
        entered.set()
        go_on.wait(30)
        yield from pipeline.eval_batches(MultiLabelExamples(source), batch_size=4)

    def first():
        write_cache(tmp_path / "cache", slow(), _encode, size=7, made_of=MADE_OF)

    def tick():
        waits.append(1)
        go_on.set()

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(30)
    write_cache(tmp_path / "cache", iter(()), _encode, size=7, made_of=MADE_OF, tick=tick)
    thread.join()
    assert waits
    CachedFeatures(source, tmp_path / "cache", MADE_OF).read(0)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_what_a_killed_run_left_is_cleared(source, tmp_path):
    left = tmp_path / ".cache.incomplete"
    left.mkdir()
    (left / "features.array_record").write_bytes(b"half")
    batches = pipeline.eval_batches(MultiLabelExamples(source), batch_size=4)
    write_cache(tmp_path / "cache", batches, _encode, size=7, made_of=MADE_OF)
    CachedFeatures(source, tmp_path / "cache", MADE_OF).read(6)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_the_key_changes_with_images_and_settings():
    source = GlyphScenes(0, 4, image_size=32)
    key = cache_key(source, size=32)
    assert key == cache_key(GlyphScenes(0, 4, image_size=32), size=32)
    assert len({key, cache_key(source, size=64), cache_key(GlyphScenes(1, 4), size=32)}) == 3


def test_the_data_hash_follows_the_fingerprint_of_the_files(source):
    class Files(GlyphScenes):
        byte_count = 5

        def fingerprint(self):
            return f"a.jpg {self.byte_count}"

    before = data_hash(Files(0, 7))
    assert before != data_hash(source) == data_hash(GlyphScenes(0, 7))
    Files.byte_count = 6
    assert data_hash(Files(0, 7)) != before


def test_the_format_is_versioned(source, folder, monkeypatch):
    monkeypatch.setattr(feature_cache, "_VERSION", 2)
    with pytest.raises(UserError, match="this version"):
        CachedFeatures(source, folder, MADE_OF)


def test_a_place_that_cannot_be_written_is_named(source, tmp_path):
    (tmp_path / "file").write_text("")
    batches = pipeline.eval_batches(MultiLabelExamples(source), batch_size=4)
    with pytest.raises(UserError, match=r"data\.cache_dir: .*file cannot be written"):
        write_cache(tmp_path / "file" / "cache", batches, _encode, size=7, made_of=MADE_OF)
