"""The common protocol: one set of measures for every method, real or simulated always said."""

from lightlib.compare import Comparison, compare
from lightlib.cost import Flops, Latency, Size, Throughput, flops, latency, size, throughput
from lightlib.explain import Explanation, explain
from lightlib.machine import Roofline, roofline
from lightlib.quality import Divergence, divergence, perplexity

__all__ = [
    "Comparison", "Divergence", "Explanation", "Flops", "Latency", "Roofline", "Size", "Throughput",
    "compare", "divergence", "explain", "flops", "latency", "perplexity", "roofline", "size", "throughput",
]  # fmt: skip
