"""A small folder of precomputed regions with captions, and a tagger that knows their nouns."""

import numpy as np

from tests.data import taggers

CAPTIONS = ("A dog .", "dogs and kids", "A red box in Paris", "the Alps", "kids .")


def write(root):
    """12 training and 6 test images, nine regions of width 6, two captions each: (root, tagger)."""
    for split, images in (("train", 12), ("test", 6)):
        rng = np.random.default_rng(images)
        features = rng.normal(size=(images, 9, 6)).astype(np.float16)
        np.save(root / f"{split}_ims.npy", features)
        lines = [CAPTIONS[number % 5] for number in range(2 * images)]
        (root / f"{split}_caps.txt").write_text("\n".join(lines) + "\n")
        (root / f"{split}_ids.txt").write_text("".join(f"photo{i}.jpg\n" for i in range(images)))
    return root, taggers.write_json(root / "tagger")
