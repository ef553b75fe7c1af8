"""The judge that a run's configuration names."""

from balcap_mega.config.schema import RewardConfig
from balcap_mega.rewards.judge import Judge


def build_judge(config: RewardConfig, sharers: int = 1) -> Judge:
    """Close it when done. A multimodal LLM's endpoints are asked here, so that a wrong one is refused at once.

    sharers: judges that the job builds, over which an endpoint's concurrency is shared out
    """
    if config.judge == "scenes":
        from balcap_mega.rewards.scenes import SceneJudge

        return SceneJudge()
    from balcap_mega.rewards.mllm.judge import MllmJudge

    judge = MllmJudge(config, sharers=sharers)
    try:
        judge.check()
    except BaseException:
        judge.close()
        raise
    return judge
