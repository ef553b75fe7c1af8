"""One step of BalCapRL: data, rollout, rewards, advantages, packing, policy update, resharding."""

from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from balcap_mega.algorithm.advantages import compute_advantages
from balcap_mega.config.schema import RunConfig
from balcap_mega.data.records import CaptionDataset
from balcap_mega.data.sampler import RecordSampler
from balcap_mega.parallel.agreement import failing_together, from_first_rank
from balcap_mega.parallel.progress import progress
from balcap_mega.rewards.collect import build_reward_batch
from balcap_mega.rewards.components import Rewards
from balcap_mega.rewards.missing import refuse_missing
from balcap_mega.rollout.engine import RolloutEngine
from balcap_mega.rollout.refit import Refit
from balcap_mega.rollout.replicas import Replica
from balcap_mega.training.batches import BatchBuilder, Prompts
from balcap_mega.training.checkpoint.format import latest_checkpoint, load_checkpoint
from balcap_mega.training.checkpoint.writer import CheckpointWriter
from balcap_mega.training.guard.health import Finding, Health, Unhealthy
from balcap_mega.training.guard.signals import StopRequest
from balcap_mega.training.heldout import HeldOutResult, evaluate_held_out
from balcap_mega.training.judging import Judging, patience
from balcap_mega.training.learner import Learner, UpdateResult
from balcap_mega.training.microbatch import Microbatch
from balcap_mega.training.observe.judge_metrics import JudgeMeter, judge_metrics, reasons
from balcap_mega.training.observe.metrics import PhaseTimer
from balcap_mega.training.observe.step_metrics import step_metrics
from balcap_mega.training.record.format import FinishedCaptions
from balcap_mega.training.record.recorder import Recorder
from balcap_mega.training.truncation import without_truncated
from balcap_mega.training.update import learning_rate, update_policy


@dataclass
class Trainer:
    """Everything a step needs, on every rank alike. What it does follows from weights, seed and its number alone."""

    config: RunConfig
    dataset: CaptionDataset
    sampler: RecordSampler
    length: Callable[[str], float]
    rewards: Rewards
    engine: RolloutEngine
    replica: Replica
    batches: BatchBuilder
    learner: Learner
    refit: Refit
    checkpoints: CheckpointWriter
    stop: StopRequest
    health: Health
    recorder: Recorder

    def __post_init__(self) -> None:
        self.meter = JudgeMeter(self.rewards.judge if self.replica.is_leader else None)

    def step(self, number: int) -> dict[str, float]:
        """Run step `number` (from 0) and return its metrics. A collective.

        What ends it before its update, on any rank, ends it on all of them, after a checkpoint of the steps so far:
        Stopped, TooManyMissing, or any other error. Raises Unhealthy before an update that is not to be applied, the
        first or a later one.
        """
        device = self.learner.platform.device
        phase = PhaseTimer(device, number)
        with self.keeping(number):
            self.stop.check(device)
            with phase("data"):
                prompts = Prompts(self.dataset, self.sampler.indices(number))
                askable = self.rewards if self.replica.is_leader else None
                judging = Judging(askable, prompts, self.length, patience(self.config.rewards))
            with failing_together(device, waiting=phase("rewards")):
                with phase("rollout"):
                    mine = self.engine.sample(prompts.of(self.replica), step=number, on_finished=judging.submit)
                with phase("swap"):  # while the last captions are judged
                    self.engine.sleep()
                    self.learner.onload()
                with phase("rewards"):
                    scored = judging.scored(mine)
            with phase("rewards"):
                groups, judged = zip(*self.replica.gather(scored), strict=True)
                rewards = build_reward_batch([[caption.score for caption in group] for group in judged])
                asked = self.meter.read()
                met = (reasons(asked) or Counter()) + self.rewards.reasons()
                refuse_missing(rewards, self.config.rewards.max_missing_fraction, met)
            with phase("advantages"):
                advantages = compute_advantages(rewards.to(device), self.config.algorithm)
            with phase("packing"), failing_together(device):
                for group in mine:  # each rank of an engine over several loads its own pictures
                    groups[group.place].seen.refuse_unlike(group.seen)
                trained_on = without_truncated(groups, advantages, self.config.algorithm)
                batches = self.batches.from_rollouts(prompts, *trained_on, self.config.optimizer.updates_per_step)
            self.stop.check(device)
        self.recorder(FinishedCaptions(number + 1, groups, judged, rewards.names, advantages))
        with phase("update"), self.keeping(None, Unhealthy):
            self.learner.set_learning_rate(self.learning_rate(number))
            updates = self.update(batches.minibatches, partial(self.health.accepts, number + 1))
        with phase("refit"):
            self.refit.run(offload=self.learner.offload)
        metrics = step_metrics(groups, rewards, advantages, batches, updates, phase.seconds)
        return metrics | judge_metrics(asked) | {f"memory/{name}": value for name, value in phase.memory.items()}

    def update(
        self, minibatches: Sequence[Sequence[Microbatch]], accept: Callable[[UpdateResult], bool]
    ) -> list[UpdateResult]:
        return update_policy(self.learner, minibatches, accept)

    def learning_rate(self, number: int) -> float:
        return learning_rate(self.config.optimizer, number)

    def evaluate(self, dataset: CaptionDataset, quotes: Container[int] = ()) -> HeldOutResult:
        """Caption and judge a whole dataset, greedily. A collective; it fails on all ranks alike.

        quotes: the records for which a report will show where in a caption its assertions stand
        """
        with progress.phase("evaluation"):
            return evaluate_held_out(
                self.engine,
                self.replica,
                self.rewards,
                Prompts(dataset, range(len(dataset))),
                self.length,
                patience(self.config.rewards),
                self.config.rewards.max_missing_fraction,
                quotes,
                met=lambda: (reasons(self.meter.read()) or Counter()) + self.rewards.reasons(),
            )

    def refuse(self, findings: Sequence[Finding], steps: int) -> None:
        """Raise Unhealthy for what shall stop the run after `steps` steps, with a checkpoint if the policy is sound."""
        fatal = [finding for finding in findings if finding.policy == "stop"]
        with self.keeping(steps if all(finding.sound for finding in fatal) else None):
            if fatal:
                raise Unhealthy(fatal[0])

    @contextmanager
    def keeping(self, steps: int | None, errors: type[Exception] = Exception) -> Iterator[None]:
        """End well on any of `errors`, which all ranks must meet alike: what is worth keeping is kept.

        A checkpoint on its way is waited for. steps: save the weights too, as those after so many steps; None where
        they are not whole or not sound. Raises the failure to do so, with a note of the error, if it fails.
        """
        try:
            yield
        except errors as error:
            try:
                if steps is not None:
                    self.save(steps)
                self.checkpoints.finish()
            except Exception as failure:
                failure.add_note(f"the run was to end because of this: {error}")
                raise
            raise

    def save(self, step: int) -> None:
        """Begin a checkpoint after `step` steps. Prompts, seeds and batches follow from the step number alone."""
        with progress.phase("checkpoint", step - 1), self._learners_turn():
            self.checkpoints.start(step, self.learner.model, self.learner.optimizer, {"step": step})

    def resume(self) -> int:
        """Load the last checkpoint, if any; return the number of steps it has behind it."""
        path = from_first_rank(latest_checkpoint(self.checkpoints.folder))
        if path is not None:
            with self._learners_turn():
                extra = load_checkpoint(path, self.learner.model, self.learner.optimizer)
            self.checkpoints.last = extra["step"]
        return self.checkpoints.last

    @contextmanager
    def _learners_turn(self) -> Iterator[None]:
        """Between steps the device's memory is the engine's; inside it is the learner's."""
        self.engine.sleep()
        self.learner.onload()
        yield
        self.learner.offload()
        self.engine.wake_weights()
        self.engine.wake_cache()
