"""The run folder: where everything a run leaves behind stands."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from balcap_mega.config.preflight import LOCK_FILE, RESOLVED_CONFIG
from balcap_mega.errors import UserError

LOCK_PATIENCE = 30.0
"""Seconds: what an earlier process of the same run, killed a moment ago, may take to be gone."""


@dataclass(frozen=True)
class RunFolder:
    """Paths under `output_dir`; files are written to a temporary name and renamed, so that none is ever half there."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / RESOLVED_CONFIG

    @property
    def inputs(self) -> Path:
        """Digests of the data and of the checkpoint that the run began with."""
        return self.root / "inputs.json"

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
    def rollouts(self) -> Path:
        """Captions and verdicts, one file a step (see `record.format`)."""
        return self.root / "rollouts"

    @property
    def profile(self) -> Path:
        """Traces of `profile.steps`, a rank each (see `observe.profile`)."""
        return self.root / "profile"

    @property
    def before(self) -> Path:
        """Held-out captions before reinforcement learning."""
        return self.root / "held_out_before.json"

    @property
    def after(self) -> Path:
        return self.root / "held_out_after.json"

    def between(self, steps: int) -> Path:
        """The first held-out captions after so many steps."""
        return self.rollouts / f"held_out_{steps:06d}.json"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def changes(self) -> Path:
        """How the captions of the report's images changed over the run."""
        return self.root / "changes.html"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder for this process; the system lets go of it however the process ends.

        Raises UserError while another one holds it: two runs in one folder would mix their checkpoints.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + LOCK_PATIENCE
        with open(self.root / LOCK_FILE, "a+", encoding="utf-8") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        file.seek(0)
                        raise UserError(
                            f"output_dir={self.root} is in use by {file.read().strip()}",
                            remedy="stop that run first, or give another output_dir",
                        ) from None
                    time.sleep(0.2)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield


@contextmanager
def full_disk_is_named(folder: Path) -> Iterator[None]:
    """A disk or a quota that is used up is the user's to mend: UserError instead of OSError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or folder
        raise UserError(
            f"{where} could not be written: {error.strerror}",
            remedy="make room there and start the same command again, it goes on from the last checkpoint",
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder survive a power failure, as `fsync` has a file's content."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
