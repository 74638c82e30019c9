"""What a bundle says of how its shards were quantized; agents read it, so nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Refinement = Literal["none", "l1", "converged"]
"""After the first centroids: nothing; until the L1 error stops falling; until no centroid moves."""

CodecName = Literal["gobo", "fisher"]
"""GOBO's centroids, or centroids weighted by the Fisher information of each weight (``codecs``)."""


@dataclass(frozen=True, slots=True)
class Quantizer:
    """What decides the bytes below 32 bits, besides the weights; the defaults are GOBO's.

    ``outlier_log_density_milli``: 1000 × the threshold in nats. In standard deviations it therefore
    depends on the matrix's scale. The codec ``fisher`` keeps as many weights exactly as ``gobo`` would,
    but not the same ones, and always carries its refinement to the end.
    """

    refinement: Refinement = "l1"
    outlier_log_density_milli: int = -4000
    codec: CodecName = "gobo"


SENSITIVE_PPM = 100_000
"""Of the outliers of the codec ``fisher``: the share chosen as most sensitive, not as farthest. SqueezeLLM
keeps 0.05 % of the weights for the one reason and 0.4 % for the other."""

GOBO = Quantizer()
FISHER = Quantizer("converged", codec="fisher")
