"""SCAN, SGRAF and NAAF in PyTorch, a caption at a time: the peer of benchmarks/scoring.py.

Written for the benchmark from the papers and what is known of their public programs: these meet a
batch of images with one caption after the other, cut to its own length, repeat its words for every
image, build what each word (or region) attends to, and take norms with the epsilon outside of the
root. Weights are those of our modules. What the public programs compute once for a batch of images
(SGRAF's global image vectors) is computed once here, too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

Tensor = torch.Tensor


def tensors(tree: Any, device: str = "cpu") -> Any:
    """The arrays of nested mappings as tensors."""
    if isinstance(tree, Mapping):
        return {name: tensors(value, device) for name, value in tree.items()}
    return torch.as_tensor(np.array(tree), device=device)


def _unit(x: Tensor, axis: int = -1) -> Tensor:
    return x / (x.pow(2).sum(axis, keepdim=True).sqrt() + 1e-8)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-8)


def _linear(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return functional.linear(x, p["kernel"].T, p.get("bias"))


def _attend(queries: Tensor, context: Tensor, scale: float) -> Tensor:
    """Softmax weights [n, j, i] of queries [n, j, d] on the vectors of context [n, i, d]."""
    similarity = functional.leaky_relu(torch.bmm(context, queries.transpose(1, 2)), 0.1)
    return torch.softmax(scale * _unit(similarity, axis=2).transpose(1, 2), dim=2)


class Scan:
    """SCAN with mean pooling. direction: "t2i" or "i2t"; scale: lambda of the attention."""

    def __init__(self, direction: str, scale: float):
        self.direction, self.scale = direction, scale

    def prepare(self, regions: Tensor, train: bool) -> None:
        """Nothing that captions share."""

    def caption(self, regions: Tensor, whole: None, words: Tensor, train: bool) -> Tensor:
        """Scores [n] of images [n, r, d] with a caption [T, d]."""
        words = words.repeat(len(regions), 1, 1)
        query, context = (words, regions) if self.direction == "t2i" else (regions, words)
        attended = torch.bmm(_attend(query, context, self.scale), context)
        return _cosine(query, attended).mean(1)


class Naaf:
    """NAAF. threshold: of the similarities that count as a match."""

    def __init__(self, threshold: float, scale: float, mixing: float):
        self.threshold, self.scale, self.mixing = threshold, scale, mixing

    def prepare(self, regions: Tensor, train: bool) -> None:
        """Nothing that captions share."""

    def caption(self, regions: Tensor, whole: None, words: Tensor, train: bool) -> Tensor:
        """Scores [n] of images [n, r, d] with a caption [T, d]."""
        repeated = words.repeat(len(regions), 1, 1)
        similarity = torch.bmm(repeated, regions.transpose(1, 2))  # [n, T, r]
        excess = similarity.amax(2) - self.threshold
        if train:
            missing = excess.clamp(max=0)
        else:
            near = torch.softmax(self.mixing * words @ words.T, dim=1)
            missing = excess * (excess @ near.T < 0)
        over = similarity - self.threshold
        weights = torch.softmax((self.scale * over).masked_fill(over <= 0, -torch.inf), dim=2)
        context = torch.bmm(torch.nan_to_num(weights), regions)
        there = (repeated * context).sum(2) / context.norm(dim=2).clamp(min=1e-8)
        seen = (similarity * _attend(repeated, regions, self.scale)).sum(2)
        return (missing + there + seen).mean(1)


class Sgraf:
    """SGR or SAF, without dropout.

    Args:
      module: "sgr" or "saf".
      params, statistics: our scorer's parameters and batch statistics, as tensors; training moves
        the statistics.
      scale: lambda of the attention.
      steps: of SGR.
    """

    def __init__(self, module: str, params: Mapping, statistics: Mapping, scale: float, steps: int):
        self.module, self.params, self.scale, self.steps = module, params, scale, steps
        images = statistics["image_global"]
        self.running = {name: (x["mean"].clone(), x["var"].clone()) for name, x in images.items()}
        if module == "saf":
            mean, var = statistics["filtration"]["running"].clone()
            self.running["filtration"] = (mean[None], var[None])

    def prepare(self, regions: Tensor, train: bool) -> Tensor:
        """The images' global vectors [n, d]."""
        return self._global(regions, "image_global", train)

    def caption(self, regions: Tensor, whole: Tensor, words: Tensor, train: bool) -> Tensor:
        """Scores [n] of images [n, r, d] with a caption [T, d]."""
        p, text = self.params, self._global(words[None], "caption_global", train)
        words = words.repeat(len(regions), 1, 1)
        context = _unit(torch.bmm(_attend(words, regions, self.scale), regions))
        local = _unit(_linear(p["local_similarity"], (context - words).pow(2)))
        both = _unit(_linear(p["global_similarity"], (whole - text).pow(2)))
        nodes = torch.cat([both[:, None], local], dim=1)
        vector = self._reason(nodes) if self.module == "sgr" else self._filter(nodes, train)
        return torch.sigmoid(_linear(p["score"], vector))[:, 0]

    def _global(self, members: Tensor, name: str, train: bool) -> Tensor:
        p = self.params[name]
        local, whole = _linear(p["local"], members), _linear(p["whole"], members.mean(1))
        if name == "image_global":
            local = self._norm(local, p["local_norm"], "local_norm", train)
            whole = self._norm(whole, p["whole_norm"], "whole_norm", train)
        common = torch.tanh(local) * torch.tanh(whole)[:, None]
        weights = torch.softmax(_linear(p["logit"], common), dim=1)
        return _unit((weights * members).sum(1))

    def _norm(self, x: Tensor, p: Mapping[str, Tensor], name: str, train: bool) -> Tensor:
        scale, bias = p["scale"].reshape(-1), p["bias"].reshape(-1)
        return functional.batch_norm(x, *self.running[name], scale, bias, train, 0.1, 1e-5)

    def _reason(self, nodes: Tensor) -> Tensor:
        for number in range(self.steps):
            p = self.params[f"reasoning_{number}"]
            query = functional.linear(nodes, p["query"].T, p["query_bias"])
            edges = torch.bmm(query, functional.linear(nodes, p["key"].T).transpose(1, 2))
            nodes = _linear(p["out"], torch.bmm(torch.softmax(edges, dim=2), nodes)).relu()
        return nodes[:, 0]

    def _filter(self, nodes: Tensor, train: bool) -> Tensor:
        p = self.params["filtration"]
        logits = _linear(p["gate"], nodes).transpose(1, 2)  # [n, 1, 1 + T]
        gates = torch.sigmoid(self._norm(logits, p, "filtration", train))
        gates = gates / (gates.abs().sum(2, keepdim=True) + 1e-8)
        return _unit(torch.bmm(gates, nodes)[:, 0])


def make(
    config: Mapping[str, Any], params: Any, statistics: Any, threshold: float, device: str
) -> Any:
    """The scorer of a matching model, with our weights.

    Args:
      config: validated, see trm_jax/models/matching/config.py.
      params, statistics: nested mappings of arrays, empty for SCAN and NAAF.
      threshold: of NAAF.
      device: of torch.
    """
    scorer = config["scorer"]
    if config["kind"] == "scan":
        scale = scorer["attention_scale"] or {"t2i": 9.0, "i2t": 4.0}[scorer["direction"]]
        return Scan(scorer["direction"], scale)
    if config["kind"] == "naaf":
        return Naaf(threshold, scorer["attention_scale"], scorer["mixing_scale"])
    params, statistics = tensors(params, device), tensors(statistics, device)
    return Sgraf(scorer["module"], params, statistics, scorer["attention_scale"], scorer["steps"])


class Evaluation:
    """Scores of images and captions, batch of images by batch of images.

    Args:
      scorer: by `make`.
      images: batches of regions [n, r, d].
      captions: words [T, d] of any lengths.
      device: of torch.
    """

    def __init__(
        self, scorer: Any, images: Sequence[np.ndarray], captions: Sequence[np.ndarray], device: str
    ):
        self.scorer = scorer
        self.captions = [tensors(words, device) for words in captions]
        with torch.no_grad():
            regions = [tensors(batch, device) for batch in images]
            self.images = [(batch, scorer.prepare(batch, False)) for batch in regions]

    def __call__(self) -> np.ndarray:
        """[all images, captions]; waits for a GPU."""
        with torch.no_grad():
            found = [scores(self.scorer, *both, self.captions) for both in self.images]
            return torch.cat(found).cpu().numpy()


class Step:
    """Scores of a batch of images with captions, and gradients of their weighted sum.

    Args:
      scorer: by `make`.
      regions: [n, r, d].
      whole: [n, d], the images' global vectors; not read by SCAN and NAAF.
      captions: words [T, d] of any lengths.
      weights: [n, captions].
      device: of torch.
    """

    def __init__(
        self,
        scorer: Any,
        regions: np.ndarray,
        whole: np.ndarray,
        captions: Sequence[np.ndarray],
        weights: np.ndarray,
        device: str,
    ):
        self.scorer, self.weights = scorer, tensors(weights, device)
        self.images = [tensors(side, device).requires_grad_() for side in (regions, whole)]
        self.captions = [tensors(words, device).requires_grad_() for words in captions]
        self.leaves = [*self.images, *self.captions]
        if isinstance(scorer, Sgraf):
            self.leaves += [leaf.requires_grad_() for leaf in _leaves(scorer.params)]

    def __call__(self) -> np.ndarray:
        """The scores [n, captions]; waits for a GPU, the gradients included."""
        for leaf in self.leaves:
            leaf.grad = None
        regions, whole = self.images
        found = scores(self.scorer, regions, whole, self.captions, train=True)
        (found * self.weights).sum().backward()
        found = found.detach().cpu().numpy()
        if self.weights.is_cuda:
            torch.cuda.synchronize()
        return found

    def word_gradients(self) -> list[np.ndarray]:
        """[T, d] of each caption, of the last call."""
        return [leaf.grad.cpu().numpy() for leaf in self.captions if leaf.grad is not None]


def _leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Mapping):
        return [leaf for value in tree.values() for leaf in _leaves(value)]
    return [tree]


def scores(
    scorer: Any, regions: Tensor, whole: Any, captions: Sequence[Tensor], train: bool = False
) -> Tensor:
    """Scores [n, m] of images [n, r, d] with captions [T, d], in a loop; `whole` by `prepare`."""
    return torch.stack([scorer.caption(regions, whole, words, train) for words in captions], dim=1)
