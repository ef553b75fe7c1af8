"""The run folder: where everything a run leaves behind stands."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunFolder:
    """Paths under `output_dir`; files are written to a temporary name and renamed, so that none is ever half there."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def initial(self) -> Path:
        """The random checkpoint of a `model.tiny` run."""
        return self.root / "initial"

    @property
    def warmed_up(self) -> Path:
        """The Hugging Face checkpoint that the supervised warm-up ends with."""
        return self.root / "warmed_up"

    @property
    def checkpoints(self) -> Path:
        """Megatron distributed checkpoints, one folder a step."""
        return self.root / "checkpoints"

    @property
    def policy(self) -> Path:
        """The trained policy as a Hugging Face checkpoint."""
        return self.root / "policy"

    @property
    def before(self) -> Path:
        """Held-out captions before reinforcement learning."""
        return self.root / "held_out_before.json"

    @property
    def after(self) -> Path:
        return self.root / "held_out_after.json"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
