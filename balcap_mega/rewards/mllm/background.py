"""Coroutines that run beside synchronous code: one event loop on one thread, and work shared by all who ask for it."""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundLoop:
    """An asyncio event loop on a daemon thread."""

    def __init__(self, name: str):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `coroutine` on the loop from any other thread."""
        if self._loop.is_closed():
            coroutine.close()
            raise RuntimeError("this background loop is closed")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self, last: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Cancel what still runs, run `last()` on the loop, stop the thread. A second call does nothing."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop).result()
        asyncio.run_coroutine_threadsafe(last(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @staticmethod
    async def _cancel_all() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


class SharedWork:
    """Awaitables computed once per key: the first asker starts the work, the others wait for the same result.

    Keeps the `limit` latest results; a failure is handed to those who wait and then forgotten, so the next asker
    tries again. One asker's cancellation leaves the work, and the others, alone.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._tasks: OrderedDict[Hashable, asyncio.Task] = OrderedDict()

    async def get(self, key: Hashable, start: Callable[[], Awaitable[T]]) -> T:
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.ensure_future(start())
            task.add_done_callback(lambda done: self._forget_failure(key, done))
            while len(self._tasks) > self._limit:
                self._tasks.popitem(last=False)
        else:
            self._tasks.move_to_end(key)
        return await asyncio.shield(task)

    def _forget_failure(self, key: Hashable, task: asyncio.Task) -> None:
        if (task.cancelled() or task.exception() is not None) and self._tasks.get(key) is task:
            del self._tasks[key]
