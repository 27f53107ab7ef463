"""
What every Llama-style decoder has: RMSNorm, rotary positions, the SwiGLU block. Nothing here is of
the paper; model.py fills the parameters (GSA.init_weights).
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), 1e-6)


class RoPE(nn.Module):
    """Rotary position embedding (RoFormer): the two halves of a head, rotated in pairs."""

    def __init__(self, block_size, width, base):
        super().__init__()
        # float64: a float32 angle of 1e5 would be wrong by 4e-3
        speed = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)  # (width/2,)
        pos = torch.arange(block_size, dtype=torch.float64)
        angle = pos[:, None, None] * speed  # (block_size, 1, width/2)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, x, pos):
        """x (B, T, H, width) at positions pos (1 or B, T)."""
        cos = self.cos[pos].to(x.dtype)  # (1 or B, T, 1, width/2)
        sin = self.sin[pos].to(x.dtype)
        x1, x2 = x.chunk(2, -1)  # (B, T, H, width/2)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


class MLP(nn.Module):
    """SwiGLU, hidden width 8C/3 rounded up to a multiple of 32."""

    def __init__(self, n_embd):
        super().__init__()
        hidden = (8 * n_embd + 95) // 96 * 32
        self.gate_up = nn.Linear(n_embd, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)
