"""One way to seed everything that draws random numbers."""

import hashlib
import random

import numpy as np
import torch


def seed_all(*parts: int) -> None:
    """Seed the global generators of torch, numpy and random by a hash of `parts`.

    A hash and no sum: (seed 1, experience 0) and (seed 0, experience 1) must differ in every draw.
    """
    digest = hashlib.sha256(" ".join(str(int(part)) for part in parts).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    np.random.seed(int.from_bytes(digest[8:12], "big"))
    random.seed(int.from_bytes(digest[12:20], "big"))
