"""Work that is done before it is asked for: by a few threads, the soonest needed first, within a bound on memory."""

import heapq
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from typing import Generic, TypeVar

Result = TypeVar("Result")

Due = tuple[int, ...]
"""When a result will be asked for; of two, the smaller one is needed sooner."""


class Ahead:
    """Does jobs by `Due`, those of the same in the order in which they were begun.

    threads:    so many jobs run at a time; with 0 each is done when it is asked for
    most_bytes: of results that wait to be asked for. A job starts only where one more result, as large as the largest
                so far, has room beside them and those under way, or where there are none.

    The threads are daemons: a read that a dead disk never answers holds up whoever asks for it, and not the end of the
    process.
    """

    def __init__(self, threads: int, most_bytes: float):
        self.threads, self.most_bytes = threads, most_bytes
        self._waiting: list[tuple[Due, int, Job]] = []  # a heap; jobs that were claimed since are passed over
        self._numbers = count()
        self._workers: list[threading.Thread] = []
        self._running, self._held, self._largest = 0, 0, 0
        self._closed = False
        self._changed = threading.Condition()

    def begin(self, work: Callable[[], Result], size: Callable[[Result], int], due: Due = ()) -> "Job[Result]":
        """Have `work` done; `size(result)` is in bytes."""
        job = Job(self, work, size)
        if not self.threads:
            return job
        with self._changed:
            heapq.heappush(self._waiting, (due, next(self._numbers), job))
            if len(self._workers) < self.threads and not self._closed:
                self._workers.append(threading.Thread(target=self._work, name="ahead", daemon=True))
                self._workers[-1].start()
            self._changed.notify()
        return job

    def close(self, timeout_seconds: float = 10.0) -> None:
        """Start no further job, and wait for those under way, but not for ever. Jobs can be taken all the same."""
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for worker in self._workers:
            worker.join(max(deadline - time.monotonic(), 0))

    def _work(self) -> None:
        """What a thread does."""
        while (job := self._next()) is not None:
            job.run()
            del job  # with its result, which somebody else may have let go

    def _next(self) -> "Job | None":
        """The next job, once there is one and room for it; None at the end."""
        with self._changed:
            while not self._closed:
                while self._waiting and self._waiting[0][2].claimed:
                    heapq.heappop(self._waiting)
                if self._waiting and self._has_room():
                    job = heapq.heappop(self._waiting)[2]
                    job.claimed = True
                    self._running += 1
                    return job
                self._changed.wait()
        return None

    def _has_room(self) -> bool:
        expected = (self._running + 1) * self._largest
        return self._held + expected <= self.most_bytes or not (self._held or self._running)

    def claim(self, job: "Job") -> bool:
        """Whether no thread had begun the job; none will then."""
        with self._changed:
            free, job.claimed = not job.claimed, True
            return free

    def done(self, size: int) -> None:
        """A thread's job has ended; its result, of so many bytes, waits."""
        with self._changed:
            self._running -= 1
            self._held += size
            self._largest = max(self._largest, size)
            self._changed.notify_all()

    def taken(self, size: int) -> None:
        """A result of so many bytes is no longer kept here."""
        with self._changed:
            self._held -= size
            self._changed.notify_all()


class Job(Generic[Result]):
    """One piece of work of `Ahead`. claimed: a thread, or who asked for it, does it or has done it."""

    def __init__(self, ahead: Ahead, work: Callable[[], Result], size: Callable[[Result], int]):
        self.claimed = False
        self._ahead, self._work, self._size = ahead, work, size
        self._future: Future[tuple[Result, int]] = Future()

    def take(self) -> Result:
        """What came of it, or the error that it met, raised here and now. Done at once if no thread has begun it.

        To be called once; the result is then the caller's alone.
        """
        if self._ahead.claim(self):
            return self._work()
        result, size = self._future.result()
        del self._future
        self._ahead.taken(size)
        return result

    def drop(self) -> None:
        """Give it up: what no thread has begun is not done, and what comes of it otherwise is let go."""
        if not self._ahead.claim(self):
            self._future.add_done_callback(self._let_go)

    def run(self) -> None:
        """What a thread does."""
        try:
            result = self._work()
            size = self._size(result)
        except BaseException as error:
            self._ahead.done(0)
            self._future.set_exception(error)
        else:
            self._ahead.done(size)
            self._future.set_result((result, size))

    def _let_go(self, future: Future[tuple[Result, int]]) -> None:
        if future.exception() is None:
            self._ahead.taken(future.result()[1])
