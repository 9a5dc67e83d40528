"""The commands of launch/match.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from trm_jax.evaluate import pair_scores, reranking, retrieval
from trm_jax.memory import knowledge_file
from trm_jax.train import experiment, knowledge_sets, sharding, workdirs
from trm_jax.types import UserError


class Options(NamedTuple):
    """The flags of launch/match.py, by their names; "set" is FIELD=VALUE of the words section."""

    workdir: str = ""
    knowledge: str = ""
    other: str = ""
    compare: str = ""
    word: str = ""
    groups: str = ""
    base: str = ""
    images: str = ""
    dataset: str = ""
    root: str = ""
    out: str = ""
    split: str = "test"
    set: tuple[str, ...] | list[str] = ()
    raw: bool = False
    random_regions: bool = False
    transform_regions: bool = True
    alpha: float = 0.15
    top: int = 100
    captions_per_image: int = 0
    steps: int = 200
    learning_rate: float = 1e-4
    seed: int = 0

    def needs(self, *names: str) -> None:
        """Raises UserError if a flag is empty."""
        for name in names:
            if not getattr(self, name):
                raise UserError(f"--{name} is missing; --help shows how the commands are written")


def build(options: Options) -> None:
    """Writes the knowledge of a run."""
    options.needs("workdir", "out")
    built, params, extras, step = knowledge_sets.open_run(options.workdir)
    vectors = _config(options.workdir).words.get("vectors", "")
    provenance = {"run": options.workdir, "step": step, "vectors": vectors}
    found = knowledge_sets.build(
        built, params, extras, raw=options.raw, seed=options.seed, provenance=provenance
    )
    knowledge_file.save(found, Path(options.out))
    without = len(built.words.names) - len(found.words) if built.words else 0
    print(f"{options.out}: {len(found.words):,} words of {int(found.counts.sum()):,} samples")
    if without:
        print(f"{without} words were left out: they have no word vector, or no readable region")


def inspect(options: Options) -> None:
    """Prints what a knowledge holds, a word's neighbours, or draws groups of words."""
    options.needs("knowledge")
    found = knowledge_file.load(Path(options.knowledge))
    if options.groups:
        from trm_jax.visualize import prototypes  # late: scikit-learn takes a second

        options.needs("out")
        groups = dict(_group(text) for text in options.groups.split(";") if text.strip())
        sets = {Path(options.knowledge).stem: found}
        if options.compare:
            sets = {
                Path(options.compare).stem: knowledge_file.load(Path(options.compare)),
                **sets,
            }
        print(prototypes.render_prototypes(sets, groups, path=Path(options.out)))
    elif options.word:
        for space, near in knowledge_file.nearest(found, options.word).items():
            print(f"{space}: " + ", ".join(f"{word} {cosine:.2f}" for word, cosine in near))
    else:
        print(json.dumps(knowledge_file.describe(found), indent=1))


def merge(options: Options) -> None:
    """Joins two sets of one encoder."""
    options.needs("knowledge", "other", "out")
    both = [knowledge_file.load(Path(name)) for name in (options.knowledge, options.other)]
    found = knowledge_file.merge(*both, seed=options.seed)
    knowledge_file.save(found, Path(options.out))
    print(f"{options.out}: {len(found.words):,} words")


def score(options: Options) -> None:
    """Writes the scores of all pairs, and whose captions they are."""
    options.needs("workdir", "out")
    out = _scores_file(options.out)
    built, params, extras, _ = knowledge_sets.open_run(options.workdir)
    config = _config(options.workdir)
    report: dict[str, Any] = {}
    if built.words is None:
        if options.knowledge or options.dataset or options.root or options.split != "test":
            raise UserError(
                "--knowledge, --dataset, --root and --split are for runs with method='mask'; this "
                "run's own evaluation split is scored"
            )
        with jax.set_mesh(sharding.make_mesh()):
            found = experiment.pair_scorer(config, built)(params, extras)
        source = built.test
    else:
        sides = _sides(options, config, built, params, extras)
        matched = knowledge_sets.score(sides, random_regions=options.random_regions)
        source, found, report = sides.source, matched.scores, matched.report
    np.save(out, found.scores)
    recalls = pair_scores.metrics(found)
    body = {
        "images": [str(source.ids[index]) for index in found.images],
        "image_of_text": found.image_of_text.tolist(),
        "words": report,
        "recalls": recalls,
    }
    out.with_suffix(".json").write_text(json.dumps(body) + "\n")
    for name, value in {**report, **recalls}.items():
        print(f"{name} {value:.4g}")


def rerank(options: Options) -> None:
    """Writes the new order of the first k of every query, and prints what it does to recalls."""
    options.needs("base", "other", "out")
    names = options.base, options.other
    base, other = (_read_scores(name) for name in names)
    found = reranking.rerank(base, other, alpha=options.alpha, top=options.top, names=names)
    arrays = {
        f"{way}_{field}": getattr(ranking, field)
        for way, ranking in found._asdict().items()
        for field in ("before", "order", "moves", "scores")
    }
    with Path(options.out).open("wb") as file:
        np.savez(file, **arrays)
    owner = _owner(options, base.shape)
    if owner is None:
        print("no recalls: it is unknown whose captions these are (--captions_per_image)")
        return
    before = retrieval.recalls(base, owner)
    after = reranking.recalls(base, owner, found)
    for name, value in after.items():
        print(f"{name} {before[name]:.4g} -> {value:.4g}")


def tune(options: Options) -> None:
    """Fits a knowledge to the images and captions of a domain, whose pairs are not looked at."""
    options.needs("workdir", "out")
    built, params, extras, _ = knowledge_sets.open_run(options.workdir)
    sides = _sides(options, _config(options.workdir), built, params, extras)
    tuned, fitted = knowledge_sets.tune(
        sides, steps=options.steps, learning_rate=options.learning_rate, seed=options.seed
    )
    knowledge_file.save(tuned, Path(options.out))
    print(f"{options.out}: loss {fitted.loss[0]:.4g} -> {fitted.loss[-1]:.4g}")


def draw(options: Options) -> None:
    """Writes pictures of words with their regions, and of what re-ranking moved."""
    from trm_jax.train import knowledge_pictures as pictures  # late: only this command draws

    options.needs("workdir", "out")
    if bool(options.base) != bool(options.other):
        raise UserError("--base and --other belong together: the scores, and those that help them")
    built, params, extras, _ = knowledge_sets.open_run(options.workdir)
    sides = _sides(options, _config(options.workdir), built, params, extras)
    photos, out = pictures.Photos(sides.source, options.images), Path(options.out)
    written = pictures.draw_words(sides, photos, out)
    if options.base:
        names = options.base, options.other
        base, other = (_read_scores(name) for name in names)
        reranked = pictures.draw_reranked(
            base, other, sides, photos, out / "reranked.png",
            alpha=options.alpha, top=options.top, names=names,
        )  # fmt: skip
        written.append(reranked)
    for path in written:
        print(path)


COMMANDS: dict[str, Callable[[Options], None]] = {
    "build": build,
    "inspect": inspect,
    "merge": merge,
    "score": score,
    "rerank": rerank,
    "finetune": tune,
    "draw": draw,
}


def _config(workdir: str) -> ConfigDict:
    """The config of a run."""
    return workdirs.read_config(Path(workdir))


def _sides(options: Options, config: ConfigDict, built, params, extras) -> knowledge_sets.Sides:
    """The captioned images as --knowledge meets them, with the `words` section and --set."""
    options.needs("knowledge")
    if options.raw:
        encoder = knowledge_sets.raw_encoder()
    else:
        encoder = knowledge_sets.encoder(built, params, extras)
    source = built.test
    if options.dataset or options.root or options.split != "test":
        source = knowledge_sets.open_captioned(
            config.data, dataset=options.dataset, root=options.root, split=options.split
        )
    words = config.words.to_dict()
    for text in options.set:
        field, _, value = text.partition("=")
        if field not in words:
            raise UserError(f"--set={text}: the words section has {', '.join(words)}")
        kind = type(words[field])
        try:
            words[field] = kind(value)
        except ValueError:
            raise UserError(f"--set={text}: {value!r} is no {kind.__name__}") from None
    return knowledge_sets.Sides(
        knowledge_file.load(Path(options.knowledge)),
        encoder,
        source,
        ConfigDict(words),
        vectors=None if words["unknown"] == "drop" else built.words.source,
        most=config.rows.most,
        transform_regions=options.transform_regions,
    )


def _scores_file(name: str) -> Path:
    if not name.endswith(".npy"):
        raise UserError(f"--out={name} must end with .npy")
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    return Path(name)


def _read_scores(name: str) -> np.ndarray:
    try:
        return np.load(name, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be read as a .npy matrix of scores: {error}") from None


def _owner(options: Options, shape: tuple[int, ...]) -> np.ndarray | None:
    """[m] rows of the images that captions describe, if they are known."""
    beside = Path(options.base).with_suffix(".json")
    if options.captions_per_image:
        owner = np.repeat(np.arange(shape[0]), options.captions_per_image)
    elif beside.is_file():
        owner = np.asarray(json.loads(beside.read_text())["image_of_text"])
    else:
        return None
    if len(owner) != shape[1]:
        raise UserError(
            f"{options.base} has {shape[1]} captions, {len(owner)} are known by "
            f"{'--captions_per_image' if options.captions_per_image else beside}"
        )
    return owner


def _group(text: str) -> tuple[str, list[str]]:
    name, colon, words = text.partition(":")
    if not colon or not words.strip():
        raise UserError(f"--groups: {text!r} is not NAME:WORD,WORD")
    return name.strip(), [word.strip() for word in words.split(",")]
