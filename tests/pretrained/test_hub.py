"""Weights from the hub: a folder laid out as its cache, or a function in place of the download."""

import hashlib
import os
import subprocess
import sys

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from tests import tiny
from tests.oracles.random_variables import random_variables
from tests.pretrained import checkpoints
from trm_jax.pretrained import architectures, convert, registry
from trm_jax.types import UserError

CONFIG = checkpoints.CONFIGS["vit"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def _assert_loads(source, variables):
    jax.tree.map(np.testing.assert_array_equal, registry.load(source, CONFIG), variables)


def _publish(monkeypatch, **changed):
    """A small model takes the place of RN101."""
    known = architectures.PUBLISHED["RN101"]._replace(**changed)
    monkeypatch.setitem(architectures.PUBLISHED, "RN101", known)


def _cached(root, repository, name, content, commit=COMMIT):
    folder = root / f"models--{repository.replace('/', '--')}"
    for part in ("refs", "blobs", f"snapshots/{commit}"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "refs/main").write_text(commit)
    path = folder / f"snapshots/{commit}/{name}"
    path.write_bytes(content)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's real client, without a network, on a cache of ours."""
    download = huggingface_hub.hf_hub_download

    def offline(repository, name, *, revision, local_files_only):
        return download(
            repository, name, revision=revision, cache_dir=tmp_path / "hub", local_files_only=True
        )

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    return tmp_path / "hub"


def _openclip_bytes():
    state = convert.to_openclip(random_variables(CONFIG))
    return safetensors.numpy.save(state)


def test_a_name_is_found_in_the_cache_and_its_commit_is_known(cache):
    repository = "timm/resnet101_clip.openai"  # has no listed commit: the branch main
    content = _openclip_bytes()
    path = _cached(cache, repository, "open_clip_model.safetensors", content)
    for name in ("RN101", repository, f"{repository}@{COMMIT}"):
        _assert_loads(name, random_variables(CONFIG))
        assert registry.provenance(name) == {
            "path": str(path),
            "sha256": hashlib.sha256(content).hexdigest(),
            "repository": repository,
            "commit": COMMIT,
        }


def test_the_listed_commit_is_fetched_and_its_hash_is_checked(cache, monkeypatch):
    repository, content = "timm/resnet101_clip.openai", _openclip_bytes()
    _cached(cache, repository, "open_clip_model.safetensors", content)
    _publish(monkeypatch, revision="f" * 40, sha256="0" * 64)
    with pytest.raises(UserError, match=f"cannot fetch the weights of {repository}@fff"):
        registry.load("RN101", CONFIG)
    _publish(monkeypatch, revision=COMMIT, sha256="0" * 64)
    with pytest.raises(UserError, match="is not the published file .* not 000000000000"):
        registry.load("RN101", CONFIG)
    _assert_loads(f"{repository}@main", random_variables(CONFIG))  # said explicitly
    _publish(monkeypatch, revision=COMMIT, sha256=hashlib.sha256(content).hexdigest())
    _assert_loads("RN101", random_variables(CONFIG))


def test_repositories_of_transformers_are_found_in_the_cache(cache):
    state = checkpoints.half_state("vit")
    renamed = checkpoints.transformers_state(state)
    content = safetensors.numpy.save({k: np.array(v, order="C") for k, v in renamed.items()})
    _cached(cache, "openai/clip-vit-base-patch32", "model.safetensors", content)
    expected = convert.from_openclip(state, CONFIG)
    _assert_loads("openai/clip-vit-base-patch32", expected)


def _said(source, config=CONFIG):
    said = []
    registry.load(source, config, say=said.append)
    return said


def test_an_unpinned_commit_is_said_and_can_be_pinned(cache, monkeypatch):
    repository, content = "timm/resnet101_clip.openai", _openclip_bytes()
    path = _cached(cache, repository, "open_clip_model.safetensors", content)
    pin = f"give model.pretrained={repository}@{COMMIT} to pin it"
    assert _said("RN101") == [
        f"note: RN101 comes from {repository} at commit {COMMIT}; no commit is listed, {pin}"
    ]
    assert _said(repository) == [
        f"note: {repository} is at commit {COMMIT}; no commit is listed, {pin}"
    ]
    assert _said(f"{repository}@{COMMIT}") == _said(f"{repository}@main") == _said(path) == []
    _publish(monkeypatch, revision=COMMIT, sha256=hashlib.sha256(content).hexdigest())
    assert _said("RN101") == []


def test_the_config_file_of_a_repository_is_fetched_from_the_commit_of_its_weights(cache):
    repository, file = "owner/clip", "open_clip_model.safetensors"
    _cached(cache, repository, file, _openclip_bytes())
    pinned = (
        f"note: {repository} is at commit {COMMIT}; no commit is given, give "
        f"model.pretrained={repository}@{COMMIT} to pin it"
    )
    first, second = _said(repository)
    assert first == pinned and second.startswith("note: no config file beside ")
    _cached(cache, repository, "open_clip_config.json", b'{"model_cfg": {"quick_gelu": true}}')
    assert _said(repository) == [pinned]
    assert _said(f"{repository}@{COMMIT}") == []
    _cached(cache, repository, "open_clip_config.json", b'{"model_cfg": {"embed_dim": 6}}')
    with pytest.raises(UserError, match="text.activation gelu, not quick_gelu .says open_clip_con"):
        registry.load(repository, CONFIG)


@pytest.mark.parametrize(
    "file, beside",
    [
        ("open_clip_pytorch_model.bin", ["open_clip_config.json"]),
        ("model.safetensors", ["config.json", "preprocessor_config.json"]),
    ],
)
def test_what_is_asked_of_the_hub_beside_the_weights(tmp_path, monkeypatch, file, beside):
    path = _cached(tmp_path, "owner/clip", file, b"weights")
    asked = []

    def download(repository, name, *, revision, local_files_only):
        asked.append((name, revision))
        if name != file and name not in beside:
            raise RemoteEntryNotFoundError.__new__(RemoteEntryNotFoundError)
        return str(path.with_name(name))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert registry.resolve("owner/clip@v1") == path
    assert asked[-len(beside) :] == [(name, COMMIT) for name in beside]
    assert all(revision == "v1" for _, revision in asked[: -len(beside)])


def test_a_run_resolves_its_weights_once(cache, tmp_path, monkeypatch, capsys):
    """A branch that moves between two looks: what was loaded is what is recorded."""
    config = tiny.contrastive()
    random = tiny.build(config, tmp_path)
    variables = random_variables(random.clip)
    tokenizer, repository = random.tokenizer.to_config(), "owner/clip"
    path = _cached(cache, repository, "model.safetensors", b"")
    registry.save(path, variables, config=random.clip, tokenizer=tokenizer, provenance={})
    looked, resolve = [], registry.resolve

    def moving(name):
        found = resolve(name)
        looked.append(name)
        _cached(cache, repository, "model.safetensors", b"newer", commit="f" * 40)
        return found

    monkeypatch.setattr(registry, "resolve", moving)
    config.model.pretrained = repository
    built = tiny.build(config, tmp_path)
    assert looked == [repository]
    assert built.pretrained == registry.Located(repository, path)
    assert registry.provenance(built.pretrained) == {
        "path": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "repository": repository,
        "commit": COMMIT,
    }
    assert looked == [repository]
    assert built.tokenizer.to_config() == tokenizer
    assert capsys.readouterr().out == (
        f"note: {repository} is at commit {COMMIT}; no commit is given, give "
        f"model.pretrained={repository}@{COMMIT} to pin it\n"
    )


def _ask(monkeypatch, error):
    asked = []

    def refuse(repository, name, *, revision, local_files_only):
        asked.append((repository, name, revision, local_files_only))
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    return asked


def test_offline_asks_the_network_once_and_says_what_to_do(monkeypatch):
    asked = _ask(monkeypatch, LocalEntryNotFoundError("no network, no cache"))
    message = (
        r"model\.pretrained: cannot fetch the weights of owner/name@v1 \(LocalEntryNotFoundError\)"
        ", nor are they in the cache; elsewhere, download one of open_clip_model.safetensors, "
        r".*, pytorch_model\.bin of owner/name@v1, and open_clip_config.json or config.json beside "
        "it, and give its path, or use 'random'$"
    )
    with pytest.raises(UserError, match=message) as error:
        registry.load("owner/name@v1", CONFIG)
    assert "\n" not in str(error.value)
    assert asked == [
        ("owner/name", "open_clip_model.safetensors", "v1", False),
        ("owner/name", "model.safetensors", "v1", True),
        ("owner/name", "open_clip_pytorch_model.bin", "v1", True),
        ("owner/name", "pytorch_model.bin", "v1", True),
    ]


@pytest.mark.parametrize("name", ["RN50x4", "timm/resnet50x4_clip.openai"])
def test_offline_a_named_models_two_files_are_named(monkeypatch, name):
    _ask(monkeypatch, LocalEntryNotFoundError("no network, no cache"))
    with pytest.raises(UserError) as error:
        registry.load(name, CONFIG)
    assert str(error.value) == (
        "model.pretrained: cannot fetch the weights of timm/resnet50x4_clip.openai "
        "(LocalEntryNotFoundError), nor are they in the cache; elsewhere, download "
        "open_clip_model.safetensors of timm/resnet50x4_clip.openai and give its path, or put "
        "OpenAI's RN50x4.pt into ~/.cache/clip and set model.pretrained=RN50x4, or use 'random'"
    )


def test_a_repository_without_weights_and_one_that_fails_are_told_apart(monkeypatch):
    asked = _ask(monkeypatch, RemoteEntryNotFoundError.__new__(RemoteEntryNotFoundError))
    with pytest.raises(UserError, match="owner/name on the hub holds none of open_clip_model"):
        registry.load("owner/name", CONFIG)
    assert [row[3] for row in asked] == [False] * 4
    asked = _ask(monkeypatch, RuntimeError("odd"))
    with pytest.raises(UserError, match=r"cannot fetch the weights of owner/name \(RuntimeError"):
        registry.load("owner/name", CONFIG)
    assert len(asked) == 1


def test_the_hub_is_asked_for_the_listed_commit(monkeypatch):
    asked = _ask(monkeypatch, RuntimeError("odd"))
    for name in ("ViT-L/14@336px", "timm/vit_large_patch14_clip_336.openai", "RN101"):
        with pytest.raises(UserError, match="cannot fetch"):
            registry.load(name, CONFIG)
    file = "open_clip_model.safetensors"
    commit = "81e38efc4637de5023b10e75a7f9bd1c6fa6b010"
    assert asked == [
        ("timm/vit_large_patch14_clip_336.openai", file, commit, False),
        ("timm/vit_large_patch14_clip_336.openai", file, commit, False),
        ("timm/resnet101_clip.openai", file, None, False),
    ]


def test_the_real_client_offline(tmp_path):
    repository = "timm/resnet101_clip.openai"
    path = _cached(tmp_path / "hub", repository, "open_clip_model.safetensors", b"weights")
    script = (
        "from trm_jax.pretrained import registry\n"
        "from trm_jax.types import UserError\n"
        "print(registry.resolve('RN101'))\n"
        "try:\n"
        "    registry.resolve('RN50')\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    found, refused = done.stdout.splitlines()
    assert found == str(path)
    assert refused.startswith("model.pretrained: cannot fetch the weights of timm/resnet50_clip")
