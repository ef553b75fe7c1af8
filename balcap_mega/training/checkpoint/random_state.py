"""Saves the random generators of one rank to a safetensors file: Python's, NumPy's, PyTorch's, CUDA's, Megatron's."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from safetensors import safe_open
from safetensors.torch import save

_TRACKER = "megatron."


def save_random_state(path: Path) -> None:
    """Write the state of all generators. Call it inside `Platform.megatron`, which redirects Megatron's on a CPU."""
    python_version, python_words, python_gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    name, words, position, has_gauss, gauss = numpy_state
    tensors = {
        "python": torch.tensor(python_words, dtype=torch.int64),
        "numpy": torch.from_numpy(words.astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    tensors |= {_TRACKER + key: state.clone() for key, state in get_cuda_rng_tracker().get_states().items()}
    scalars = {"python": [python_version, python_gauss], "numpy": [name, position, has_gauss, gauss]}
    # Python writes the file: what a full disk refuses is then an OSError like any other.
    path.write_bytes(save(tensors, metadata={"scalars": json.dumps(scalars)}))


def load_random_state(path: Path) -> None:
    """Restore the state of every generator from a file of `save_random_state`."""
    with safe_open(path, framework="pt") as opened:
        scalars = json.loads(opened.metadata()["scalars"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not iterable itself)
    python_version, python_gauss = scalars["python"]
    random.setstate((python_version, tuple(tensors["python"].tolist()), python_gauss))
    name, *rest = scalars["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), *rest))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"])
    states = {key.removeprefix(_TRACKER): state for key, state in tensors.items() if key.startswith(_TRACKER)}
    get_cuda_rng_tracker().set_states(states)
