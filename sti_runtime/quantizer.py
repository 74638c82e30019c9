"""What a bundle says of how its shards were quantized; agents read it, so nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Refinement = Literal["none", "l1", "converged"]
"""After the first centroids: nothing; until the L1 error stops falling; until no centroid moves."""


@dataclass(frozen=True, slots=True)
class Quantizer:
    """What decides the bytes below 32 bits, besides the weights; the defaults are GOBO's.

    ``outlier_log_density_milli``: 1000 × the threshold in nats. In standard deviations it therefore
    depends on the matrix's scale.
    """

    refinement: Refinement = "l1"
    outlier_log_density_milli: int = -4000


GOBO = Quantizer()
