"""Word-labelled regions, word vectors and captioned images in which words look like something."""

import numpy as np

WORDS = ("dog", "kid", "traffic light", "ball", "tree", "car", "sky", "hat")
SYNONYMS = {"dog": "hound", "kid": "child", "tree": "oak"}  # of captions alone
WIDTH, TEST_IMAGES = 12, 24


def _looks():
    return np.random.default_rng(7).normal(size=(len(WORDS), WIDTH))


def write(root):
    """(regions of 40 training images, folder of 24 test images with 2 captions, word vectors).

    A region is what its word looks like, with noise; "unwritten" is a word without a vector. A
    synonym's vector is near its word's, "the" and "a" have none.
    """
    rng, looks = np.random.default_rng(0), _looks()
    words, images = [], []
    for image in range(40):
        for word in rng.choice(len(WORDS), 5, replace=False):
            words.append(word)
            images.append(image)
    features = looks[words] + 0.3 * rng.normal(size=(len(words), WIDTH))
    names = [WORDS[word] for word in words]
    names[0] = "unwritten"
    regions = root / "regions.npz"
    np.savez(regions, features=features, words=np.asarray(names), image_ids=np.asarray(images))

    chosen = np.array([rng.choice(len(WORDS), 4, replace=False) for _ in range(TEST_IMAGES)])
    shown = looks[chosen] + 0.3 * rng.normal(size=(*chosen.shape, WIDTH))
    np.save(root / "test_ims.npy", shown.astype(np.float32))
    lines = []
    for row in chosen:
        spoken = [SYNONYMS.get(WORDS[k], WORDS[k]) for k in row]
        lines += [f"A {spoken[0]} and the {spoken[1]} .", f"the {spoken[2]} , {WORDS[row[3]]}"]
    (root / "test_caps.txt").write_text("\n".join(lines) + "\n")

    vectors = {"and": rng.normal(size=6)}
    for word in WORDS:
        for part in word.split():
            vectors[part] = rng.normal(size=6)
    for word, synonym in SYNONYMS.items():
        vectors[synonym] = vectors[word] + 0.1 * rng.normal(size=6)
    glove = root / "vectors.txt"
    glove.write_text("".join(f"{w} {' '.join(map(str, v))}\n" for w, v in vectors.items()))
    return regions, root, glove
