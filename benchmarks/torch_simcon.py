"""SimCon in PyTorch by its formula, with B x B matrices: the peer of benchmarks/simcon_loss.py."""

import time
from typing import Any

import torch

from benchmarks.simcon_loss_programs import LOSSES, SCALE, THRESHOLD, Task, embeddings


def simcon(
    images: tuple[torch.Tensor, ...], text: torch.Tensor, scale: torch.Tensor, threshold: float
) -> torch.Tensor:
    """The loss of a batch (SimCon's Eq. 3 to 8): joint positives, self-similarity left out.

    Args:
      images: one or two views [n, d], unit norm.
      text: [n, d], unit norm.
      scale: [], 1 / temperature.
      threshold: of the cosines that make a pair positive.
    """
    own = torch.eye(len(text), dtype=torch.bool, device=text.device)
    cross = [(z @ text.T).float() for z in images]
    inner = [(z @ z.T).float() for z in images]
    texts = (text @ text.T).float()
    near = own.clone()
    for similarity in inner:
        near |= similarity >= threshold
    near_text = own | (texts >= threshold)
    kinds = list(zip(cross, inner, [near] * len(images), strict=True))
    kinds += [(s.T, texts, near_text) for s in cross]
    losses = []
    for other, same, positive in kinds:
        logits, intra = scale * other, (scale * same).masked_fill(own, -torch.inf)
        pulled = torch.where(positive, torch.logaddexp(logits, intra), 0.0).sum(1)
        candidates = torch.logsumexp(torch.cat([logits, intra], dim=1), dim=1)
        losses.append(candidates - pulled / positive.sum(1))
    return torch.stack(losses).sum(0).mean()


class Step:
    """Loss and gradient of a batch, run again and again on the GPU if there is one."""

    def __init__(self, task: Task, form: str, loss: str = "SimCon"):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype, views = getattr(torch, task.dtype), LOSSES[loss][0]
        images, text = embeddings(task)

        def put(x) -> torch.Tensor:
            return torch.as_tensor(x).to(self.device, dtype).requires_grad_()

        self.vectors = [put(x) for x in (*images[:views], text)]
        self.scale = torch.tensor(SCALE, device=self.device, requires_grad=True)
        self.loss: Any = simcon
        if form == "compiled":
            self.loss = torch.compile(simcon, dynamic=False)

    def __call__(self) -> float:
        for leaf in (*self.vectors, self.scale):
            leaf.grad = None
        value = self.loss(tuple(self.vectors[:-1]), self.vectors[-1], self.scale, THRESHOLD)
        value.backward()
        return float(value.detach())  # waits for a GPU, the gradients included: one stream


def sides(task: Any):
    """The functions of a worker process (step_trm_ml_workers.Worker): "eager", "compiled"."""
    forms = ("eager", "compiled") if torch.cuda.is_available() else ("eager",)
    steps = {form: Step(task, form) for form in forms}
    return steps, lambda: None, {"forms": list(forms), "loss": steps["eager"]()}


def largest(task: Task, form: str) -> tuple[list[tuple[int, float, float]], int]:
    """([(batch, seconds, peak MB beside the inputs)], the batch that did not fit), doubling."""
    found, batch = [], task.batch
    while True:
        step = None
        try:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.compiler.reset()
            step = Step(task._replace(batch=batch), form)
            base = torch.cuda.memory_allocated()
            step()
            started = time.perf_counter()
            step()
            seconds = time.perf_counter() - started
            found.append((batch, seconds, (torch.cuda.max_memory_allocated() - base) / 1e6))
        except torch.OutOfMemoryError:
            return found, batch
        finally:
            del step
        batch *= 2
