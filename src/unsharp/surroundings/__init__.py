"""What lies around a network's weights: sharpness, curvature, loss surface, ways to other networks, distances."""

from unsharp.surroundings.findings import Findings
from unsharp.surroundings.measure import PARTS, Share, Surroundings

__all__ = ["PARTS", "Findings", "Share", "Surroundings"]
