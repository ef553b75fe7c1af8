"""Seconds of a step's passes over packed rows: through the pipeline, then gradients, optimizer and weights."""

from collections.abc import Callable
from dataclasses import dataclass

from balcap_mega.config.schema import OptimizerConfig
from balcap_mega.planning.compute import Compute
from balcap_mega.planning.hardware import BF16
from balcap_mega.planning.optimizer import OptimizerBytes
from balcap_mega.planning.workload import Rows, Work

FLOAT32 = OptimizerBytes.of(OptimizerConfig())


@dataclass(frozen=True)
class Passes:
    """Times of the passes of one layout.

    layers:           of each pipeline stage
    data_size:        data-parallel ranks
    parameters:       trained, on the largest stage's rank
    optimizer:        bytes of one parameter's gradient and state
    fused_gradients:  weight gradients are added to the main gradients by their GEMMs
    hides_data:       reductions over data-parallel ranks run behind the backward pass, gathers behind the forward pass
    bucket:           parameters that are reduced at once, behind the backward pass of the last row; None: all
    chunks:           model chunks a stage holds, interleaved; 1 is plain 1F1B
    speed:            of a tuned pretraining step's, `Efficiency.rows` where rows are of changing length
    """

    compute: Compute
    layers: tuple[int, ...]
    data_size: int
    parameters: float
    optimizer: OptimizerBytes = FLOAT32
    fused_gradients: bool = False
    hides_data: bool = False
    bucket: int | None = None
    chunks: int = 1
    speed: float = 1.0
    distributed_optimizer: bool = True

    def update(self, rows: Rows) -> dict[str, float]:
        """One optimizer step: "train" and "optimizer"."""
        compute = self.compute

        def stage(work: Work, index: int) -> float:
            seconds = self.layers[index] * (compute.layer_forward(work) + compute.layer_backward(work))
            seconds += compute.embedding(work) * (index == 0)
            return seconds + compute.head(work, 3) * (index == len(self.layers) - 1)

        added = 2 * self.optimizer.gradient + (0 if self.fused_gradients else 2 * BF16)
        train = self._pipelined(rows, stage, hops=2) + compute.moved(rows.count * self.parameters * added)
        shards = self.data_size if self.distributed_optimizer else 1
        traffic = self.optimizer.traffic / shards + 2 * self.optimizer.gradient
        optimizer = compute.moved(self.parameters * traffic)
        return {"train": train, "optimizer": optimizer + (0.0 if self.hides_data else self._exposed(rows))}

    def _exposed(self, rows: Rows) -> float:
        """Gradients reduced and weights gathered, as far as nothing hides it: at least the last bucket's reduction."""
        reduced, gathered = self._ring(self.optimizer.gradient), self._ring(BF16)
        if self.bucket is not None:
            last_row = rows.total * (1 / rows.count)
            backward = max(self.layers) * self.compute.layer_backward(last_row) / self.speed
            reduced = max(reduced - backward, reduced * min(self.bucket / self.parameters, 1.0))
        return reduced + gathered

    def forward(self, rows: Rows) -> float:
        """One pass for logprobs."""
        compute = self.compute

        def stage(work: Work, index: int) -> float:
            seconds = self.layers[index] * compute.layer_forward(work) + compute.embedding(work) * (index == 0)
            return seconds + compute.head(work, 1) * (index == len(self.layers) - 1)

        return self._pipelined(rows, stage, hops=1)

    def _pipelined(self, rows: Rows, stage: Callable[[Work, int], float], hops: int) -> float:
        """The slowest stage is busy with every row; the others are waited for once, a chunk each, as the pipeline
        fills and drains."""
        stages = range(len(self.layers))
        mean = rows.total * (1 / rows.count)
        busy = [stage(rows.total, index) / self.speed for index in stages]
        filling = (sum(busy) - max(busy)) / rows.count
        return max(busy) + filling / self.chunks + rows.count * hops * self._hop(mean)

    def _hop(self, work: Work) -> float:
        """Hidden states of a row to the next stage."""
        if len(self.layers) == 1:
            return 0.0
        compute = self.compute
        size = BF16 * work.tokens * compute.architecture.hidden_size / (compute.tensor if compute.sequence else 1)
        return size / compute.cluster.bandwidth(len(self.layers), stride=compute.tensor * self.data_size)

    def _ring(self, size: int) -> float:
        """A reduce-scatter or an all-gather of `size` bytes a parameter over the data-parallel ranks."""
        ranks = self.data_size
        if ranks == 1:
            return 0.0
        bandwidth = self.compute.cluster.bandwidth(ranks, stride=self.compute.tensor)
        return size * self.parameters * (ranks - 1) / ranks / bandwidth
