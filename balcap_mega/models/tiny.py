"""A small random checkpoint of a real architecture, in the Hugging Face layout, for the CPU quickstart and the tests.

Nothing downstream knows that it is small: it is imported, trained, exported and served like any other checkpoint.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from balcap_mega.models.families import FAMILIES
from balcap_mega.models.families.interface import TinySpec


def write_tiny_checkpoint(
    folder: str | Path,
    family: str,
    texts: Iterable[str],
    *,
    seed: int = 0,
    vocab_size: int = 1024,
    text_config: dict[str, Any] | None = None,
    vision_config: dict[str, Any] | None = None,
    tie_word_embeddings: bool = False,
) -> Path:
    """Write config, weights (float32 safetensors), tokenizer and processor of a randomly initialised policy.

    `family` is one of `FAMILIES`. `texts` trains the byte-level BPE tokenizer (any text can be encoded); its vocabulary
    has at most `vocab_size` entries. `text_config` and `vision_config` override single keys of the family's sizes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spec = TinySpec(folder, list(texts), vocab_size, tie_word_embeddings, text_config or {}, vision_config or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        FAMILIES[family].write_tiny(spec)
    return folder
