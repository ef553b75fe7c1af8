"""Writes every step's record beside the training, which it neither waits for nor fails with."""

import logging
import threading
from pathlib import Path

from balcap_mega.config.schema import RecordConfig
from balcap_mega.training.record.format import FinishedCaptions, step_file, steps_on_record, write_step

logger = logging.getLogger(__name__)

WAITING = 4  # steps that may wait for the disk; what is beyond is left out
PATIENCE = 60.0  # seconds


class Recorder:
    """`recorder(captions)` hands a step over to a thread, which writes it to `folder`; a failure there is a warning.

    A step is handed over before its updates, so that one that they kill is on record, and again after them.
    enabled: False on all ranks but the first, which has everybody's captions
    """

    def __init__(self, folder: Path, config: RecordConfig, *, enabled: bool) -> None:
        self.folder, self.config = folder, config
        self.enabled = enabled and config.keep != "none"
        self._changed = threading.Condition()
        self._waiting: dict[int, FinishedCaptions] = {}  # by step; one that is being written is still there
        if self.enabled:
            threading.Thread(target=self._run, name="rollouts", daemon=True).start()

    def go_on(self, first_step: int) -> None:
        """Drop what an earlier process wrote about steps that are taken again, after `first_step` of them."""
        if not self.enabled:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for step in steps_on_record(self.folder):
                if step > first_step:
                    step_file(self.folder, step).unlink()
        except OSError as error:
            logger.warning("old records of steps stay in %s: %s", self.folder, error)

    def __call__(self, captions: FinishedCaptions) -> None:
        """Returns at once. What waits of the same step gives way."""
        if not self.enabled:
            return
        with self._changed:
            room = captions.step in self._waiting or len(self._waiting) < WAITING
            if room:
                self._waiting[captions.step] = captions
                self._changed.notify_all()
        if not room:
            logger.warning("step %d is not on record, or not its end: %s is too slow", captions.step, self.folder)

    def finish(self, patience: float = PATIENCE) -> None:
        """Wait until all is written, at most so many seconds; a warning where it is not."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._waiting, patience):
                logger.warning("%d steps are not on record yet after %.0f s", len(self._waiting), patience)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                step, captions = next(iter(self._waiting.items()))
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_step(self.folder, captions.recorded(self.config.keep))
                self._make_room(captions.step)
            except Exception as error:  # the training does not need it
                logger.warning("step %d is not on record: %s: %s", captions.step, type(error).__name__, error)
            with self._changed:
                if self._waiting[step] is captions:  # and not what came of it meanwhile
                    del self._waiting[step]
                self._changed.notify_all()

    def _make_room(self, newest: int) -> None:
        """Delete the oldest steps past the bound; the newest stays."""
        files = [step_file(self.folder, step) for step in steps_on_record(self.folder)]
        excess = sum(file.stat().st_size for file in files) - self.config.max_gib * 2**30
        for file in files:
            if excess <= 0 or file == step_file(self.folder, newest):
                return
            excess -= file.stat().st_size
            file.unlink()
