"""A step's images and prompts: which records they are, and all that is made of them before a model sees them.

A picture is read, decoded and shrunk, then made into what the engine takes and what the learner takes. Threads do it
where somebody said in time that it will be needed; else it is done when it is asked for. The values are the same, and
so are the errors, which are raised where the picture is used.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from balcap_mega.config.schema import DataConfig
from balcap_mega.data.files import ImageFileDataset, Reading
from balcap_mega.data.records import CaptionDataset, CaptionRecord
from balcap_mega.models.processing import ProcessedPrompt
from balcap_mega.rollout.replicas import Replica
from balcap_mega.rollout.requests import RenderedPrompt, RolloutRequest
from balcap_mega.training.ahead import Ahead, Due, Job
from balcap_mega.training.recent import RecentRecords, picture_bytes

NOW: Due = ()

Render = Callable[[int, CaptionRecord], RenderedPrompt]
Process = Callable[[CaptionRecord], ProcessedPrompt]


@dataclass(frozen=True)
class Pictures:
    """What all prompts of a rank share: who prepares their pictures, and the decoded ones that were used last."""

    ahead: Ahead
    recent: RecentRecords

    @classmethod
    def of(cls, config: DataConfig) -> "Pictures":
        """Half of the memory for pictures that wait to be used, half for those that may be needed again."""
        half = config.ahead_gib * 2**30 / 2
        return cls(Ahead(config.threads, half), RecentRecords(half))


class Prompts(Sequence[CaptionRecord]):
    """The records of a step, or of a whole dataset, by their place in it.

    One thread asks; only those of `pictures` work besides. Without `pictures` everything is done when it is asked for,
    and every record is kept.
    """

    def __init__(self, dataset: CaptionDataset, indices: Sequence[int], pictures: Pictures | None = None):
        self.dataset, self.indices = dataset, tuple(indices)
        self._pictures = pictures or Pictures(Ahead(0, 0), RecentRecords(float("inf")))
        self._rendering: dict[int, deque[_Batch]] = defaultdict(deque)
        self._processing: dict[int, deque[_Batch]] = defaultdict(deque)

    def __getitem__(self, place: int) -> CaptionRecord:
        record = self._recent(place)
        return self._keep(place, *_read(self.dataset, [self.indices[place]])) if record is None else record

    def __len__(self) -> int:
        return len(self.indices)

    def prepare_requests(self, replica: Replica, render: Render, due: Due = NOW) -> None:
        """Begin to render an engine's share, which `of` will ask for."""

        def make(place: int, record: CaptionRecord) -> RenderedPrompt:
            return render(self.indices[place], record)

        self._begin(replica.shard(range(len(self))), make, self._rendering, due)

    def of(self, replica: Replica, render: Render | None = None) -> Iterator[RolloutRequest]:
        """The share that an engine generates, one after the other as they are ready; rendered, if `render` is given."""
        earlier: Counter[int] = Counter()
        repeats = []
        for index in self.indices:
            repeats.append(earlier[index])
            earlier[index] += 1
        places = replica.shard(range(len(self)))
        if render is not None and not all(self._rendering[place] for place in places):
            self.prepare_requests(replica, render)
        for place in places:
            rendered = None if render is None else self._take(place, self._rendering)
            yield RolloutRequest(place, self[place], self.indices[place], repeats[place], rendered)

    def prepare_pictures(self, places: Sequence[int], process: Process, due: Due = NOW) -> None:
        """Begin to process pictures for the learner; `processed` will ask once for each."""
        self._begin(places, lambda place, record: process(record), self._processing, due)

    def processed(self, place: int, process: Process) -> ProcessedPrompt:
        """One prompt for the learner; a new object each time, whose pixels live as long as it is used."""
        if not self._processing[place]:
            self.prepare_pictures([place], process)
        return self._take(place, self._processing)

    def expects_picture(self, place: int) -> bool:
        """Whether what `processed` will ask for is begun."""
        return bool(self._processing[place])

    def close(self) -> None:
        """Give up what was begun and not asked for."""
        for batches in (*self._rendering.values(), *self._processing.values()):
            while batches:
                batches.popleft().drop()

    def _begin(
        self,
        places: Sequence[int],
        make: Callable[[int, CaptionRecord], Any],
        into: dict[int, deque["_Batch"]],
        due: Due,
    ) -> None:
        most = self.dataset.together if isinstance(self.dataset, ImageFileDataset) else 1
        together = max(min(most, len(places) // max(self._pictures.ahead.threads, 1)), 1)  # no thread without work
        for start in range(0, len(places), together):
            chunk = places[start : start + together]
            job = self._pictures.ahead.begin(lambda chunk=chunk: self._made(chunk, make), _size, due)
            batch = _Batch(chunk, job)
            for place in chunk:
                into[place].append(batch)

    def _made(self, places: Sequence[int], make: Callable[[int, CaptionRecord], Any]) -> list[tuple[Reading, Any]]:
        """In whatever thread: read the records that are not here, and make of each what is wanted."""
        here = {place: record for place in places if (record := self._recent(place)) is not None}
        missing = [place for place in places if place not in here]
        readings = {place: Reading(record, {}) for place, record in here.items()}
        readings |= zip(missing, _read(self.dataset, [self.indices[place] for place in missing]), strict=True)
        return [
            (reading, None if reading.record is None else make(place, reading.record))
            for place, reading in ((place, readings[place]) for place in places)
        ]

    def _take(self, place: int, made: dict[int, deque["_Batch"]]) -> Any:
        reading, value = made[place].popleft().take(place)
        self._keep(place, reading)
        return value

    def _recent(self, place: int) -> CaptionRecord | None:
        return self._pictures.recent.get((id(self.dataset), self.indices[place]))

    def _keep(self, place: int, reading: Reading) -> CaptionRecord:
        """From here on the record is the step's: now its unreadable pictures count."""
        record = self.dataset.take(reading) if isinstance(self.dataset, ImageFileDataset) else reading.record
        self._pictures.recent.add((id(self.dataset), self.indices[place]), record)
        return record  # pyright: ignore[reportReturnType] (a reading lacks its record only if it is of image files)


class _Batch:
    """Some places whose pictures are decoded together; each is taken once."""

    def __init__(self, places: Sequence[int], job: Job[list[tuple[Reading, Any]]]):
        self._places, self._job = places, job
        self._made: dict[int, tuple[Reading, Any]] | None = None

    def take(self, place: int) -> tuple[Reading, Any]:
        if self._made is None:
            self._made = dict(zip(self._places, self._job.take(), strict=True))
        return self._made.pop(place)

    def drop(self) -> None:
        if self._made is None:
            self._made = {}
            self._job.drop()


def _read(dataset: CaptionDataset, indices: Sequence[int]) -> list[Reading]:
    """Records that do not count yet, with the digest of their pixels."""
    if isinstance(dataset, ImageFileDataset):
        readings = dataset.read(indices)
    else:
        readings = [Reading(dataset[index], {}) for index in indices]
    for reading in readings:
        if reading.record is not None:
            _ = reading.record.pixels  # computed here, and kept
    return readings


def _size(made: Sequence[tuple[Reading, Any]]) -> int:
    """Bytes of pictures and of what was made of them."""
    pictures = sum(picture_bytes(reading.record) for reading, _ in made if reading.record is not None)
    return pictures + sum(value.nbytes for _, value in made if value is not None)
