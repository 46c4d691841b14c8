"""The Audio Spectrogram Transformer: (B, n_mels, frames) -> (B, classes).

Y. Gong, Y.-A. Chung, J. Glass, "AST: Audio Spectrogram Transformer", Interspeech 2021. The layout of the
parameters is timm's distilled DeiT, which the authors built on, so their weights load key by key.
"""
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class ASTConfig:
    """What an AST is; `AST(ASTConfig(**config.to_dict()))` builds the same one again."""
    n_classes: int
    dim: int = 768
    depth: int = 12
    heads: int = 12
    n_mels: int = 128
    patch: int = 16
    stride: int = 10
    time_patches: int = 101  # of the position grid as a parameter; any real length is fitted to it
    mlp_ratio: float = 4.0
    drop_path: float = 0.0  # rate at the last block, rising linearly from 0 at the first

    def __post_init__(self):
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        if self.n_mels < self.patch:
            raise ValueError(f"n_mels {self.n_mels} is less than one patch ({self.patch})")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path {self.drop_path} is not in [0, 1)")

    @classmethod
    def base(cls, n_classes, **changes):
        return cls(n_classes, **changes)

    @classmethod
    def small(cls, n_classes, **changes):
        return cls(n_classes, **{"dim": 384, "heads": 6, **changes})

    @classmethod
    def tiny(cls, n_classes, **changes):
        return cls(n_classes, **{"dim": 192, "heads": 3, **changes})

    def to_dict(self):
        return asdict(self)

    def patches(self, frames):
        """(frequency, time) patches of an input of `frames` frames."""
        return (self.n_mels - self.patch) // self.stride + 1, (frames - self.patch) // self.stride + 1

    @property
    def grid(self):
        """(frequency, time) of the position grid."""
        return self.patches(0)[0], self.time_patches


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, first=None):  # (B, N, dim) -> (B, first, dim): of the first tokens alone, by default of all
        B, N, dim = x.shape
        if first is None:
            q, k, v = self.qkv(x).view(B, N, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        else:
            weight, bias = self.qkv.weight.split((dim, 2 * dim)), self.qkv.bias.split((dim, 2 * dim))
            q = F.linear(x[:, :first], weight[0], bias[0]).view(B, first, self.heads, dim // self.heads).transpose(1, 2)
            k, v = F.linear(x, weight[1], bias[1]).view(B, N, 2, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N or first, dim / heads)
        return self.proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; drop-path is per clip."""

    def __init__(self, config, drop_path):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = Attention(config.dim, config.heads)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = MLP(config.dim, int(config.dim * config.mlp_ratio))

    def forward(self, x, noise=None, first=None):
        """x (B, N, dim), noise (B, 2) in [0, 1) or None -> (B, N, dim), or (B, first, dim) where only the first
        tokens are wanted, which attend to all."""
        x = x[:, :first] + self._keep(self.attn(self.norm1(x), first), noise, 0)
        return x + self._keep(self.mlp(self.norm2(x)), noise, 1)

    def _keep(self, branch, noise, which):
        if noise is None or self.drop_path == 0:
            return branch
        keep = (noise[:, which] >= self.drop_path).to(branch.dtype) / (1 - self.drop_path)
        return branch * keep[:, None, None]


class AST(nn.Module):
    """AST(config)(x): x (B, n_mels, frames), normalised as the front end does it -> logits (B, n_classes).

    In training with drop-path, `noise` (B, 2 * depth), uniform in [0, 1), decides for each clip which
    branches are dropped; the caller derives it from the clip, so that a clip is treated alike in any
    batch, on any rank and in a batch split in two. Without it, torch's own generator is drawn from.
    `kept` (B, k) names the patches of each clip, row by row from 0, that take part; without it all do.

    Raises ValueError for an input of another shape, swapped axes first of all: they give the same number
    of tokens (12 x 101 = 101 x 12) and would train silently.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute block activations in backward: less memory, a third more time
        dim, (rows, columns) = config.dim, config.grid
        self.patch_embed = nn.Conv2d(1, dim, config.patch, config.stride)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + rows * columns, dim))  # cls, dist, grid row by row
        rates = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, config.n_classes))
        self.apply(_init)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.dist_token, std=0.02)
        with torch.no_grad():  # learning where a patch lies from 2% noise costs a small data set many epochs
            self.pos_embed[0, 2:] = sincos_grid(rows, columns, dim)

    def forward(self, x, noise=None, kept=None):
        return self.head(self.features(x, noise, kept))

    def features(self, x, noise=None, kept=None):
        """(B, n_mels, frames) -> (B, dim): the mean of the normed cls and distillation tokens."""
        self._check(x)
        if noise is None and self.training and self.config.drop_path > 0:
            noise = torch.rand(len(x), 2 * self.config.depth, device=x.device)
        x = self.patch_embed(x.unsqueeze(1))  # (B, dim, rows, columns)
        positions = self._positions(*x.shape[2:])
        x = x.flatten(2).transpose(1, 2)  # (B, rows * columns, dim)
        tokens = torch.cat([self.cls_token, self.dist_token], dim=1).expand(x.shape[0], -1, -1)
        x = torch.cat([tokens, x], dim=1) + positions
        if kept is not None:
            x = torch.cat([x[:, :2], x[:, 2:].gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))], dim=1)
        for i, block in enumerate(self.blocks):
            part = None if noise is None else noise[:, 2 * i:2 * i + 2]
            first = 2 if i == len(self.blocks) - 1 else None  # of the last block only cls and dist are used further
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, part, first, use_reentrant=False)
            else:
                x = block(x, part, first)
        return self.norm(x).mean(dim=1)

    def _check(self, x):
        n_mels, patch = self.config.n_mels, self.config.patch
        if x.dim() != 3 or x.shape[1] != n_mels:
            swapped = x.dim() == 3 and x.shape[2] == n_mels
            raise ValueError(f"AST takes (B, {n_mels}, frames), got {tuple(x.shape)}"
                             + (": the axes are swapped, pass x.transpose(1, 2)" if swapped else ""))
        if x.shape[2] < patch:
            raise ValueError(f"AST needs at least {patch} frames, got {tuple(x.shape)}: use longer clips")

    def _positions(self, rows, columns):
        """Position embedding (1, 2 + rows * columns, dim) for the real input, from the grid parameter."""
        return fit_positions(self.pos_embed, self.config.grid, (rows, columns))

    def set_grid(self, columns):
        """Give the position grid so many columns, where it has others; its values, now zeros, are to be loaded."""
        if columns != self.config.time_patches:
            self.config = replace(self.config, time_patches=columns)
            rows, columns = self.config.grid
            self.pos_embed = nn.Parameter(self.pos_embed.new_zeros(1, 2 + rows * columns, self.config.dim))


def fit_positions(positions, grid, wanted):
    """Position embedding (1, 2 + R * C, dim) of a grid (R, C), fitted to a grid `wanted`: (rows, columns)."""
    if tuple(grid) == tuple(wanted):
        return positions
    fitted = fit_grid(positions[:, 2:].transpose(1, 2).unflatten(2, grid), *wanted)  # (1, dim, rows, columns)
    return torch.cat([positions[:, :2], fitted.flatten(2).transpose(1, 2)], dim=1)


def fit_grid(grid, rows, columns):
    """Fit a position grid (1, dim, R, C) to (1, dim, rows, columns) as the authors do it: cut around the
    centre where it is too long, interpolate bilinearly where it is too short; time first."""
    R, C = grid.shape[2:]
    if columns < C:
        first = C // 2 - columns // 2
        grid = grid[..., first:first + columns]
    elif columns > C:
        grid = F.interpolate(grid.float(), (R, columns), mode="bilinear")
    if rows < R:
        first = R // 2 - rows // 2
        grid = grid[:, :, first:first + rows]
    elif rows > R:
        grid = F.interpolate(grid.float(), (rows, columns), mode="bilinear")
    return grid


def sincos_grid(rows, columns, dim):
    """(rows * columns, dim) sines and cosines of the row and of the column (X. Chen et al., "An Empirical
    Study of Training Self-Supervised Vision Transformers", 2021), the start from random weights."""
    quarter = max(1, dim // 4)
    rate = 10000.0 ** -(torch.arange(quarter) / quarter)
    angles = [torch.arange(n, dtype=torch.float32)[:, None] * rate for n in (rows, columns)]
    row, column = (torch.cat([a.sin(), a.cos()], dim=1) for a in angles)  # (n, 2 * quarter)
    grid = torch.cat([row[:, None].expand(-1, columns, -1), column[None].expand(rows, -1, -1)], dim=2)
    return F.pad(grid, (0, max(0, dim - grid.shape[2])))[..., :dim].reshape(rows * columns, dim)


def _init(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
