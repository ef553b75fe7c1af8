"""Ends a run that hangs: every rank prints its stacks, then one line says where each rank is, and for how long.

A thread on each rank writes the rank's position (`parallel.progress`) to the job's rendezvous store. It needs neither
collectives nor the main thread, which may be stuck in native code. It ends the run when

- a rank is silent: its heartbeat stopped because the process died or was stopped, or because its machine was lost.
  Each rank checks only the next one, so that a heartbeat costs the same in a job of any size;
- the run is stuck: no rank has finished any piece of work for a while. Ranks that wait for a slow rank do not make a
  run stuck, since the slow rank still finishes work.

Collectives have a longer timeout (`collective_timeout`). NCCL's ends in an abort that names no rank, and is left for
the case that this thread is gone as well.
"""

import faulthandler
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import groupby
from typing import Any

import torch

from balcap_mega.cli import tell_launcher
from balcap_mega.config.schema import RunConfig
from balcap_mega.errors import UserError
from balcap_mega.parallel.progress import progress
from balcap_mega.training.judging import patience

LONGEST_INTERVAL = 5.0  # seconds between heartbeats
BEATS = 12  # at least, within `parallel.silence_seconds`
JUDGE_MARGIN = 30.0  # seconds by which a judge that never answers is named before the run counts as stuck


class Stalled(UserError):
    """This rank waited in vain for another rank, or for its own engine."""


def stuck_seconds(config: RunConfig) -> float:
    """Seconds without progress after which a run counts as stuck.

    That is `parallel.timeout_seconds`, or longer where the judge's endpoint or a reward of one's own may take longer.
    """
    waits = config.rewards.judge == "mllm" or any(not each.judged for each in config.rewards.components.values())
    judging = patience(config.rewards) + JUDGE_MARGIN if waits else 0.0
    return max(config.parallel.timeout_seconds, judging)


def collective_timeout(config: RunConfig) -> float:
    """The timeout of collectives in seconds: long enough that the watchdog ends a stuck run first."""
    return 2 * stuck_seconds(config)


@dataclass(frozen=True)
class Heartbeat:
    """What a rank writes to the store.

    number:   of this heartbeat, from 1
    phase, step, position: `Position.phase`, `.step` and `.number`
    seconds:  since the rank entered that position
    ended:    None while the rank runs, "" once it is done, else the error it ended with
    """

    number: int
    phase: str
    step: int | None
    position: int
    seconds: float
    ended: str | None = None

    @property
    def place(self) -> str:
        return self.phase if self.step is None else f"{self.phase} of step {self.step + 1}"


class Watchdog:
    """Watches the ranks while its block runs. Every rank enters it, after torch.distributed is initialised.

    If the block raises because another rank is gone, or because one of our timeouts ran out, the exception becomes a
    `Stalled` that says where this rank was and where the others are. Other exceptions get a note of this rank's place.

    stuck_seconds:   how long no rank may finish anything
    silence_seconds: how long a rank may go without a heartbeat
    """

    def __init__(self, *, stuck_seconds: float, silence_seconds: float):
        self.stuck_seconds, self.silence_seconds = stuck_seconds, silence_seconds
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.interval = min(LONGEST_INTERVAL, silence_seconds / BEATS)
        # A connection of its own: a wait on the job's would hold this one up.
        job: Any = torch.distributed.distributed_c10d._get_default_store()
        self._store = torch.distributed.PrefixStore("watchdog", job.clone())
        self._store.set_timeout(timedelta(seconds=silence_seconds))
        self._number = 0
        self._neighbour = (self.rank + 1) % self.world
        self._last_beat = self._answered = time.monotonic()
        self._seen: dict[str, tuple[bytes, float]] = {}  # by key, its value and since when it has been the same
        self._marks = -1
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if not faulthandler.is_enabled():
            faulthandler.enable(sys.__stderr__)  # what aborts in native code shows its stacks too
        self._tell()
        self._thread.start()
        return self

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        stalled = None if error is None else self._stalled(error)
        self._leaving.set()
        self._thread.join(timeout=self.interval)
        faulthandler.cancel_dump_traceback_later()
        with suppress(RuntimeError):  # the store may have gone with its launcher
            self._tell(ended="" if error is None else f"{type(error).__name__}: {_first_line(error)}")
        if stalled is not None:
            raise stalled from error
        if error is not None:
            error.add_note(f"rank {self.rank} was in {self._heartbeat().place}")

    def _watch(self) -> None:
        while not self._leaving.wait(self.interval):
            # Should this thread not come back, then because native code keeps Python from running: show where.
            faulthandler.dump_traceback_later(self.silence_seconds, file=sys.__stderr__)
            now = time.monotonic()
            if now - self._last_beat > self.silence_seconds / 2:  # this process was stopped itself, and heard nobody
                self._seen.clear()
            self._last_beat = now
            try:
                self._beat()
                self._answered = now
            except RuntimeError as error:
                if now - self._answered > self.silence_seconds:
                    self._end(f"the job's rendezvous store is gone, with its launcher or machine: {_first_line(error)}")

    def _beat(self) -> None:
        self._tell()
        if self._store.check(["verdict"]):
            self._end(self._store.get("verdict").decode())
        if self._unchanged_for("moved") > self.stuck_seconds:
            self._declare(
                f"no rank has finished anything for {self.stuck_seconds:g} s: {account(self._heartbeats())} — the "
                "first one holds the others up, its stacks show where; if it was only slow, raise "
                "parallel.timeout_seconds"
            )
        while self._neighbour != self.rank and self._is_done(self._neighbour):
            self._neighbour = (self._neighbour + 1) % self.world
        if self._neighbour != self.rank and self._unchanged_for(str(self._neighbour)) > self.silence_seconds:
            beats = self._heartbeats()
            silent = beats.pop(self._neighbour, None)
            last = "it never was" if silent is None else _last(silent)
            self._declare(
                f"rank {self._neighbour} has not been heard of for {self.silence_seconds:g} s, {last}; "
                f"{account(beats)} — look at that rank's log and machine; the same command goes on from the last "
                "checkpoint"
            )

    def _heartbeat(self, ended: str | None = None) -> Heartbeat:
        position = progress.position
        seconds = time.monotonic() - position.since
        return Heartbeat(self._number, position.phase, position.step, position.number, seconds, ended)

    def _tell(self, ended: str | None = None) -> None:
        self._number += 1
        self._store.set(str(self.rank), json.dumps(asdict(self._heartbeat(ended))))
        if self._marks != progress.marks:
            self._marks = progress.marks
            self._store.set("moved", f"{self.rank} {self._marks}")

    def _unchanged_for(self, key: str) -> float:
        """Seconds since this rank saw the key's value change."""
        value = self._store.get(key) if self._store.check([key]) else b""
        now = time.monotonic()
        if key not in self._seen or self._seen[key][0] != value:
            self._seen[key] = value, now
        return now - self._seen[key][1]

    def _heartbeats(self) -> dict[int, Heartbeat]:
        """The last heartbeat of each rank that has sent any."""
        ranks = [rank for rank in range(self.world) if self._store.check([str(rank)])]
        return {rank: Heartbeat(**json.loads(self._store.get(str(rank)))) for rank in ranks}

    def _is_done(self, rank: int) -> bool:
        return self._store.check([str(rank)]) and json.loads(self._store.get(str(rank)))["ended"] == ""

    def _declare(self, verdict: str) -> None:
        """End the run with `verdict`, or with the verdict of another rank that was faster."""
        agreed = self._store.compare_set("verdict", "", verdict).decode()
        self._end(agreed, speaks=agreed == verdict)

    def _end(self, verdict: str, speaks: bool = False) -> None:
        """Print this process's stacks, give the other ranks time to do so, and exit with status 1."""
        faulthandler.cancel_dump_traceback_later()
        print(f"rank {self.rank} in {self._heartbeat().place}:\n{_stacks()}", file=sys.stderr, flush=True)
        time.sleep(3 * self.interval)
        message = f"error: {verdict}"
        if speaks:
            print(message, file=sys.stderr, flush=True)
        tell_launcher(message)
        os._exit(1)

    def _stalled(self, error: BaseException) -> Stalled | None:
        """The `Stalled` for an error that ended a wait, with the ranks' places; None for any other error."""
        if isinstance(error, UserError):
            return None
        for cause in _causes(error):
            if isinstance(cause, torch.distributed.DistError) or "gloo/transport" in str(cause):
                return Stalled(
                    f"rank {self.rank} lost contact in {self._heartbeat().place}: {_first_line(cause)}"
                    + self._whereabouts(),
                    remedy="look at that rank's log; the same command goes on from the last checkpoint",
                )
            if isinstance(cause, TimeoutError):
                return Stalled(
                    f"rank {self.rank} gave up in {self._heartbeat().place}: {_first_line(error)}{self._whereabouts()}",
                    remedy="raise that timeout if it was only slow; the same command goes on from the last checkpoint",
                )
        return None

    def _whereabouts(self) -> str:
        """Which other ranks are gone, that is, missed two heartbeats, and where the rest are."""
        try:
            before = self._heartbeats()
            time.sleep(2.5 * self.interval)
            beats = {rank: beat for rank, beat in self._heartbeats().items() if rank != self.rank}
        except RuntimeError:
            return "; the rendezvous store is gone too"
        gone = {rank: beat for rank, beat in beats.items() if beat.number == before[rank].number}
        there = {rank: beat for rank, beat in beats.items() if rank not in gone}
        parts = [f"rank {rank} is gone, {_last(beat)}" for rank, beat in gone.items()]
        return "".join(f"; {part}" for part in ([*parts, account(there)] if there else parts))


def account(beats: Mapping[int, Heartbeat]) -> str:
    """Where each rank is and for how long, the furthest behind first; ranks at one place are named together."""

    def place(rank: int) -> tuple[int, str]:
        return beats[rank].position, beats[rank].place

    parts = []
    for (_, name), group in groupby(sorted(beats, key=lambda rank: (place(rank), rank)), key=place):
        ranks = list(group)
        parts.append(f"{name_ranks(ranks)} in {name} for {max(beats[rank].seconds for rank in ranks):.0f} s")
    return "; ".join(parts)


def name_ranks(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`; `ranks` ascend."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"ranks {text}" if len(runs) > 1 or len(runs[0]) > 1 else f"rank {text}"


def _last(beat: Heartbeat) -> str:
    """Where a rank was last, as part of a sentence."""
    return f"last in {beat.place}" + (f", where it ended with {beat.ended}" if beat.ended else "")


def _causes(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _first_line(error: BaseException) -> str:
    """The first line of an error's text, without gloo's source line before it and its advice behind it."""
    text = re.sub(r"^\[[^]]*\.(cc|cpp|h):\d+\] ", "", str(error)).partition(". This is typically")[0]
    lines = text.strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _stacks() -> str:
    """The Python stacks of all threads as one text, so that lines of ranks that print at the same time do not mix."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()
