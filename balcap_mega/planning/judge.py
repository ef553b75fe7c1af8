"""How fast a judge is: the tokens of its protocol, at the rates that rollouts are planned with."""

import json
import tempfile
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import NamedTuple

from balcap_mega.config.schema import JudgeQuestion
from balcap_mega.errors import UserError
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.flops import attention_forward, language_parameters, vision_forward
from balcap_mega.models.released import RELEASED
from balcap_mega.planning.generation import Generation, cache_bytes_per_token
from balcap_mega.planning.hardware import BF16, Cluster
from balcap_mega.planning.workload import Workload


class Tokens(NamedTuple):
    """Tokens of one request or several. computed: those of the prompt that no prefix cache has; cached: the others."""

    written: float
    computed: float
    cached: float


# What the protocol asks about a caption of 162.5 tokens, the image left out: means over the captions of
# benchmarks/judge_captions.py, as tests/test_planning_judge.py counts them.
FIXTURE_CAPTION_TOKENS = 162.5
PROTOCOL: dict[JudgeQuestion, Tokens] = {
    "split": Tokens(169.0, 183.0, 295.5),
    "verify": Tokens(106.5, 396.3, 326.7),
    "cover": Tokens(70.0, 227.7, 469.8),
    "language": Tokens(18.0, 188.0, 295.5),
    "answer": Tokens(6.0, 100.1, 341.3),
}
SEES_THE_IMAGE: JudgeQuestion = "verify"

AT_ONCE = 256  # requests in one server's batch: what an address gets as the recipes are configured
MEMORY_SHARE = 0.9  # of a GPU, that vLLM's server takes
WORKSPACE_SHARE = 0.05  # of a GPU, that it needs beside weights and cache


@dataclass(frozen=True)
class JudgeServers:
    """`gpus` GPUs that serve one model, in bf16, as servers of `tensor` ranks each."""

    model: str
    architecture: Architecture
    cluster: Cluster
    gpus: int
    tensor: int

    @classmethod
    def of(cls, model: str, gpus: int, cluster: Cluster, workload: Workload) -> "JudgeServers":
        """The fastest way to cut that model over the GPUs of one node each.

        The judge stands elsewhere: its nodes have eight GPUs, where those of `cluster` have fewer.
        Raises UserError for a model that is not a released one, or that does not fit.
        """
        architecture = released_architecture(model)
        cluster = replace(cluster, gpus_per_node=max(cluster.gpus_per_node, Cluster.gpus_per_node))
        sizes = [size for size in (1, 2, 4, 8, 16) if size <= min(gpus, cluster.gpus_per_node) and gpus % size == 0]
        servers = [cls(model, architecture, cluster, gpus, size) for size in sizes]
        fitting = [each for each in servers if each.cache_tokens > AT_ONCE]
        if not fitting:
            raise UserError(
                f"{model} does not fit {gpus} judge GPUs of {cluster.gpu.memory / 2**30:.0f} GiB",
                remedy="give the judge more (--judge-gpus)",
            )
        return max(fitting, key=lambda each: each.captions_per_second(workload))

    @property
    def servers(self) -> int:
        return self.gpus // self.tensor

    @property
    def cache_tokens(self) -> float:
        """Tokens whose keys and values one server holds."""
        weights = BF16 * language_parameters(self.architecture) / self.tensor
        room = (MEMORY_SHARE - WORKSPACE_SHARE) * self.cluster.gpu.memory - weights
        return room / cache_bytes_per_token(self.architecture, self.tensor)

    def captions_per_second(self, workload: Workload) -> float:
        """What all servers sustain together, each with a full batch, of a workload that asks the judge."""
        written, computed, _ = tokens(workload)
        efficiency, gpu = self.cluster.efficiency, self.cluster.gpu
        requests, image = len(workload.judge_requests), _image_tokens(workload)
        flops = 2 * computed * language_parameters(self.architecture)
        flops += vision_forward(self.architecture, image) / workload.group
        prefill = flops / (gpu.matmul * efficiency.gemm)
        pairs = (image + computed / requests) * computed / requests
        prefill += self.architecture.num_layers * attention_forward(self.architecture, pairs) / gpu.attention
        fixture = _protocol(workload)
        context = (fixture.computed + fixture.cached + written + image) / requests
        batch = max(min(AT_ONCE, self.cache_tokens / context), 1)
        engine = Generation(self.architecture, self.cluster, self.tensor, BF16, self.cache_tokens)
        decode = written * engine.step_seconds(batch, context) / batch
        return self.servers / (prefill / self.tensor + decode)

    def gpus_to_hide(self, workload: Workload, seconds: float) -> int:
        """How many GPUs, in servers of this size, judge the step's captions within `seconds`."""
        each = self.captions_per_second(workload) / self.servers
        return ceil(workload.captions / seconds / each) * self.tensor


def tokens(workload: Workload) -> Tokens:
    """Of one caption, over all requests about it; the image's are computed once for the group's captions."""
    longer = workload.caption_tokens / FIXTURE_CAPTION_TOKENS
    written, computed, cached = (longer * count for count in _protocol(workload))
    image = _image_tokens(workload)
    shared = image / workload.group
    return Tokens(written, computed + shared, cached + image - shared)


def _protocol(workload: Workload) -> Tokens:
    """Of the text in all requests about a caption of the fixture."""
    asked = [PROTOCOL[question] for question in workload.judge_requests]
    return Tokens(*(sum(counts) for counts in zip(Tokens(0.0, 0.0, 0.0), *asked)))


def _image_tokens(workload: Workload) -> int:
    """Of the image in the requests about one caption."""
    return workload.image_tokens if SEES_THE_IMAGE in workload.judge_requests else 0


def released_architecture(model: str) -> Architecture:
    """The released model of that name; a quantised one counts as the model that it was made from."""
    name = Path(model).name.lower()
    for released, sizes in RELEASED.items():
        if name.startswith(released.lower()):
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
                return Architecture.from_folder(folder)
    raise UserError(
        f"the judge {model!r} is no released model whose size is known here",
        remedy="give what it was measured to do (--judge-measured FILE or --captions-per-second), or --judge-model "
        f"with one of its size: {', '.join(RELEASED)}",
    )
