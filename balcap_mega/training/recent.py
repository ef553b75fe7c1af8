"""Decoded pictures that may be asked for again, the ones used last, within a bound on memory."""

import threading
from collections import OrderedDict
from collections.abc import Hashable

from balcap_mega.data.records import CaptionRecord


class RecentRecords:
    """Records with their pictures. The last one added is always there; of the others as many as `most_bytes` holds."""

    def __init__(self, most_bytes: float):
        self.most_bytes = most_bytes
        self._records: OrderedDict[Hashable, CaptionRecord] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> CaptionRecord | None:
        with self._lock:
            if key in self._records:
                self._records.move_to_end(key)
            return self._records.get(key)

    def add(self, key: Hashable, record: CaptionRecord) -> None:
        with self._lock:
            if key in self._records:
                self._held -= picture_bytes(self._records.pop(key))
            self._records[key] = record
            self._held += picture_bytes(record)
            while self._held > self.most_bytes and len(self._records) > 1:
                self._held -= picture_bytes(self._records.popitem(last=False)[1])


def picture_bytes(record: CaptionRecord) -> int:
    """Of the decoded picture, RGB."""
    width, height = record.image.size
    return 3 * width * height
