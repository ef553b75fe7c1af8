"""Resharding: the policy's Megatron shards into vLLM's parameters, in place, in flat buckets.

`tables` lists what each rank holds on either side, `transfers` works out what moves, `exchange` moves it, `refit` runs
it bucket by bucket, and `weight_transfer` receives it.
"""

import torch

from balcap_mega.config.schema import ParallelConfig
from balcap_mega.models.policy import VisionLanguagePolicy
from balcap_mega.rollout.engine import RolloutEngine
from balcap_mega.rollout.refit.refit import BUCKET_BYTES, Refit
from balcap_mega.rollout.refit.tables import RefitTables, vision_tensors


def build_refit(
    policy: VisionLanguagePolicy, engine: RolloutEngine, parallel: ParallelConfig, *, bucket_bytes: int = BUCKET_BYTES
) -> Refit:
    """The refit of `policy`, laid out as `parallel` says, into `engine`. Every rank of the job builds its own."""
    initialized = torch.distributed.is_initialized()
    tables = RefitTables(
        policy.architecture,
        world_size=torch.distributed.get_world_size() if initialized else 1,
        tensor_size=parallel.tensor,
        pipeline_size=parallel.pipeline,
        engine_tensor_size=engine.config.tensor_parallel,
        vision_data_parallel=engine.vision_data_parallel,
        transformer_engine=policy.transformer_engine,
    )
    transfers = tables.transfers(
        torch.distributed.get_rank() if initialized else 0,
        bucket_elements=bucket_bytes // engine.dtype.itemsize,
        frozen=vision_tensors(policy.architecture) if policy.freeze_vision else (),
    )
    config = engine.config
    return Refit(
        policy, engine, transfers, timeout_seconds=config.timeout_seconds, verify_every=config.verify_refit_every
    )
