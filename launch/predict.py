"""Predicts for images with a trained run: predictions.jsonl and one picture per image.

python launch/predict.py --workdir=runs/demo --images photo.jpg folder/ --out=predictions

Multi-label runs give every class a probability and show where they looked. Two-tower runs rank the
images for each --query, and segment them into --classes, whichever names you give. Runs that score
pairs rank the images for each of --captions=FILE (lines "caption" or "image<TAB>caption") and the
captions for each image, beside another run's with --compare=WORKDIR, and show where words look.
Runs on precomputed features read them from --features: FILE.npz, NAME_ims.npy with NAME_ids.txt, or
bottom-up regions as a TSV or a folder of npz files, which have boxes to show.
"""

import json
from pathlib import Path

import cli
import cv2
import numpy as np
from absl import flags

from trm_jax.data.feature_files import FeatureFile
from trm_jax.data.sources.base import read_image
from trm_jax.data.tokenizers import names_with_unknown_words
from trm_jax.train import matches, predictor, workdirs
from trm_jax.types import BadSampleError, UserError
from trm_jax.visualize.ranking import render_ranking
from trm_jax.visualize.regions import render_heatmaps
from trm_jax.visualize.segmentation import render_segmentation

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run", required=True)
_IMAGES = flags.DEFINE_multi_string("images", None, "An image file or a folder", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder for the predictions", required=True)
_QUERY = flags.DEFINE_multi_string("query", [], "A text to rank the images for (two towers)")
_CLASSES = flags.DEFINE_list("classes", [], "Class names to segment images into (two towers)")
_CAPTIONS = flags.DEFINE_string("captions", "", "Text file with captions (runs that score pairs)")
_COMPARE = flags.DEFINE_multi_string("compare", [], "Folder of a run to show beside this one")
_FEATURES = flags.DEFINE_string(
    "features", "", "npz with image_ids and features, FILE[:KEY], NAME_ims.npy, TSV or folder"
)
_TOP = flags.DEFINE_integer("top", 5, "Heat maps or ranked images per picture", lower_bound=1)

_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def main(arguments: list[str]) -> None:
    """Writes predictions.jsonl and the pictures; unreadable images are named and skipped."""
    files = _image_files([*_IMAGES.value, *arguments])
    out = Path(_OUT.value)
    regions = FeatureFile(_FEATURES.value, _regions()) if _FEATURES.value else None
    images, features = {}, []
    for file in files:
        try:
            image = read_image(file)
            if regions is not None:
                features.append(regions.read(file))
            images[file] = image
        except BadSampleError as error:
            print(f"skipped {error}")
    if not images:
        raise UserError("none of the images can be used")
    stacked = np.stack(features) if features else None
    model = predictor.load(_WORKDIR.value, stacked)
    if stacked is None and "features" in model.inputs:
        raise UserError("this run reads precomputed features; give them with --features=FILE.npz")
    batches = list(_batches(model, images, stacked))
    out.mkdir(parents=True, exist_ok=True)
    if "pair_scores" in model.method.predict:
        _finish(_match(model, images, stacked, regions, out), out)
        return
    if _CAPTIONS.value or _COMPARE.value:
        raise UserError("--captions and --compare are for runs that score pairs")
    two_towers = "embed_text" in model.method.predict
    if two_towers != bool(_QUERY.value or _CLASSES.value):
        raise UserError(
            "this run ranks images for texts: give --query='a photo of a dog', or --classes=dog,cat"
            if two_towers
            else "--query and --classes are for two-tower runs; this one scores its classes"
        )
    lines = []
    if not two_towers:
        lines += _score(model, images, batches, out)
    if _QUERY.value:
        lines += _rank(model, images, batches, out)
    if _CLASSES.value:
        lines += _segment(model, images, out)
    _finish(lines, out)


def _regions() -> int:
    """Regions of an image that the run was made for, 0 if it does not say."""
    matching = workdirs.read_config(Path(_WORKDIR.value)).model.get("matching", None)
    return matching.image.regions if matching else 0


def _finish(lines: list[dict], out: Path) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (out / "predictions.jsonl").write_text(text)
    print(f"{len(lines)} predictions in {out / 'predictions.jsonl'}")


def _match(model, images, stacked, regions, out: Path) -> list[dict]:
    """Rankings of images and captions, side by side with those of other runs."""
    if _QUERY.value or _CLASSES.value or not _CAPTIONS.value:
        raise UserError("this run scores pairs: give its captions with --captions=FILE")
    captions, files = matches.read_captions(_CAPTIONS.value), list(images)
    scores = {Path(_WORKDIR.value).name: model.match(stacked, captions.texts)}
    for folder in _COMPARE.value:
        other = predictor.load(folder, stacked)
        scores[Path(folder).name] = other.match(stacked, captions.texts)
    matches.draw(scores, images, captions, out, top=_TOP.value)
    own = {file.stem: row for row, file in enumerate(files)}
    pairs = [(own[owner], k) for k, owner in enumerate(captions.owners) if owner in own][:4]
    if pairs and "attention" in model.method.predict:
        rows, numbers = (list(part) for part in zip(*pairs, strict=True))
        chosen = [captions.texts[k] for k in numbers]
        pictures = [images[files[row]] for row in rows]
        boxes = [regions.boxes(files[row], images[files[row]].shape[:2]) for row in rows]
        matches.draw_attention(
            model, stacked[rows], pictures, chosen, out, boxes=boxes, top=_TOP.value
        )
    names = [str(file) for file in files]
    return matches.rankings(scores[Path(_WORKDIR.value).name], names, captions)


def _score(model, images, batches, out: Path) -> list[dict]:
    lines = []
    found = model.regions(batches, len(images))
    for (file, image), (scores, maps) in zip(images.items(), found, strict=True):
        render_heatmaps(
            image, maps, scores, path=_free(out, file.stem), top_k=_TOP.value, scaling="map"
        )
        lines.append({"image": str(file), "scores": scores})
    return lines


def _segment(model, images, out: Path) -> list[dict]:
    """The share of each class in an image, a picture, and the label map as a PNG of indices."""
    names, lines = [name.strip() for name in _CLASSES.value if name.strip()], []
    if unknown := names_with_unknown_words(model.tokenizer, names):
        print("the text tower does not know every word of: " + ", ".join(unknown))
    found = model.segment(images.values(), names)
    for (file, image), labels in zip(images.items(), found, strict=True):
        path = render_segmentation(image, labels, names, path=_free(out, file.stem))
        # 0 is the background, k + 1 the k-th of --classes.
        cv2.imwrite(str(path.with_suffix(".labels.png")), (labels + 1).astype(np.uint16))
        shares = {name: float((labels == k).mean()) for k, name in enumerate(names)}
        lines.append({"image": str(file), "scores": shares})
    return lines


def _rank(model, images, batches, out: Path) -> list[dict]:
    rows = _rows(model.run("embed_image", batches), len(images))
    embedded = np.stack([row["embedding"] for row in rows])
    tokens = model.tokenizer(_QUERY.value, model.config.data.text_length)
    texts = next(iter(model.run("embed_text", [{"tokens": tokens}])))["embedding"]
    names = list(images)
    lines = []
    for number, (query, scores) in enumerate(zip(_QUERY.value, texts @ embedded.T, strict=True)):
        order = np.argsort(-scores, kind="stable")
        results = [{"id": str(names[i]), "score": float(scores[i])} for i in order]
        lines.append({"query": query, "results": results})
        best = [(images[names[i]], names[i].name, float(scores[i])) for i in order[: _TOP.value]]
        render_ranking(query, best, path=_free(out, f"query_{number}"))
    return lines


def _batches(model, images, stacked):
    if stacked is None:
        return model.images(images.values())
    return ({"features": row[None].astype(np.float32)} for row in stacked)


def _rows(outputs, count: int) -> list[dict[str, np.ndarray]]:
    rows = [
        {name: array[i] for name, array in part.items()}
        for part in outputs
        for i in range(len(next(iter(part.values()))))
    ]
    return rows[:count]


def _free(out: Path, stem: str) -> Path:
    """OUT/stem.png, or stem_2.png and so on where two images share a name in this call."""
    path, number = out / f"{stem}.png", 2
    while path in _written:
        path, number = out / f"{stem}_{number}.png", number + 1
    _written.add(path)
    return path


_written: set[Path] = set()


def _image_files(given: list[str]) -> list[Path]:
    files: list[Path] = []
    for name in given:
        path = Path(name)
        if path.is_dir():
            files += sorted(f for f in path.rglob("*") if f.suffix.lower() in _ENDINGS)
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"--images: {name} is neither a file nor a folder")
    if not files:
        raise UserError(f"--images: no image ({', '.join(_ENDINGS)}) in {', '.join(given)}")
    return files


if __name__ == "__main__":
    cli.run(main)
