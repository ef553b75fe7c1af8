"""The judge that a run's configuration names."""

from balcap_mega.config.schema import RewardConfig
from balcap_mega.rewards.judge import Judge


def build_judge(config: RewardConfig) -> Judge:
    """Close it when done. A multimodal LLM's endpoint is asked once here, so that a wrong one is refused at once."""
    if config.judge == "scenes":
        from balcap_mega.rewards.scenes import SceneJudge

        return SceneJudge()
    from balcap_mega.rewards.mllm.judge import MllmJudge

    judge = MllmJudge(config)
    try:
        judge.check()
    except BaseException:
        judge.close()
        raise
    return judge
