"""Which CUDA backend is the fastest on which GPU, as `benchmarks/attention.py --record` found."""

import json
from functools import lru_cache
from pathlib import Path

MEASURED = Path(__file__).with_name("measured.json")
"""{GPU's name: {backend: milliseconds}}, forward and backward over the whole grid of the benchmark."""


@lru_cache
def fastest_backend(gpu: str) -> str:
    """For bfloat16 on the GPU of that name; flash where nobody has measured."""
    milliseconds = json.loads(MEASURED.read_text(encoding="utf-8")).get(gpu, {})
    return min(milliseconds, key=milliseconds.get, default="flash")
