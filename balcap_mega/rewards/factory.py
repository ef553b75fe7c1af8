"""The judge that a run's configuration names, and the rewards of its components."""

from typing import Any

from balcap_mega.config.schema import RewardConfig
from balcap_mega.rewards.asked import AskedReward
from balcap_mega.rewards.components import Rewards
from balcap_mega.rewards.judge import Judge
from balcap_mega.rewards.own import find_reward, load_reward


def build_rewards(config: RewardConfig, sharers: int = 1) -> Rewards:
    """Close it when done. The judge's endpoint and the rewards' own checks are asked once here, so that what does not
    work is refused at once. Raises UserError.

    sharers: see `build_judge`
    """
    own = build_own(config)
    try:
        judge = build_judge(config, sharers) if config.asks_judge else None
    except BaseException:
        for reward in own.values():
            reward.close()
        raise
    return Rewards(config, judge, own)


def build_own(config: RewardConfig) -> dict[str, AskedReward]:
    """The rewards of one's own by name, each asked for its own check. Close them when done. Raises UserError."""
    own: dict[str, AskedReward] = {}
    try:
        for name, component in config.components.items():
            if not component.judged:
                own[name] = AskedReward(name, load_reward(name, component), component)
                own[name].check()
    except BaseException:
        for reward in own.values():
            reward.close()
        raise
    return own


def check_rewards(config: RewardConfig) -> None:
    """Find the rewards of one's own and look at their options, before anything is built. Raises UserError."""
    for name, component in config.components.items():
        if not component.judged:
            find_reward(name, component)


def build_judge(config: RewardConfig, sharers: int = 1) -> Judge:
    """Close it when done. A multimodal LLM's endpoints are asked here, so that a wrong one is refused at once.

    sharers: judges that the job builds, over which an endpoint's concurrency is shared out
    """
    if config.judge == "scenes":
        from balcap_mega.rewards.scenes import SceneJudge

        answers = "utility" in config.judged
        judge: Any = SceneJudge(config.pointability, answers=answers, lenient=config.reading == "lenient")
        return judge  # which judges records of scenes alone
    from balcap_mega.rewards.mllm.judge import MllmJudge

    judge = MllmJudge(config, sharers=sharers)
    try:
        judge.check()
    except BaseException:
        judge.close()
        raise
    return judge
