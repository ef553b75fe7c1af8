"""Folders with the config.json of a released checkpoint."""

import json
from pathlib import Path
from typing import Any

from balcap_mega.models.released import RELEASED


def write_config(folder: Path, name: str, **overrides: Any) -> Path:
    """`folder` with the config.json of a released checkpoint, single keys replaced; a dict updates a section."""
    config = json.loads(json.dumps(RELEASED[name]))
    for key, value in overrides.items():
        if isinstance(value, dict):
            config.setdefault(key, {}).update(value)
        else:
            config[key] = value
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
