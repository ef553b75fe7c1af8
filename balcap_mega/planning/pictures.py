"""Pictures: what reading, decoding, shrinking and processing them costs a rank, and what of it a step does not hide.

Threads prepare them while devices work (`training.prompts`): what the engine is asked about next between two rollouts,
and what the learner encodes, with `rollout.ahead`, during a whole step, without it while the last captions are judged.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from balcap_mega.config.schema import RunConfig
from balcap_mega.models.architecture import Architecture
from balcap_mega.planning.hardware import FP32, GIB
from balcap_mega.planning.workload import Rows, Workload

PHOTOGRAPH = 2.0
"""Megapixels of a picture on the disk. Assumed."""

# Seconds on one core for each megapixel of the file, or of what is left of it; `benchmarks/images.py` measures them.
DECODE = 9e-3
SHRINK = 15e-3
PROCESS = 27e-3


@dataclass(frozen=True)
class PictureWork:
    """A step's pictures on the rank that has the most.

    requests: that its engine is asked about; encoded: that its learner's tower encodes
    read:     seconds on one core to read, decode and shrink one; process: to make what a model takes
    nbytes:   of one, decoded and processed
    room:     bytes that prepared pictures may have
    """

    requests: float
    encoded: float
    read: float
    process: float
    nbytes: float
    threads: int
    room: float

    @classmethod
    def of(
        cls, config: RunConfig, architecture: Architecture, workload: Workload, rows: Rows, engines: int
    ) -> "PictureWork":
        most = PHOTOGRAPH if config.data.max_pixels is None else min(config.data.max_pixels / 1e6, PHOTOGRAPH)
        shrinks = SHRINK * PHOTOGRAPH if most < PHOTOGRAPH else 0.0
        return cls(
            requests=-(-workload.prompts // engines),
            encoded=workload.updates * rows.total.images / config.parallel.tensor,
            read=DECODE * PHOTOGRAPH + shrinks,
            process=PROCESS * most,
            nbytes=3e6 * most + pixel_bytes(architecture, workload.image_tokens),
            threads=config.data.threads,
            room=config.data.ahead_gib * GIB / 2,
        )

    @property
    def seconds(self) -> float:
        """On one core."""
        return (self.requests + self.encoded) * (self.read + self.process)

    @property
    def prepared(self) -> float:
        """Bytes that all of them have at once, prepared."""
        return (self.requests + self.encoded) * self.nbytes

    @property
    def held(self) -> float:
        """Bytes of host memory: of prepared pictures, and of decoded ones that are kept."""
        return min(self.prepared, self.room) + self.room

    def left(self, seconds: Mapping[str, float], ahead: int) -> float:
        """Seconds of a step of `seconds` by phase in which it waits for pictures."""
        if not self.threads:
            return self.seconds
        one, step = self.read + self.process, sum(seconds.values())
        rendering = self.requests * max(self.process, one / self.threads)  # by one thread at a time
        encoding = self.encoded * one / self.threads
        late = max(rendering - (step - seconds["rollout"]), rendering + encoding - step, 0.0)
        late += 0.0 if ahead else max(encoding - seconds["swap"] - seconds["rewards"], 0.0)
        # What finds no room is prepared as others are taken.
        unprepared = max(1 - self.room / self.prepared, 0.0)
        return late + unprepared * (rendering + encoding)


def pixel_bytes(architecture: Architecture, image_tokens: int) -> float:
    """Of one image as its tower takes it: float32, of three colours."""
    vision = architecture.config.vision_config
    patches = image_tokens * getattr(vision, "spatial_merge_size", 1) ** 2
    return FP32 * 3 * patches * vision.patch_size**2 * getattr(vision, "temporal_patch_size", 1)
