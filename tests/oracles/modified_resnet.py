"""CLIP's ModifiedResNet in torch, written from the paper and the published tensor names.

The attention pool goes through torch's own multi-head attention, the dense features through
explicit linear maps, the resizing through torch's bicubic interpolation: nothing is shared with
the implementation under test.
"""

import torch
from torch import nn
from torch.nn import functional


class Bottleneck(nn.Module):
    """1x1, 3x3, mean pool, 1x1, with a mean-pooled 1x1 shortcut."""

    def __init__(self, inplanes, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.stride = stride
        if stride > 1 or inplanes != planes * 4:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes * 4, 1, bias=False), nn.BatchNorm2d(planes * 4)
            )

    def forward(self, x):
        out = functional.relu(self.bn1(self.conv1(x)))
        out = functional.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(functional.avg_pool2d(out, self.stride)))
        if hasattr(self, "downsample"):
            x = self.downsample(functional.avg_pool2d(x, self.stride))
        return functional.relu(out + x)


class AttentionPool(nn.Module):
    """The mean position attends to all positions."""

    def __init__(self, side, width, heads, embed_dim):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, width))
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)
        self.side, self.heads = side, heads

    def positions(self, height, width):
        first, grid = self.positional_embedding[:1], self.positional_embedding[1:]
        grid = grid.T.reshape(1, -1, self.side, self.side)
        grid = functional.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
        return torch.cat([first, grid.flatten(2)[0].T])

    def forward(self, x, dense_pos_embed):
        height, width = x.shape[2:]
        plain = x.flatten(2).permute(2, 0, 1)
        positions = self.positions(height, width)[:, None]
        x = torch.cat([plain.mean(0, keepdim=True), plain]) + positions
        pooled, _ = functional.multi_head_attention_forward(
            query=x[:1],
            key=x,
            value=x,
            embed_dim_to_check=x.shape[-1],
            num_heads=self.heads,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
            in_proj_weight=None,
            in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias,
            use_separate_proj_weight=True,
            training=False,
            need_weights=False,
        )
        dense = self.c_proj(self.v_proj(x[1:] if dense_pos_embed else plain))
        return pooled[0], dense.transpose(0, 1)


class ModifiedResNet(nn.Module):
    """Normalised images [n, 3, H, W] -> (pooled [n, d], dense [n, hw, d])."""

    def __init__(self, layers, width, heads, image_size, embed_dim):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.stages, inplanes = len(layers), width
        for stage, depth in enumerate(layers):
            blocks = []
            for i in range(depth):
                stride = 2 if stage and i == 0 else 1
                blocks.append(Bottleneck(inplanes, width * 2**stage, stride))
                inplanes = width * 2**stage * 4
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        side = image_size // (4 * 2 ** (len(layers) - 1))
        self.attnpool = AttentionPool(side, inplanes, heads, embed_dim)

    def trunk(self, x):
        """The last stage's features [n, c, h, w]."""
        for i in (1, 2, 3):
            conv, norm = getattr(self, f"conv{i}"), getattr(self, f"bn{i}")
            x = functional.relu(norm(conv(x)))
        x = functional.avg_pool2d(x, 2)
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return x

    def forward(self, x, dense_pos_embed=False):
        return self.attnpool(self.trunk(x), dense_pos_embed)


def randomised(layers, width, heads, image_size, embed_dim, seed=0):
    """An evaluation-mode network whose statistics, scales and biases are all non-trivial."""
    torch.manual_seed(seed)
    model = ModifiedResNet(layers, width, heads, image_size, embed_dim).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var") or (".bn" in name and name.endswith("weight")):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith(("running_mean", "bias")):
                tensor.normal_(0, 0.2)
    return model


def calibrated(layers, width, heads, image_size, embed_dim, images, seed=0):
    """An evaluation-mode network of any depth whose activations neither vanish nor explode.

    The statistics of every BatchNorm are those of `images` [n, 3, H, W], scales and biases are
    random. The last scale of each residual branch is 0.1 to 0.3: CLIP starts it at zero, and at
    one the rounding errors of 33 random blocks would be amplified a hundredfold, in torch as well.
    Queries and keys are smaller than the features, so that the pool's softmax does not pick one
    position; position embeddings are about as large as the features.
    """
    torch.manual_seed(seed)
    model = ModifiedResNet(layers, width, heads, image_size, embed_dim)
    with torch.no_grad():
        for name, norm in model.named_modules():
            if isinstance(norm, nn.BatchNorm2d):
                last = name.startswith("layer") and name.endswith("bn3")
                norm.weight.uniform_(*((0.1, 0.3) if last else (0.5, 1.5)))
                norm.bias.normal_(0, 0.2)
                norm.momentum = 1.0  # one pass replaces the statistics
        channels = model.attnpool.c_proj.in_features
        for name in ("q_proj", "k_proj", "v_proj", "c_proj"):
            linear = getattr(model.attnpool, name)
            gain = 0.5 if name in ("q_proj", "k_proj") else 1.0
            linear.weight.normal_(0, gain * channels**-0.5)
            linear.bias.normal_(0, 0.2)
        model(images)
    return model.eval()
