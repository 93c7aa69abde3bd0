"""The part of MPS that is not CLIP: picture tokens looking at the words of the prompt that matter.

Parameter names are those of the original checkpoint, where every block is wrapped once more (``.fn.``). Attention has
many query heads and one key and value head (Shazeer 2019); feed-forward parts run beside it on the same input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class LookAtWords(nn.Module):
    """x + attention(x -> words) + feed_forward(x), after one LayerNorm of x."""

    def __init__(self, dim: int, heads: int, head_width: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_width, bias=False)
        self.to_kv = nn.Linear(dim, 2 * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, dim, bias=False)
        self.ff = nn.Sequential(nn.Linear(dim, 2 * inner, bias=False), SwiGLU(), nn.Linear(inner, dim, bias=False))

    def forward(self, x: Tensor, words: Tensor, seen: Tensor) -> Tensor:
        """x: (b, n, dim); words: (b, m, dim); seen: (b, m), True where a word may be looked at."""
        h = self.norm(x)
        key, value = self.to_kv(words).chunk(2, dim=-1)
        attended = _attend(self.to_q(h), key, value, self.heads, seen[:, None, None, :])
        return x + self.to_out(attended) + self.ff(h)


class LookAtSelf(nn.Module):
    """x + attention(x -> x) + feed_forward(x), after one LayerNorm of x, positions by rotation."""

    def __init__(self, dim: int, heads: int, head_width: int, inner: int) -> None:
        super().__init__()
        self.heads, self.parts = heads, (heads * head_width, head_width, head_width, 2 * inner)
        self.norm = nn.LayerNorm(dim)
        self.fused_attn_ff_proj = nn.Linear(dim, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(heads * head_width, dim, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(inner, dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, inner = self.fused_attn_ff_proj(self.norm(x)).split(self.parts, dim=-1)
        query = query.unflatten(-1, (self.heads, -1))
        query, key = _rotate(query.transpose(1, 2)).transpose(1, 2).flatten(-2), _rotate(key)
        return x + self.attn_out(_attend(query, key, value, self.heads)) + self.ff_out(inner)


class Fusion(nn.Module):
    """Alternating blocks; the first picture token that comes out stands for the picture.

    Args:
        dim: width of the embeddings. layers: pairs of blocks. heads, head_width, inner: sizes of the blocks.
    """

    def __init__(self, dim: int, layers: int, heads: int, head_width: int, inner: int) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(
            nn.ModuleList(block(dim, heads, head_width, inner) for block in (LookAtWords, LookAtSelf))
            for _ in range(layers)
        )

    def forward(self, picture: Tensor, words: Tensor, seen: Tensor) -> Tensor:
        """picture: (b, n, dim); words: (b, m, dim); seen: (b, m) bool. Returns (b, dim)."""
        for look_at_words, look_at_self in self.layers:
            picture = look_at_self(look_at_words(picture, words, seen))
        return picture[:, 0]


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """query: (b, n, heads * w); key, value: (b, m, w), shared by all heads. Returns (b, n, heads * w)."""
    query = query.unflatten(-1, (heads, -1)).transpose(1, 2)
    key, value = (part[:, None].expand(-1, heads, -1, -1) for part in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(-2)


def _rotate(x: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) over the last two dimensions (positions, width), halves paired, base 10000."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * rates
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
