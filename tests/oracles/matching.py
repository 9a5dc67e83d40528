"""SCAN, SGRAF and NAAF in torch, one caption at a time, with contexts built and norms as published.

Captions come as lists of [T, d] tensors without padding. Epsilons stand outside of roots, as in the
public programs. Weights are nested dicts of numpy arrays, as the package's modules have them.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812


def captions_of(words, mask):
    """The real words [T, d] of each caption."""
    return [torch.tensor(w[m]) for w, m in zip(words, mask, strict=True)]


def unit(x, axis=-1):
    return x / (x.pow(2).sum(axis, keepdim=True).sqrt() + 1e-8)


def cosine(a, b):
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-8)


def attend(queries, context, scale):
    """Weights [n, j, i] of queries [n, j, d] on context [n, i, d]."""
    similarity = F.leaky_relu(context @ queries.mT, 0.1)  # [n, i, j]
    return torch.softmax(scale * unit(similarity, axis=2), dim=1).mT


def scan(regions, captions, direction, pooling, attention_scale, lse_scale):
    """Scores [n, m]."""
    columns = []
    for words in captions:
        words = words.expand(len(regions), *words.shape)
        query, context = (words, regions) if direction == "t2i" else (regions, words)
        relevance = cosine(query, attend(query, context, attention_scale) @ context)
        if pooling == "mean":
            columns.append(relevance.mean(1))
        else:
            columns.append((lse_scale * relevance).exp().sum(1).log() / lse_scale)
    return torch.stack(columns, 1)


def naaf_caption(regions, words, threshold, train, scale=20.0, mixing=5.0):
    """Scores [n] of one caption."""
    words_ = words.expand(len(regions), *words.shape)
    similarity = words_ @ regions.mT  # [n, T, r]
    excess = (similarity - threshold).amax(2)
    if train:
        missing = excess * (excess < 0)
    else:
        weights = torch.softmax(mixing * words @ words.T, dim=1)
        missing = excess * ((excess @ weights.T) < 0)
    above = torch.where(similarity > threshold, scale * (similarity - threshold), -1e9).exp()
    context = (above / (above.sum(2, keepdim=True) + 1e-8)) @ regions
    there = (words_ * context).sum(-1) / context.norm(dim=-1).clamp(min=1e-8)
    seen = (similarity * attend(words_, regions, scale)).sum(-1)
    return (missing + there + seen).mean(1)


def naaf(regions, captions, threshold, train):
    """Scores [n, m] with one threshold."""
    return torch.stack([naaf_caption(regions, w, threshold, train) for w in captions], 1)


def naaf_fit(matched, mismatched, threshold, safe, alpha=2.0):
    """New (threshold, safe threshold) from two tensors of greatest similarities."""
    mean, other = matched.mean().item(), mismatched.mean().item()
    s, o = matched.std().item(), mismatched.std().item()
    a = s**2 - o**2
    b = 2 * (mean * o**2 - other * s**2)
    c = (other * s) ** 2 - (mean * o) ** 2 + 2 * (s * o) ** 2 * math.log(o / (alpha * s) + 1e-8)
    new, new_safe = threshold, safe
    if b * b - 4 * a * c > 0:
        new = (-b + math.sqrt(b * b - 4 * a * c)) / (2 * a + 1e-10)
        new_safe = mean - 3 * s
    new, new_safe = (x if 0 <= x <= 1 else 0.0 for x in (new, new_safe))
    return 0.7 * new + 0.3 * threshold, 0.7 * new_safe + 0.3 * safe


def naaf_sequence(regions, captions, threshold, safe):
    """(threshold that each caption was scored with, thresholds after the batch)."""
    used, matched, mismatched, words_seen = [], [], [], 0
    for i, words in enumerate(captions):
        used.append(threshold)
        scores = naaf_caption(regions, words, threshold, True)
        if scores.argmax() == i:
            matched.append((words @ regions[i].T).amax(1))
            mismatched.append((words @ regions[scores.argmin()].T).amax(1))
            words_seen += len(words)
            if words_seen > 200:
                pair = torch.cat(matched), torch.cat(mismatched)
                threshold, safe = naaf_fit(*pair, threshold, safe)
        if words_seen < 200:
            threshold = safe = 0.0
    return used, threshold, safe


class Sgraf:
    """SGR or SAF with given weights, running statistics, and biases where the package has none.

    Attributes:
      running: name -> [mean, variance], moved by training as torch moves them.
    """

    def __init__(self, variables, module, biases=0.0):
        as_tensor = torch.tensor
        self.p = _map(as_tensor, variables["params"])
        stats = _map(as_tensor, variables["batch_stats"])
        images = stats["image_global"]
        self.running = {
            name: [images[name]["mean"], images[name]["var"]]
            for name in ("local_norm", "whole_norm")
        }
        if module == "saf":
            self.running["filtration"] = list(stats["filtration"]["running"][:, None])
            self.running["filtration"][0] = self.running["filtration"][0] + biases
        self.module, self.biases = module, biases

    def scores(self, regions, captions, train):
        """[n, m]; dropout is left out."""
        whole = self._global(regions, "image_global", train)
        return torch.stack([self._caption(regions, whole, w, train) for w in captions], 1)

    def _caption(self, regions, image, words, train):
        text = self._global(words[None], "caption_global", train)
        words = words.expand(len(regions), *words.shape)
        context = unit(attend(words, regions, 9.0) @ regions)
        local = unit(_linear(self.p["local_similarity"], (context - words) ** 2))
        whole = unit(_linear(self.p["global_similarity"], (image - text) ** 2))
        nodes = torch.cat([whole[:, None], local], 1)
        vector = self._reason(nodes) if self.module == "sgr" else self._filter(nodes, train)
        return torch.sigmoid(_linear(self.p["score"], vector))[:, 0]

    def _global(self, members, name, train):
        p = self.p[name]
        local, whole = _linear(p["local"], members), _linear(p["whole"], members.mean(1))
        if name == "image_global":
            local, whole = (
                self._norm(x, p[f"{part}_norm"], f"{part}_norm", train)
                for x, part in ((local, "local"), (whole, "whole"))
            )
        common = local.tanh() * whole.tanh()[:, None]
        weights = torch.softmax(common @ p["logit"]["kernel"] + self.biases, dim=1)
        return unit((weights * members).sum(1))

    def _norm(self, x, p, name, train):
        mean, var = (x.clone() for x in self.running[name])
        out = F.batch_norm(
            x, mean, var, p["scale"].reshape(-1), p["bias"].reshape(-1), train, 0.1, 1e-5
        )
        self.running[name] = [mean, var]
        return out

    def _reason(self, nodes):
        for step in (self.p[f"reasoning_{i}"] for i in range(3)):
            query = nodes @ step["query"] + step["query_bias"]
            key = nodes @ step["key"] + self.biases
            edges = torch.softmax(query @ key.mT, dim=-1)
            nodes = _linear(step["out"], edges @ nodes).relu()
        return nodes[:, 0]

    def _filter(self, nodes, train):
        p = self.p["filtration"]
        logits = (nodes @ p["gate"]["kernel"]).mT + self.biases  # [n, 1, 1 + T]
        gates = torch.sigmoid(self._norm(logits, p, "filtration", train))
        gates = gates / (gates.abs().sum(-1, keepdim=True) + 1e-8)
        return unit((gates @ nodes)[:, 0])


def _linear(p, x):
    return x @ p["kernel"] + p["bias"]


def _map(function, tree):
    return {k: _map(function, v) if isinstance(v, dict) else function(v) for k, v in tree.items()}
