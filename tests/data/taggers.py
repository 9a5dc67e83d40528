"""Data of a tagger in NLTK's two forms: JSON files and a pickle."""

import json
import pickle
import zipfile

JSON = "averaged_perceptron_tagger_eng"
PICKLE = "averaged_perceptron_tagger"

# Words of one tag. A word that is not listed gets the last tag of the alphabet, here no noun's.
TAGS = {"dog": "NN", "DOG": "NN", "dogs": "NNS", "kids": "NNS", "Paris": "NNP", "Alps": "NNPS"}
TAGS |= {"boxes": "NNS", "box": "NN", "t-shirt": "NN", "A": "NNP", "red": "JJ", ".": "."}
TABLES = ({}, TAGS, {"JJ", "NN", "NNS", "NNP", "NNPS", "VBZ", "."})


def write_json(folder, tables=TABLES):
    """The three files that `nltk.downloader` unpacks; returns `folder`."""
    folder.mkdir(parents=True)
    weights, tagdict, classes = tables
    parts = {"weights": weights, "tagdict": tagdict, "classes": sorted(classes)}
    for part, value in parts.items():
        (folder / f"{PICKLE}_eng.{part}.json").write_text(json.dumps(value))
    return folder


def write_pickle(path, value=TABLES):
    """The older form, in the protocol of Python 2; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value, protocol=2))
    return path


def write_zip(path, folder):
    """The files of `folder` as they lie in NLTK's archives; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"{folder.name}/{file.name}")
    return path
