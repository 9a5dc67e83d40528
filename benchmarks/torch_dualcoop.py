"""A plain PyTorch training step of DualCoOp, the peer of benchmarks/step_trm_ml.py.

Written for the benchmark from the paper's description, as its users would: CLIP's ResNet without
gradient, both prompts of every class through the frozen text transformer, 20 x cosine at every
position, softmax over positions, asymmetric loss over the pair, SGD. Weights are those of an
OpenCLIP safetensors file. On a GPU it is compiled and runs under bfloat16 autocast.
"""

from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from tests.oracles.modified_resnet import ModifiedResNet


class _Block(nn.Module):
    """A pre-norm transformer block with CLIP's names."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        )

    def forward(self, x, mask):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        hidden = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden))


class _Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))

    def forward(self, x, mask):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class DualCoOp(nn.Module):
    """Images [n, 3, H, W] -> logits [n, 2, C] (negative, positive).

    Args:
      config: of the CLIP towers (a ResNet).
      name_ids: [2C, S] token ids of what follows each context, negative prompts first.
      eos: [2C] position of EOS in each prompt.
      total: tokens of a prompt; DualCoOp pads to 77.
      contexts: learnable tokens of each prompt.
      sos_id: the first token of a prompt.
    """

    def __init__(
        self, config: Any, name_ids, eos, *, total: int, contexts: int = 16, sos_id: int = 49406
    ):
        super().__init__()
        image, text = config["image"], config["text"]
        self.visual = ModifiedResNet(
            image["layers"], image["width"], image["heads"], image["image_size"],
            config["embed_dim"],
        )  # fmt: skip
        width = text["width"]
        self.transformer = _Transformer(width, text["heads"], text["layers"])
        self.token_embedding = nn.Embedding(text["vocab_size"], width)
        self.positional_embedding = nn.Parameter(torch.zeros(text["context_length"], width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, config["embed_dim"]))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.context = nn.Parameter(0.02 * torch.randn(len(name_ids), contexts, width))
        self.total = total
        self.register_buffer("names", torch.as_tensor(name_ids, dtype=torch.long), persistent=False)
        self.register_buffer("eos", torch.as_tensor(eos, dtype=torch.long), persistent=False)
        self.register_buffer("sos", torch.full((1, 1), sos_id), persistent=False)
        mask = torch.full((total, total), float("-inf")).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def load(self, path: str) -> None:
        """Loads the towers from an OpenCLIP file."""
        state = load_file(path)
        missing, unexpected = self.load_state_dict(state, strict=False)
        assert set(missing) <= {"context"} and not unexpected, (missing, unexpected)

    def text_features(self):
        """[2C, d]."""
        count = len(self.context)
        names = self.token_embedding(self.names)
        first = self.token_embedding(self.sos).expand(count, 1, -1)
        padding = self.total - 1 - self.context.shape[1] - names.shape[1]
        x = torch.cat([first, self.context, functional.pad(names, (0, 0, 0, padding))], 1)
        x = self.transformer(x + self.positional_embedding[: self.total], self.mask)
        x = self.ln_final(x[torch.arange(count, device=x.device), self.eos])
        return x @ self.text_projection

    def forward(self, images):
        """See the class."""
        with torch.no_grad():
            dense = _dense(self.visual, images)  # [n, hw, d]
        text = functional.normalize(self.text_features(), dim=-1)
        scores = 20.0 * functional.normalize(dense, dim=-1) @ text.T  # [n, hw, 2C]
        negative, positive = scores.chunk(2, dim=-1)
        weights = positive.softmax(1)
        return 5.0 * torch.stack([(negative * weights).sum(1), (positive * weights).sum(1)], 1)


def _dense(visual: ModifiedResNet, x):
    """The ResNet's dense features alone, positions added as DualCoOp does."""
    x, pool = visual.trunk(x), visual.attnpool
    positions = pool.positions(*x.shape[2:])[1:]
    return pool.c_proj(pool.v_proj(x.flatten(2).transpose(1, 2) + positions))


def asymmetric_loss(logits, labels):
    """DualCoOp's loss on known labels: gamma- 2, gamma+ 1, shift 0.05, summed."""
    p = logits.float().softmax(1)[:, 1]
    shifted = (p - 0.05).clamp(min=0)
    positive = -((1 - p).detach() ** 1) * torch.log(p.clamp(min=1e-6))
    negative = -(shifted.detach() ** 2) * torch.log((1 - shifted).clamp(min=1e-6))
    return 0.03 * (positive * (labels == 1) + negative * (labels == -1)).sum()


class Step:
    """model, optimizer and the arrays of one batch; calling it makes one update.

    images: float32 [n, H, W, 3], normalised; labels: int8 [n, C].
    """

    def __init__(self, model: DualCoOp, images, labels):
        self.cuda = torch.cuda.is_available()
        device = torch.device("cuda" if self.cuda else "cpu")
        layout = torch.channels_last
        self.model = model.to(device).eval()
        self.model.visual.to(memory_format=layout)
        self.images = torch.as_tensor(images).permute(0, 3, 1, 2).to(device).contiguous(
            memory_format=layout
        )  # fmt: skip
        self.labels = torch.as_tensor(labels).to(device)
        self.optimizer = torch.optim.SGD(
            [self.model.context], lr=2e-3, momentum=0.9, weight_decay=5e-4
        )
        self.forward = torch.compile(self.model) if self.cuda else self.model

    def __call__(self) -> float:
        """The loss before the update; returns when the update is done."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.cuda):
            logits = self.forward(self.images)
        loss = asymmetric_loss(logits, self.labels)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def peak_mb(self) -> float | None:
        """Peak memory of the GPU in MB, None on a CPU."""
        return torch.cuda.max_memory_allocated() / 1e6 if self.cuda else None
