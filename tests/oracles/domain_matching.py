"""Appendix H of MASK in numpy float64, one word and one region at a time."""

import numpy as np


def cycle_consistency(transform, words, regions):
    """(terms of the words [J], terms of the regions [I]) by Eq. 88-92, of what counts only."""
    u = [word / np.linalg.norm(word) @ transform for word in words]
    mu = [region / np.linalg.norm(region) @ transform for region in regions]
    return _one_way(u, mu), _one_way(mu, u)


def _one_way(own, other):
    """-log of how likely each of `own` is taken for itself when it is made of `other`."""
    made = []
    for vector in own:
        weights = np.exp([vector @ part for part in other])
        made.append(sum(w * part for w, part in zip(weights / weights.sum(), other, strict=True)))
    chances = [np.exp([vector @ answer for answer in made]) for vector in own]
    return np.array([-np.log(row[i] / row.sum()) for i, row in enumerate(chances)])
