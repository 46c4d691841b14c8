"""The Audio Spectrogram Transformer: (B, n_mels, frames) -> logits (B, n_classes).

Y. Gong, Y.-A. Chung, J. Glass, "AST: Audio Spectrogram Transformer", Interspeech 2021. Parameters
are laid out as in timm's distilled DeiT, which the authors built on. So their weights load key by
key.
"""
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

N_EXTRA_TOKENS = 2  # the class and the distillation token, before the patches


@dataclass(frozen=True)
class ASTConfig:
    """The architecture of an AST. `ASTConfig(**config.to_dict())` gives the same one again."""
    n_classes: int
    dim: int = 768
    depth: int = 12
    heads: int = 12
    n_mels: int = 128
    patch: int = 16
    stride: int = 10
    time_patches: int = 101  # columns of the position parameter, which is fitted to each input
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
    def base(cls, n_classes: int, **changes) -> "ASTConfig":
        return cls(n_classes, **changes)

    @classmethod
    def small(cls, n_classes: int, **changes) -> "ASTConfig":
        return cls(n_classes, **{"dim": 384, "heads": 6, **changes})

    @classmethod
    def tiny(cls, n_classes: int, **changes) -> "ASTConfig":
        return cls(n_classes, **{"dim": 192, "heads": 3, **changes})

    def to_dict(self) -> dict:
        return asdict(self)

    def patches(self, frames: int) -> tuple[int, int]:
        """(rows, columns) of patches in an input of `frames` frames: frequency, then time."""
        rows = (self.n_mels - self.patch) // self.stride + 1
        return rows, (frames - self.patch) // self.stride + 1

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the position parameter."""
        return self.patches(0)[0], self.time_patches


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, n_queries: int | None = None, return_weights: bool = False):
        """Attend from the first `n_queries` tokens (default: all) to all tokens.

        x (B, N, dim) -> (B, n_queries, dim). With `return_weights` -> (that, the attention weights
        (B, heads, n_queries, N)): slower and larger, since the fused kernel never stores them.
        """
        q, k, v = self._queries_keys_values(x, n_queries)
        if return_weights:
            weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)
            heads = weights @ v
        else:
            weights = None
            heads = F.scaled_dot_product_attention(q, k, v)  # (B, heads, n_queries, dim / heads)
        out = self.proj(heads.transpose(1, 2).flatten(2))
        return (out, weights) if return_weights else out

    def _queries_keys_values(self, x, n_queries):
        """q (B, heads, n_queries, dim / heads), k and v (B, heads, N, dim / heads)."""
        B, N, dim = x.shape
        size = dim // self.heads
        if n_queries is None:
            return self.qkv(x).view(B, N, 3, self.heads, size).permute(2, 0, 3, 1, 4)
        q_weight, kv_weight = self.qkv.weight.split((dim, 2 * dim))
        q_bias, kv_bias = self.qkv.bias.split((dim, 2 * dim))
        q = F.linear(x[:, :n_queries], q_weight, q_bias)
        q = q.view(B, n_queries, self.heads, size).transpose(1, 2)
        kv = F.linear(x, kv_weight, kv_bias)
        k, v = kv.view(B, N, 2, self.heads, size).permute(2, 0, 3, 1, 4)
        return q, k, v


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block with drop-path per clip.

    n_outputs: compute only that many first tokens; they still attend to all. None: all tokens.
    """

    def __init__(self, config: ASTConfig, drop_path: float, n_outputs: int | None = None):
        super().__init__()
        self.drop_path = drop_path
        self.n_outputs = n_outputs
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = Attention(config.dim, config.heads)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = MLP(config.dim, int(config.dim * config.mlp_ratio))

    def forward(self, x: Tensor, drop_noise: Tensor | None = None, return_attention: bool = False):
        """x (B, N, dim), drop_noise (B, 2) in [0, 1) or None -> (B, n_outputs, dim).

        With `return_attention` -> (that, the attention weights (B, heads, n_outputs, N)).
        """
        branch = self.attn(self.norm1(x), self.n_outputs, return_attention)
        if return_attention:
            branch, attention = branch
        x = x[:, :self.n_outputs] + self._drop(branch, drop_noise, 0)
        x = x + self._drop(self.mlp(self.norm2(x)), drop_noise, 1)
        return (x, attention) if return_attention else x

    def _drop(self, branch, drop_noise, i):
        """Zero a branch for some clips and scale it up for the others; its mean stays the same."""
        if drop_noise is None or self.drop_path == 0:
            return branch
        scale = (drop_noise[:, i] >= self.drop_path).to(branch.dtype) / (1 - self.drop_path)
        return branch * scale[:, None, None]


class AST(nn.Module):
    """Audio Spectrogram Transformer: x (B, n_mels, frames) -> logits (B, n_classes).

    drop_noise: (B, 2 * depth), uniform in [0, 1): decides which branches drop-path drops in a clip.
        If the caller derives it from the clip, a clip is treated alike in any batch, on any rank.
        Default in training: torch's own random numbers.
    patch_ids: (B, k), the patches of each clip that take part, numbered row by row from 0.
        Default: all.

    Raises ValueError for any other shape of x. Swapped axes give the same number of tokens
    (12 x 101 = 101 x 12), so without the check they would train silently.
    """

    def __init__(self, config: ASTConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute activations: less memory, about a third more time
        dim, (rows, columns) = config.dim, config.grid
        self.patch_embed = nn.Conv2d(1, dim, config.patch, config.stride)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
        # cls, dist, then the grid row by row
        self.pos_embed = nn.Parameter(torch.zeros(1, N_EXTRA_TOKENS + rows * columns, dim))
        rates = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        if config.depth:
            self.blocks[-1].n_outputs = N_EXTRA_TOKENS  # the head reads nothing else
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, config.n_classes))
        self.apply(_init)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.dist_token, std=0.02)
        with torch.no_grad():
            # Small data sets take many epochs to learn positions from random values.
            self.pos_embed[0, N_EXTRA_TOKENS:] = sincos_grid(rows, columns, dim)

    def forward(self, x: Tensor, drop_noise: Tensor | None = None,
                patch_ids: Tensor | None = None) -> Tensor:
        return self.head(self.features(x, drop_noise, patch_ids))

    def features(self, x: Tensor, drop_noise: Tensor | None = None,
                 patch_ids: Tensor | None = None) -> Tensor:
        """(B, n_mels, frames) -> (B, dim), what the head reads."""
        x = self.embed(x, patch_ids)
        if drop_noise is None and self.training and self.config.drop_path > 0:
            drop_noise = torch.rand(len(x), 2 * self.config.depth, device=x.device)
        for i, block in enumerate(self.blocks):
            noise = None if drop_noise is None else drop_noise[:, 2 * i:2 * i + 2]
            if self.checkpointing and torch.is_grad_enabled():
                # A block draws no random numbers, so torch need not restore their state.
                x = checkpoint(block, x, noise, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, noise)
        return self.pool(x)

    def embed(self, x: Tensor, patch_ids: Tensor | None = None) -> Tensor:
        """(B, n_mels, frames) -> (B, N, dim), with positions: cls, dist, patches row by row."""
        self._check_shape(x)
        x = self._embed_patches(x.unsqueeze(1))  # (B, dim, rows, columns)
        positions = fit_positions(self.pos_embed, self.config.grid, x.shape[2:])
        x = x.flatten(2).transpose(1, 2)  # (B, rows * columns, dim)
        extra = torch.cat([self.cls_token, self.dist_token], dim=1).expand(x.shape[0], -1, -1)
        x = torch.cat([extra, x], dim=1) + positions
        if patch_ids is not None:
            index = patch_ids[:, :, None].expand(-1, -1, x.shape[2])
            x = torch.cat([x[:, :N_EXTRA_TOKENS], x[:, N_EXTRA_TOKENS:].gather(1, index)], dim=1)
        return x

    def _embed_patches(self, x):
        """(B, 1, n_mels, frames) -> (B, dim, rows, columns)."""
        _, columns = self.config.patches(x.shape[3])
        if columns > 1 or x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return self.patch_embed(x)
        # For one column oneDNN's bf16 convolution on CPUs with AMX gives wrong values or NaNs
        # (torch 2.11, more than four rows), so this one is computed in float32.
        with torch.autocast("cpu", enabled=False):
            return self.patch_embed(x.float())

    def pool(self, x: Tensor) -> Tensor:
        """Output of the last block (B, 2, dim) -> (B, dim): mean of the normalised tokens."""
        return self.norm(x).mean(dim=1)

    def _check_shape(self, x):
        n_mels, patch = self.config.n_mels, self.config.patch
        if x.dim() != 3 or x.shape[1] != n_mels:
            message = f"AST takes (B, {n_mels}, frames), got {tuple(x.shape)}"
            if x.dim() == 3 and x.shape[2] == n_mels:
                message += ": the axes are swapped, pass x.transpose(1, 2)"
            raise ValueError(message)
        if x.shape[2] < patch:
            raise ValueError(f"AST needs at least {patch} frames, got {tuple(x.shape)}: "
                             "use longer clips")

    def set_grid(self, columns: int) -> None:
        """Give the position parameter that many columns. New ones are zeros: load values next."""
        if columns != self.config.time_patches:
            self.config = replace(self.config, time_patches=columns)
            rows, columns = self.config.grid
            shape = (1, N_EXTRA_TOKENS + rows * columns, self.config.dim)
            self.pos_embed = nn.Parameter(self.pos_embed.new_zeros(shape))


def fit_positions(positions: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Fit position embeddings (1, 2 + R * C, dim) of a grid (R, C) to a grid `target`."""
    if tuple(grid) == tuple(target):
        return positions
    patches = positions[:, N_EXTRA_TOKENS:].transpose(1, 2).unflatten(2, grid)  # (1, dim, R, C)
    fitted = fit_grid(patches, *target).flatten(2).transpose(1, 2)
    return torch.cat([positions[:, :N_EXTRA_TOKENS], fitted], dim=1)


def fit_grid(grid: Tensor, rows: int, columns: int) -> Tensor:
    """Fit a position grid (1, dim, R, C) to (1, dim, rows, columns), as the AST authors do.

    An axis that is too long is cut around its centre. One that is too short is interpolated
    bilinearly. Time comes first.
    """
    R, C = grid.shape[2:]
    if columns < C:
        start = C // 2 - columns // 2
        grid = grid[..., start:start + columns]
    elif columns > C:
        grid = F.interpolate(grid.float(), (R, columns), mode="bilinear")
    if rows < R:
        start = R // 2 - rows // 2
        grid = grid[:, :, start:start + rows]
    elif rows > R:
        grid = F.interpolate(grid.float(), (rows, columns), mode="bilinear")
    return grid


def sincos_grid(rows: int, columns: int, dim: int) -> Tensor:
    """Initial position embeddings (rows * columns, dim): sines and cosines of row and column.

    X. Chen et al., "An Empirical Study of Training Self-Supervised Vision Transformers", 2021.
    """
    quarter = max(1, dim // 4)
    rate = 10000.0 ** -(torch.arange(quarter) / quarter)
    row_angle = torch.arange(rows, dtype=torch.float32)[:, None] * rate  # (rows, quarter)
    column_angle = torch.arange(columns, dtype=torch.float32)[:, None] * rate
    row = torch.cat([row_angle.sin(), row_angle.cos()], dim=1)  # (rows, 2 * quarter)
    column = torch.cat([column_angle.sin(), column_angle.cos()], dim=1)
    row = row[:, None].expand(-1, columns, -1)
    column = column[None].expand(rows, -1, -1)
    grid = torch.cat([row, column], dim=2)  # (rows, columns, 4 * quarter)
    missing = max(0, dim - grid.shape[2])  # if dim is not a multiple of 4
    return F.pad(grid, (0, missing))[..., :dim].reshape(rows * columns, dim)


def _init(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
