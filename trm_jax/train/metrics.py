"""metrics.jsonl, TensorBoard and the terminal: one line per log step, none twice after a resume."""

import contextlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from trm_jax.train import distributed
from trm_jax.types import PyTree


def summarize(sums: PyTree) -> dict[str, float]:
    """Mean metrics -> floats; metrics that counted nothing are left out. Waits for the device."""
    host = jax.device_get(sums)
    return {name: float(m.total / m.count) for name, m in host.items() if m.count > 0}


def zeros(sums: PyTree) -> PyTree:
    """Empty sums that lie where `sums` do."""
    return jax.tree.map(lambda x: distributed.place(np.zeros_like(x), x.sharding), sums)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; a torn last line (power loss) is left out."""
    lines = []
    if path.exists():
        for text in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(text))
    return lines


class MetricsWriter:
    """Writes to `workdir`; only process 0 does (`active`), the others keep silent.

    Args:
      workdir: gets metrics.jsonl and tensorboard/.
      step: the step the run starts from: lines of later steps belong to a lost future and go.
      total_steps: for the progress bar.
      active: whether this process writes.
    """

    def __init__(self, workdir: Path, *, step: int, total_steps: int, active: bool = True):
        self.path = workdir / "metrics.jsonl"
        self.active = active
        self.best: dict[str, float] = {}
        kept = [line for line in read_lines(self.path) if line["step"] <= step]
        kept = [line for line in kept if not line.get("final")]
        for line in kept:
            self._track(line)
        if not active:
            return
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, self.path)
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=step, disable=not terminal, unit="step")
        self._plain = not terminal

    def advance(self) -> None:
        """Moves the progress bar by one step."""
        if self.active:
            self._bar.update()

    def write(self, step: int, split: str, values: dict[str, float], **extra: Any) -> None:
        """One line of metrics.jsonl, TensorBoard scalars, and a line on the terminal."""
        line = {"step": step, "split": split, **values, **extra}
        self._track(line)
        if not self.active:
            return
        finite = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        self._file.write(json.dumps({**line, **finite}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        label = "final" if extra.get("final") else split
        text = f"step {step:>6}  {label:<5}  {shown}"
        if self._plain:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def with_best(self, values: dict[str, float]) -> dict[str, float]:
        """`values` and, for the metrics that rank models, their best value so far."""
        return values | {f"{k}_best": v for k, v in self.best.items() if k in values}

    def close(self) -> None:
        """Flushes and closes the files."""
        if self.active:
            self._bar.close()
            self._file.close()
            self._board.close()

    def _track(self, line: dict[str, Any]) -> None:
        if line["split"] == "train":
            return
        for name in ("mAP", "Rsum", "mIoU", "accuracy"):
            if isinstance(line.get(name), int | float):
                self.best[name] = max(self.best.get(name, -math.inf), line[name])
