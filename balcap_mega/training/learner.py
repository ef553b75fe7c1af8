"""The learner: this rank's shards of the policy, their optimizer, and the three things done with them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from balcap_mega.algorithm.lm_head import HeadShard, fused_cross_entropy, fused_policy_loss, token_logprobs
from balcap_mega.algorithm.metrics import PolicyMetrics
from balcap_mega.algorithm.policy_loss import PolicyLoss, policy_loss
from balcap_mega.config.schema import AlgorithmConfig, ModelConfig, OptimizerConfig, ParallelConfig
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.fusions import check_fusions
from balcap_mega.models.huggingface.files import check_checkpoint
from balcap_mega.models.huggingface.transfer import import_checkpoint
from balcap_mega.models.policy import build_policy
from balcap_mega.parallel.gradients import build_optimizer, wrap_ddp
from balcap_mega.parallel.offload import OptimizerOffload, shares_device
from balcap_mega.parallel.platform import Platform, calls_megatron
from balcap_mega.parallel.progress import progress
from balcap_mega.parallel.schedule import Loss, run_schedule
from balcap_mega.parallel.transfer import to_device
from balcap_mega.parallel.weights import OtherWeights
from balcap_mega.training.microbatch import Microbatch


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer step: the loss and its metrics over all ranks, and the gradient norm before clipping.

    applied: False for one that was left out: weights and optimizer are then as they were before
    old_logprobs: of this rank's microbatches, [R] float32 each, under the policy that the step began with; nothing on
        other pipeline stages than the last, and of a supervised update
    """

    loss: float
    gradient_norm: float
    metrics: dict[str, float]
    applied: bool = True
    old_logprobs: Sequence[Tensor] = field(default=(), repr=False, compare=False)

    @property
    def finite(self) -> bool:
        """Of the loss, the gradients, and the trainer's and the engine's logprobs."""
        return all(map(math.isfinite, (self.loss, self.gradient_norm, self.metrics["engine_logprob_difference"])))


def must_be_finite(result: UpdateResult) -> bool:
    """Accepts an update, or raises FloatingPointError."""
    if not result.finite:
        raise FloatingPointError(
            f"loss {result.loss}, gradient norm {result.gradient_norm} are not finite; the weights were left as they "
            "were, and the last checkpoint is good"
        )
    return True


class Learner:
    """Scores response tokens with the policy (`logprobs`) and moves it (`update`, `supervised_update`).

    Weights come from a Hugging Face folder; `initialize_parallel` must have run. Every method is a collective: all
    ranks call it, each with its data-parallel share of microbatches, the same on all ranks of a model-parallel group.
    """

    def __init__(
        self,
        folder: str | Path,
        model: ModelConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        algorithm: AlgorithmConfig,
        platform: Platform,
        *,
        temperature: float = 1.0,
        max_response_length: int | None = None,
    ):
        self.architecture = Architecture.from_folder(folder)
        self.algorithm = algorithm
        self.platform = platform
        self.temperature = temperature
        self.max_response_length = max_response_length
        check_checkpoint(folder, self.architecture)  # before anything is allocated
        check_fusions(model, optimizer)
        self.policy = build_policy(self.architecture, model, parallel, platform)
        import_checkpoint(folder, self.policy)
        self.model = wrap_ddp(self.policy, parallel, optimizer.main_grads_dtype)
        self.optimizer = build_optimizer(self.model, optimizer, parallel)
        self.optimizer_offload = OptimizerOffload(self.model, self.optimizer, platform.device)
        self.shares_device = shares_device(parallel, platform)
        self.reference = OtherWeights(self.policy) if algorithm.kl_weight > 0 else None

    def logprobs(self, microbatches: Sequence[Microbatch]) -> list[Tensor]:
        """Each microbatch's [R] float32 logprobs of its targets; on other pipeline stages than the last, empty ones."""
        return self._score(microbatches) or [torch.empty(0)] * len(microbatches)

    def reference_logprobs(self, minibatches: Sequence[Sequence[Microbatch]]) -> list[list[Tensor]]:
        """The same of each minibatch's microbatches under the weights the learner started from, swapped in once."""
        with self.reference.in_place():
            return [self.logprobs(minibatch) for minibatch in minibatches]

    def update(
        self, microbatches: Sequence[Microbatch], accept: Callable[[UpdateResult], bool] = must_be_finite
    ) -> UpdateResult:
        """One optimizer step on the clipped policy objective, applied where `accept` says so, on all ranks alike."""

        def objective(hidden: Tensor, weight: Tensor, microbatch: Microbatch) -> PolicyLoss:
            head, tokens = self._head(weight), microbatch.tokens.to(self.platform.device)
            if self.algorithm.fused:
                return fused_policy_loss(
                    hidden, tokens, head, self.algorithm, max_response_length=self.max_response_length
                )
            logprobs, entropy = token_logprobs(hidden, tokens.targets, head)
            return policy_loss(
                logprobs, tokens, self.algorithm, entropy=entropy, max_response_length=self.max_response_length
            )

        return self._step(microbatches, objective, accept)

    def supervised_update(self, microbatches: Sequence[Microbatch], learning_rate: float) -> UpdateResult:
        """One optimizer step on the cross-entropy of the targets."""
        self.set_learning_rate(learning_rate)
        return self._step(
            microbatches,
            lambda hidden, weight, microbatch: fused_cross_entropy(
                hidden, to_device(microbatch.tokens.targets, hidden.device), self._head(weight)
            ),
        )

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def offload(self) -> None:
        """Free what only updates need: gradients, and the optimizer's state, which waits in host memory.

        Until `onload` the weights can be read and scored with, but not updated, saved or loaded. Nothing where
        `parallel.offload` says never, or when it is done already.
        """
        if self.shares_device:
            self.optimizer_offload.offload()

    def onload(self) -> None:
        """Take it back, bit for bit as it was."""
        self.optimizer_offload.onload()

    def _head(self, weight: Tensor) -> HeadShard:
        return HeadShard(
            weight,
            self.architecture.vocab_size,
            parallel_state.get_tensor_model_parallel_group(),
            temperature=self.temperature,
        )

    def _forward(self, objective: Callable, loss: Loss) -> Callable[[nn.Module, Microbatch], tuple[Any, Loss]]:
        """The schedule's forward step: `objective(hidden, head weight, microbatch)`, and `loss` of what it returns."""

        def forward(model: nn.Module, microbatch: Microbatch) -> tuple[Any, Loss]:
            progress.mark()
            row, device = microbatch.row, self.platform.device
            output = model(
                row.tokens[None],
                to_device(row.position_ids[:, None], device),
                row.segments,
                to_device(row.hidden_rows, device),
                lambda hidden, weight: objective(hidden, weight, microbatch),
                images=microbatch.images,
            )
            return output, loss

        return forward

    def _score(self, microbatches: Sequence[Microbatch]) -> list[Tensor]:
        def objective(hidden: Tensor, weight: Tensor, microbatch: Microbatch) -> Tensor:
            targets = to_device(microbatch.tokens.targets, hidden.device)
            return token_logprobs(hidden, targets, self._head(weight))[0]

        def keep(logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return logprobs.sum(), torch.tensor(1, dtype=torch.int32), logprobs

        self.model.eval()
        return run_schedule(self.model, microbatches, self._forward(objective, keep), forward_only=True)

    @calls_megatron
    def _step(
        self,
        microbatches: Sequence[Microbatch],
        objective: Callable[..., PolicyLoss],
        accept: Callable[[UpdateResult], bool] = must_be_finite,
    ) -> UpdateResult:
        def loss(result: PolicyLoss) -> tuple[Tensor, Tensor, PolicyLoss]:
            return result.loss_sum, result.normaliser.int(), result

        if self.optimizer_offload.is_offloaded:
            raise RuntimeError("the optimizer is offloaded: call onload() before an update")
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = run_schedule(self.model, microbatches, self._forward(objective, loss))
        loss_value, metrics = self._reduce(losses)
        self.optimizer.prepare_grads()
        old = [loss.old_logprobs for loss in losses if loss.old_logprobs is not None]
        result = UpdateResult(loss_value, float(self.optimizer.get_grad_norm()), metrics, old_logprobs=old)
        if not accept(result):
            return replace(result, applied=False)
        self.optimizer.step()
        return result

    def _reduce(self, results: Sequence[PolicyLoss]) -> tuple[float, dict[str, float]]:
        """Sum over microbatches and data-parallel ranks, known to every rank: each last stage's first rank counts."""
        metrics = PolicyMetrics.zero(self.platform.device)
        totals = torch.zeros(2, device=self.platform.device)
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            for result in results:
                metrics = metrics + result.metrics
                totals += torch.stack([result.loss_sum.detach(), result.normaliser.to(totals)])
        torch.distributed.all_reduce(totals)
        return (totals[0] / totals[1]).item(), metrics.all_reduced().summary()
