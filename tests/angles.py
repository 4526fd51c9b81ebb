"""What makes the angles of a call: arguments for tensors of shape (..., 33, H, 64)."""

from collections.abc import Callable

import torch
from reference import random_positions, random_values
from torch import Tensor

#: The arguments of ``apply`` or ``apply_cos_sin``, on a device, by what they are.
ANGLES: dict[str, Callable[[str], dict[str, Tensor]]] = {
    "positions": lambda device: {"positions": random_positions((33, 1), device=device)},
    "positions and inv_freq": lambda device: {
        "positions": random_positions((33, 1), torch.float32, device, low=0, high=99),
        "inv_freq": random_values((32,), torch.float32, device, seed=3),
    },
    "positions of axes and inv_freq": lambda device: {
        "positions": random_positions((2, 33, 1), torch.float32, device, low=0, high=99),
        "inv_freq": random_values((2, 24), torch.float32, device, seed=3),
    },
    "tables": lambda device: {
        "cos": random_values((33, 1, 32), torch.float32, device, seed=3),
        "sin": random_values((33, 1, 32), torch.float32, device, seed=4),
    },
    "tables for each of 8 heads": lambda device: {
        "cos": random_values((33, 8, 31), torch.bfloat16, device, seed=3),
        "sin": random_values((33, 8, 31), torch.bfloat16, device, seed=4),
    },
    "full-width tables": lambda device: {
        "cos": random_values((33, 1, 64), device=device, seed=3),
        "sin": random_values((33, 1, 64), device=device, seed=4),
    },
    "rows of tables": lambda device: {
        "cos": random_values((50, 32), device=device, seed=3),
        "sin": random_values((50, 32), device=device, seed=4),
        "positions": random_positions((33, 1), device=device, low=0, high=50),
    },
}
