"""MASK's networks and losses in numpy float64: row by row, real regions only, pair by pair."""

import numpy as np


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def norm(x, p):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"]


def linear(x, p):
    return x @ p["kernel"] + p["bias"]


def fc_relu(x, p):
    return np.maximum(linear(x, p), 0.0)


def self_attention(x, p, heads):
    """LN(x + MHSA(x)) of regions [r, c], one head and one query at a time."""
    inner = p["attention"]
    query, key, value = (linear(x, inner[f"{name}_proj"]) for name in "qkv")
    width = x.shape[1] // heads
    mixed = np.zeros_like(x)
    for part in (slice(h * width, (h + 1) * width) for h in range(heads)):
        for i in range(len(x)):
            scores = np.array([query[i, part] @ other for other in key[:, part]])
            mixed[i, part] = softmax(scores / np.sqrt(width)) @ value[:, part]
    return norm(x + linear(mixed, inner["out_proj"]), p["norm"])


# Table 8, and what the depths of Table 12 make of it: the layers of each network in their order.
# "f" is an FC layer with ReLU, "a" self-attention, "F" the FC layer at the end.
ENCODERS = {(1, 3): "faaa", (1, 1): "fa", (1, 5): "faaaaa", (3, 3): "fffaaa", (5, 3): "fffffaaa"}
RECONSTRUCTORS = {(2, 1): "faF", (1, 1): "aF", (3, 1): "ffaF", (2, 3): "faaaF", (2, 5): "faaaaaF"}
MAPPERS = {
    (3, 3): "faafaF",
    (1, 3): "faaa",
    (5, 3): "fffaafaF",
    (3, 1): "ffaF",
    (3, 5): "faafaaaF",
    (2, 3): "faaaF",  # not in the paper
}


def stack(x, p, layers, heads):
    """Runs `layers` over regions [r, c] with the module's parameters, in its order of names."""
    attentions = iter(range(layers.count("a")))
    middle = "fc_middle" in p
    plain = iter(range(layers.count("f") - middle))
    for place, layer in enumerate(layers):
        if layer == "a":
            x = self_attention(x, p[f"attention_{next(attentions)}"], heads)
        elif layer == "F":
            x = linear(x, p["fc_out"])
        elif middle and place == layers.rindex("f"):
            x = fc_relu(x, p["fc_middle"])
        else:
            x = fc_relu(x, p[f"fc_{next(plain)}"])
    return x


def codes(params, row, noise, depths, heads):
    """(mu, sigma, reconstruction, words) of one row: real regions [r, D], noise [r, Z].

    `depths` are the (FC layers, attention layers) of the three networks, `heads` the heads in the
    widths Z and N.
    """
    encoder, reconstructor, mapper = depths
    p = params["encoder"]
    mu = norm(stack(row, p, ENCODERS[encoder], heads[0]), p["norm"])
    sigma = np.logaddexp(0.0, linear(mu, p["sigma"])) + 1e-6
    z = mu + sigma * noise
    back = stack(z, params["reconstructor"], RECONSTRUCTORS[reconstructor], heads[0])
    return mu, sigma, back, stack(mu, params["mapper"], MAPPERS[mapper], heads[1])


def cosine(a, b):
    lengths = np.sqrt((a @ a) * (b @ b))
    return a @ b / lengths if lengths else 0.0


def reconstruction(mu, sigma, back, features, where):
    """(KL [n, R], squared error [n, R]) by Eq. 5, region by region."""
    kl, error = np.zeros(where.shape), np.zeros(where.shape)
    for i in zip(*np.nonzero(where), strict=True):
        for m, s in zip(mu[i], sigma[i], strict=True):
            kl[i] += (m**2 + s**2 - 1) / 2 - np.log(s)
        error[i] = np.linalg.norm(features[i] - back[i]) ** 2
    return kl, error


def cross_modal(mapped, words, mu, where):
    """(first [S], second) by Eq. 9, pair by pair."""
    kept = np.flatnonzero(where)
    first = np.zeros(len(where))
    for i in kept:
        first[i] = 1 - cosine(words[i], mapped[i])
    gaps = [
        (cosine(mapped[i], mapped[j]) - cosine(mu[i], mu[j])) ** 2
        for i in kept
        for j in kept
        if i != j
    ]
    return first, np.mean(gaps) if gaps else 0.0


def negatives_of(k, word, region, where, which):
    """The samples in the denominator of Eq. 6 beside the own one."""
    others = [n for n in np.flatnonzero(where) if n != k]
    if which == "all":
        return others
    others = [n for n in others if word[n] != word[k] and region[n] != region[k]]
    if which == "others":
        return others
    labelled = {(region[n], word[n]) for n in np.flatnonzero(where)}
    return [n for n in others if (region[n], word[k]) not in labelled]


def contrastive(mu, prototypes, word, region, where, temperature=0.07, which="others"):
    """[S] by Eq. 6, sample by sample."""
    values = np.zeros(len(word))
    for k in np.flatnonzero(where):
        own = np.exp(cosine(prototypes[k], mu[k]) / temperature)
        rest = sum(
            np.exp(cosine(prototypes[k], mu[n]) / temperature)
            for n in negatives_of(k, word, region, where, which)
        )
        values[k] = -np.log(own / (own + rest))
    return values
