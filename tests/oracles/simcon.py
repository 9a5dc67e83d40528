"""SimCon's equations as loops over anchors and candidates, in numpy float64."""

import numpy as np


def simcon(images, text, *, scale, threshold, joint=True, exclude=True, where=None):
    """(per pair [n], |P^I| [n] mean over views, |P^T| [n], weight of the own text [n])."""
    n = len(text)
    where = np.ones(n, bool) if where is None else where
    counted = [i for i in range(n) if where[i]]
    values, own_weights = np.zeros(n), np.zeros(n)
    numbers = np.zeros((2, n))
    for i in counted:
        weights = []
        for view, z in enumerate(images):
            near = images if joint else [z]
            for anchor, others, own_side, which in (
                (z[i], text, z, 0),
                (text[i], z, text, 1),
            ):
                same = near if which == 0 else [text]
                positives = [
                    p
                    for p in counted
                    if p == i
                    or (threshold is not None and max(s[i] @ s[p] for s in same) >= threshold)
                ]
                cross = {p: np.exp(scale * anchor @ others[p]) for p in counted}
                inner = {
                    p: 0.0
                    if threshold is None or (exclude and p == i)
                    else np.exp(scale * anchor @ own_side[p])
                    for p in counted
                }
                total = sum(cross.values()) + sum(inner.values())
                logs = [np.log((cross[p] + inner[p]) / total) for p in positives]
                values[i] -= np.mean(logs)
                numbers[which, i] += len(positives) / len(images)
                weights.append(cross[i] / (cross[i] + inner[i]) / len(positives))
            del view
        own_weights[i] = np.mean(weights)
    return values, numbers[0], numbers[1], own_weights
