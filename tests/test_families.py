"""A family is known to its own module alone, and what its released checkpoints say is accepted or refused by name."""

import re
from pathlib import Path

import pytest

from balcap_mega.models.families import FAMILIES

ROOT = Path(__file__).parent.parent
HOME = ROOT / "balcap_mega" / "models" / "families"


@pytest.mark.parametrize("folder", ["balcap_mega", "launch", "benchmarks"])
def test_no_other_module_knows_a_family(folder):
    """Neither by `model_type` nor by transformers' class names; names of released checkpoints are no such thing."""
    names = re.compile(r"\b(" + "|".join(FAMILIES) + r")\b|Qwen\d\w*VL|Llava[A-Z]|CLIP[A-Z]")
    for path in sorted((ROOT / folder).rglob("*.py")):
        if HOME not in path.parents:
            assert not names.findall(path.read_text(encoding="utf-8")), path
