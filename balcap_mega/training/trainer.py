"""One step of BalCapRL: data, rollout, rewards, advantages, packing, policy update, resharding."""

from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from balcap_mega.training.batches import BatchBuilder, PromptLengths
from balcap_mega.training.checkpoint.format import latest_checkpoint, load_checkpoint
from balcap_mega.training.checkpoint.writer import CheckpointWriter
from balcap_mega.training.guard.health import Finding, Health, Unhealthy
from balcap_mega.training.guard.signals import StopRequest
from balcap_mega.training.heldout import HeldOutResult, evaluate_held_out
from balcap_mega.training.in_flight import CAPTIONS_FILE, CaptionsInFlight, SavedCaptions, read_captions
from balcap_mega.training.judging import Judging, patience
from balcap_mega.training.learner import Learner
from balcap_mega.training.observe.judge_metrics import JudgeMeter, judge_metrics, reasons
from balcap_mega.training.observe.metrics import PhaseTimer
from balcap_mega.training.observe.refit_metrics import refit_metrics
from balcap_mega.training.observe.speed import Speed
from balcap_mega.training.observe.step_metrics import step_metrics
from balcap_mega.training.off_policy import ByCaption, OffPolicy, by_caption, scored_prompts
from balcap_mega.training.prompts import Pictures, Prompts
from balcap_mega.training.record.format import FinishedCaptions
from balcap_mega.training.record.recorder import Recorder
from balcap_mega.training.truncation import lengths, without_truncated
from balcap_mega.training.update import caption_logprobs, learning_rate, update_policy


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
        self.in_flight: dict[int, CaptionsInFlight] = {}  # by step
        self.speed = Speed.of(self.config, self.learner.architecture, self.learner.platform.device)
        self.upcoming: dict[int, CaptionsInFlight] = {}  # whose pictures are being prepared, none sampled yet
        self.pictures = Pictures.of(self.config.data)

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
                due = [self.captions_of(step) for step in self.steps_to_sample(number)]
            with failing_together(device, waiting=phase("rewards")), phase("rollout"):
                for captions in due:
                    captions.sample(self.engine, self.replica)
            with phase("rewards"):
                self.prepare_pictures(due)
            with failing_together(device), phase("swap"):  # while the last captions are judged
                self.engine.sleep()
                self.learner.onload()
            self.in_flight |= {captions.step: captions for captions in due}  # now that every rank has its share
            captions = self.in_flight[number]
            with phase("scoring"):
                off_policy = self.off_policy(number)
            with failing_together(device, waiting=phase("rewards")), phase("rewards"):
                scored = captions.judging.scored(captions.mine)
            with phase("rewards"):
                groups, judged = zip(*self.replica.gather(scored), strict=True)
                rewards = build_reward_batch([[caption.score for caption in group] for group in judged])
                asked = self.meter.read()
                met = (reasons(asked) or Counter()) + self.rewards.reasons()
                refuse_missing(rewards, self.config.rewards.max_missing_fraction, met)
            with phase("advantages"):
                advantages = compute_advantages(rewards.to(device), self.config.algorithm)
            with phase("packing"), failing_together(device):
                for group in captions.mine:  # each rank of an engine over several loads its own pictures
                    groups[group.place].seen.refuse_unlike(group.seen)
                trained_on = without_truncated(groups, advantages, self.config.algorithm)
                batches = self.batches.from_rollouts(
                    captions.prompts,
                    trained_on.groups,
                    trained_on.advantages,
                    self.config.optimizer.updates_per_step,
                )
            self.stop.check(device)
        stale = [0.0] * len(advantages.values) if captions in due else off_policy.by_caption
        finished = FinishedCaptions(number + 1, groups, judged, rewards.names, advantages, trained_on.numbers, stale)
        self.recorder(finished)
        with phase("update"), self.keeping(None, Unhealthy):
            self.learner.set_learning_rate(learning_rate(self.config.optimizer, number))
            accept = partial(self.health.accepts, number + 1, mismatch=off_policy and off_policy.mismatch)
            updates = update_policy(self.learner, batches.minibatches, accept)
            logprobs = caption_logprobs(batches.minibatches, updates, len(trained_on.numbers), device)
            packed = batches.assignments
            self.in_flight.pop(number).prompts.close()
            del captions, batches  # with their images' embeddings, before the engine wants the memory
        self.recorder(replace(finished, trained_logprobs=logprobs))
        with phase("refit"):
            moved = refit_metrics(self.refit.run(offload=self.learner.offload))
        metrics = step_metrics(groups, rewards, advantages, packed, updates, phase.seconds, off_policy)
        sampled = [group for captions in due for group in captions.mine] if self.replica.is_leader else []
        metrics |= self.speed.metrics(trained_on.groups, self.speed.sampled(sampled, device), phase.seconds)
        metrics |= judge_metrics(asked) | moved
        return metrics | {f"memory/{name}": value for name, value in phase.memory.items()}

    def steps_to_sample(self, number: int) -> list[int]:
        """The steps whose captions are sampled in step `number`: its own, and with `rollout.ahead` the next one's.

        Its own are there already where the step before has sampled them; after the last step nothing is needed.
        """
        last = min(number + self.config.rollout.ahead, max(self.config.steps - 1, number))
        return [step for step in range(number, last + 1) if step not in self.in_flight]

    def captions_of(self, step: int) -> CaptionsInFlight:
        """The captions of a step, of which none is sampled yet."""
        if step in self.upcoming:
            return self.upcoming.pop(step)
        prompts = Prompts(self.dataset, self.sampler.indices(step), self.pictures)
        askable = self.rewards if self.replica.is_leader else None
        return CaptionsInFlight(step, prompts, Judging(askable, prompts, self.length, patience(self.config.rewards)))

    def prepare_pictures(self, sampled: Sequence[CaptionsInFlight]) -> None:
        """Have pictures prepared while devices work: those that this rank will train on, of captions just sampled, and
        those that its engine is asked about next. A collective.

        The latter are asked for at the beginning of a step, the former in the midst of one.
        """
        for captions in sampled:
            image_tokens, algorithm = self.batches.processor.image_tokens, self.config.algorithm
            groups = self.replica.gather(
                [
                    PromptLengths(lengths(group, algorithm), image_tokens(group.prompt_token_ids))
                    for group in captions.mine
                ]
            )
            due = (captions.step, 1)
            self.batches.prepare(captions.prompts, groups, self.config.optimizer.updates_per_step, due)
        following = 1 + max([*self.in_flight, *(captions.step for captions in sampled)])
        if following < self.config.steps and following not in self.upcoming:
            self.upcoming[following] = self.captions_of(following)
            due = (following - self.config.rollout.ahead, 0)
            self.upcoming[following].prompts.prepare_requests(self.replica, self.engine.render, due)

    def off_policy(self, number: int) -> OffPolicy | None:
        """How far the captions of step `number` are from the policy that they will train; None if not sampled ahead.

        The captions of the next step, just sampled, are scored too, under these same weights. A collective.
        """
        if not self.config.rollout.ahead:
            return None
        engine, now = self.scored(self.in_flight[number])
        if number + 1 in self.in_flight:
            self.scored(self.in_flight[number + 1])
        return OffPolicy.of(engine, self.in_flight[number].sampling, now)

    def scored(self, captions: CaptionsInFlight) -> tuple[ByCaption, ByCaption]:
        """The engine's and the trainer's present logprobs of the captions of the first prompts (`scored_prompts`).

        The first time they are those under the weights that sampled, and are kept as such.
        """
        count = scored_prompts(len(captions.prompts), self.batches.grid.data_size)
        groups = self.replica.gather([group for group in captions.mine if group.place < count])
        engine = tuple(rollout.logprobs for group in groups for rollout in group.rollouts)
        with failing_together(self.learner.platform.device):
            microbatches = self.batches.to_score(captions.prompts, groups)
        now = by_caption(microbatches, self.learner.logprobs(microbatches), len(engine))
        captions.sampling = captions.sampling or now
        return engine, now

    def evaluate(self, dataset: CaptionDataset, quotes: Container[int] = ()) -> HeldOutResult:
        """Caption and judge a whole dataset, greedily. A collective; it fails on all ranks alike.

        quotes: the records for which a report will show where in a caption its assertions stand
        """
        with progress.phase("evaluation"):
            return evaluate_held_out(
                self.engine,
                self.replica,
                self.rewards,
                Prompts(dataset, range(len(dataset)), self.pictures),
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
        """Begin a checkpoint after `step` steps, with the captions of the next one where they are in flight.

        Prompts, seeds and batches follow from the step number alone.
        """
        ahead = self.in_flight.get(step) if self.config.rollout.ahead else None
        files = {} if ahead is None else {CAPTIONS_FILE: ahead.saved(self.replica)}
        with progress.phase("checkpoint", step - 1), self._learners_turn():
            self.checkpoints.start(step, self.learner.model, self.learner.optimizer, {"step": step}, files)

    def resume(self) -> int:
        """Load the last checkpoint, if any; return the number of steps it has behind it."""
        path = from_first_rank(latest_checkpoint(self.checkpoints.folder))
        if path is not None:
            with self._learners_turn():
                extra = load_checkpoint(path, self.learner.model, self.learner.optimizer)
            self.checkpoints.last = extra["step"]
            with failing_together(self.learner.platform.device):
                self._take_up(read_captions(path))
        return self.checkpoints.last

    def _take_up(self, saved: SavedCaptions | None) -> None:
        """Captions that were in flight when the checkpoint was taken."""
        if saved is not None and self.config.rollout.ahead and saved.step < self.config.steps:
            captions = self.in_flight[saved.step] = self.captions_of(saved.step)
            captions.go_on(saved, self.replica)

    @contextmanager
    def _learners_turn(self) -> Iterator[None]:
        """Between steps the device's memory is the engine's; inside it is the learner's."""
        self.engine.sleep()
        self.learner.onload()
        yield
        self.learner.offload()
        self.engine.wake_weights()
        self.engine.wake_cache()
