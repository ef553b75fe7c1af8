"""Captions sampled a step ahead: what is kept of them, what is said of them, and what they save."""

import math
from concurrent.futures import Future
from dataclasses import replace

import pytest

from balcap_mega.config.load import load_config
from balcap_mega.config.schema import AlgorithmConfig, HealthConfig, RewardConfig, RolloutConfig
from balcap_mega.data.scenes import ScenesDataset
from balcap_mega.errors import UserError
from balcap_mega.planning.hardware import Cluster
from balcap_mega.planning.layout import Layout
from balcap_mega.planning.plan import Planner
from balcap_mega.planning.workload import SCORED_AHEAD
from balcap_mega.rewards.components import Rewards
from balcap_mega.rewards.judge import Judgement
from balcap_mega.rewards.scenes import SceneJudge
from balcap_mega.rollout.replicas import Replica
from balcap_mega.rollout.rollouts import Rollout, RolloutGroup, SeenRecord
from balcap_mega.training.guard.health import Health, Unhealthy
from balcap_mega.training.in_flight import CAPTIONS_FILE, CaptionsInFlight, read_captions
from balcap_mega.training.judging import Judging
from balcap_mega.training.learner import UpdateResult
from balcap_mega.training.off_policy import SHARE, OffPolicy, scored_prompts
from balcap_mega.training.prompts import Prompts


class Half(SceneJudge):
    """Answers about the first caption of each group, and is still busy with the others."""

    def __init__(self, prompt: bool = True):
        super().__init__()
        self.asked: list[str] = []
        self.prompt = prompt

    def submit(self, record, caption, *, quotes=False):
        self.asked.append(caption)
        if self.prompt or caption.endswith("first."):
            return super().submit(record, caption, quotes=quotes)
        return Future()


def in_flight(judge: SceneJudge, step: int = 5) -> CaptionsInFlight:
    prompts = Prompts(ScenesDataset(8, seed=0, split="train"), range(4))
    judging = Judging(Rewards(RewardConfig(), judge, {}), prompts, lambda text: float(len(text.split())), 1.0)
    return CaptionsInFlight(step, prompts, judging)


def captions_of(captions: CaptionsInFlight) -> list[RolloutGroup]:
    def rollout(place: int, name: str) -> Rollout:
        return Rollout((place, 7), (-0.1 * place - 1 / 3, -math.inf), f"There is a red circle, {name}.", True)

    return [
        RolloutGroup(
            place, (1, 2, 3), (rollout(place, "first"), rollout(place, "second")),
            SeenRecord.of(place, captions.prompts[place]),
        )
        for place in range(4)
    ]  # fmt: skip


def test_a_checkpoint_holds_them_and_another_layout_goes_on(tmp_path):
    busy, everybody = Half(prompt=False), Replica(0, 1, 0)
    captions = in_flight(busy)
    captions.mine = captions_of(captions)
    captions.sampling = ((-0.1, -0.2), (1 / 3,))
    for group in captions.mine:
        for number, rollout in enumerate(group.rollouts):
            captions.judging.submit(group.place, number, rollout)
    (tmp_path / CAPTIONS_FILE).write_bytes(captions.saved(everybody))

    saved, judge = read_captions(tmp_path), Half()
    assert saved.step == 5 and saved.sampling == captions.sampling
    resumed = in_flight(judge)
    resumed.go_on(saved, Replica(1, 2, 0))
    assert resumed.mine == [captions.mine[1], captions.mine[3]], "every second prompt, bit for bit"
    assert judge.asked == [captions.mine[place].rollouts[1].text for place in (1, 3)], (
        "what is judged is not asked again"
    )
    whole = in_flight(Half())
    whole.go_on(replace(saved, captions=tuple((group, (None, None)) for group, _ in saved.captions)), Replica(1, 2, 0))
    assert resumed.judging.scored(resumed.mine) == whole.judging.scored(whole.mine)


def test_a_reward_that_is_missing_is_asked_for_again():
    """A run that stopped for missing rewards must not meet them again as it goes on."""

    class Failing(Half):
        def submit(self, record, caption, *, quotes=False):
            answer = super().submit(record, caption, quotes=quotes)
            judgement: Judgement = replace(answer.result(), clarity=None)
            answer = type(answer)()
            answer.set_result(judgement)
            return answer

    captions = in_flight(Failing())
    [group, *_] = captions_of(captions)
    captions.judging.submit(0, 0, group.rollouts[0])
    assert captions.judging.so_far([replace(group, rollouts=group.rollouts[:1])]) == [(None,)]


def test_a_damaged_file_is_named(tmp_path):
    assert read_captions(tmp_path) is None
    (tmp_path / CAPTIONS_FILE).write_text('{"step": 1, "captions": [[1, 2]]')
    with pytest.raises(UserError, match=rf"{CAPTIONS_FILE} cannot be read.*delete it"):
        try:
            read_captions(tmp_path)
        except UserError as error:
            raise UserError(f"{error.problem} {error.remedy}", remedy="") from None


def test_engine_and_staleness_are_told_apart():
    engine, sampling, now = ((-1.0, -2.0), (-3.0,)), ((-1.1, -2.0), (-3.0,)), ((-1.1, -2.5), (-2.0,))
    found = OffPolicy.of(engine, sampling, now)
    assert (found.mismatch, found.mismatch_max) == pytest.approx((0.1 / 3, 0.1))
    assert (found.staleness, found.staleness_max) == pytest.approx((0.5, 1.0))
    assert found.by_caption == pytest.approx((0.25, 1.0))
    assert OffPolicy.of(engine, sampling[:1], now) == OffPolicy.of(engine[:1], sampling[:1], now[:1]), (
        "a layout of fewer data-parallel ranks has scored fewer"
    )
    assert [scored_prompts(*sizes) for sizes in ((64, 2), (32, 8), (4, 4))] == [8, 8, 4]


def test_health_is_about_equal_weights():
    metrics = {"engine_logprob_difference": 5.0}
    health, update = Health(HealthConfig(), {}), UpdateResult(0.1, 1.0, metrics)
    assert health.accepts(3, update, mismatch=0.01), "captions may be as stale as the updates are large"
    with pytest.raises(Unhealthy, match=r"health\.mismatch: trainer and engine differ by 0\.3"):
        health.accepts(3, UpdateResult(0.1, 1.0, {"engine_logprob_difference": 0.0}), mismatch=0.3)
    with pytest.raises(Unhealthy, match=r"health\.mismatch"):
        health.accepts(3, update)


def test_old_captions_must_be_corrected(tmp_path):
    overrides = [f"output_dir={tmp_path}", "rollout.ahead=1", "algorithm.importance_cap=null"]
    with pytest.raises(UserError, match=r"rollout\.ahead=1"):
        load_config("configs/scenes_smoke.yaml", overrides)
    load_config("configs/scenes_smoke.yaml", [*overrides, "algorithm.importance=token_band"])
    assert RolloutConfig().ahead == 0 and AlgorithmConfig().importance == "truncate"


def test_planned_steps_take_the_longer_of_judge_and_the_rest():
    planner = Planner.of(load_config("configs/qwen2_5_vl_7b.yaml", []), Cluster(1, 8))
    assert planner.config.rollout.ahead == 1 and SCORED_AHEAD == 2 / SHARE
    own = {}
    for ahead in (0, 1):
        free = planner.with_ahead(ahead)
        layout = Layout.of(free.config)
        own[ahead] = free.plan(layout)
        assert own[ahead].seconds["rewards"] == 0
    assert own[0].seconds["update"] < own[1].seconds["update"] < 1.1 * own[0].seconds["update"]
    for judge in (0.5, 1.0, 2.0):
        seconds = judge * own[1].step_seconds
        rated = replace(planner, captions_per_second=planner.workload.captions / seconds, _known={})
        found = rated.plan(layout)
        assert found.step_seconds == pytest.approx(max(seconds, own[1].step_seconds))
        before = rated.with_ahead(0).plan(layout)
        waits = max(seconds - own[0].seconds["rollout"], 0)
        alone = own[0].step_seconds - own[0].seconds["pictures"]  # which a wait for the judge hides
        assert before.step_seconds == pytest.approx(alone + waits + before.seconds["pictures"])
