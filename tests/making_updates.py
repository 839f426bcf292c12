"""Random ΔW for tests, and other factors of the same."""

import torch

from lora_lab.adapters.lowrank import LowRank


def random_update(seed, rows=30, columns=20, rank=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    B = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    return LowRank(A.to(dtype), B.to(dtype))


def gauged(update, seed):
    """The same ΔW from other factors: B R and R⁻¹ A."""
    rank = update.rank
    R = torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    R = R + 3 * torch.eye(rank, dtype=torch.float64)
    return LowRank(torch.linalg.solve(R, update.A), update.B @ R, update.shape)
