"""A step's prompts: which records they are, and each record read once."""

from collections import Counter
from collections.abc import Sequence

from balcap_mega.data.records import CaptionDataset, CaptionRecord
from balcap_mega.rollout.engine import RolloutRequest
from balcap_mega.rollout.replicas import Replica


class Prompts(Sequence[CaptionRecord]):
    """The records of a step by their place in it, each read when first asked for, once on this rank."""

    def __init__(self, dataset: CaptionDataset, indices: Sequence[int]):
        self.dataset, self.indices = dataset, tuple(indices)
        self._records: dict[int, CaptionRecord] = {}

    def __getitem__(self, place: int) -> CaptionRecord:
        index = self.indices[place]
        if index not in self._records:
            self._records[index] = self.dataset[index]
        return self._records[index]

    def __len__(self) -> int:
        return len(self.indices)

    def of(self, replica: Replica) -> list[RolloutRequest]:
        """The share of them that an engine generates."""
        earlier: Counter[int] = Counter()
        repeats = []
        for index in self.indices:
            repeats.append(earlier[index])
            earlier[index] += 1
        places = replica.shard(range(len(self)))
        return [RolloutRequest(place, self[place], self.indices[place], repeats[place]) for place in places]
