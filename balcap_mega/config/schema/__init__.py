"""A run, typed: every key a YAML file may hold, its type, its default and its bounds.

Unknown keys are refused (`load.py` names the nearest one). Checks that need only one section stand with it; checks
across sections stand in `RunConfig`. Their messages read "problem; remedy", which `load.py` splits.

The string below a key says what it is for; `launch/pretrain_rl.py --explain` prints them all.

A key that is marked `MAY_CHANGE` may have another value when a run goes on; any other key would make it another run.
The mark on a section stands for every key in it.
"""

from balcap_mega.config.schema.algorithm import AlgorithmConfig, LengthGateConfig
from balcap_mega.config.schema.base import MAY_CHANGE, Section
from balcap_mega.config.schema.benchmarks import BenchmarkConfig, CaptionQaFiles, DcScoreFiles
from balcap_mega.config.schema.data import DataConfig, ParquetColumns
from balcap_mega.config.schema.endpoint import DialectConfig, JudgeEndpoint
from balcap_mega.config.schema.health import HealthConfig, TrendCheck, UpdateCheck
from balcap_mega.config.schema.learner import (
    CheckpointConfig,
    HabitsConfig,
    OptimizerConfig,
    PackingConfig,
    WarmupConfig,
)
from balcap_mega.config.schema.policy import ModelConfig, ParallelConfig
from balcap_mega.config.schema.rewards import JUDGED, QUESTIONS_OF, ComponentConfig, JudgeQuestion, RewardConfig
from balcap_mega.config.schema.rollout import ProfileConfig, RecordConfig, RolloutConfig
from balcap_mega.config.schema.run import RunConfig

__all__ = [
    "JUDGED",
    "MAY_CHANGE",
    "QUESTIONS_OF",
    "AlgorithmConfig",
    "BenchmarkConfig",
    "CaptionQaFiles",
    "CheckpointConfig",
    "ComponentConfig",
    "DataConfig",
    "DcScoreFiles",
    "DialectConfig",
    "HabitsConfig",
    "HealthConfig",
    "JudgeEndpoint",
    "JudgeQuestion",
    "LengthGateConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PackingConfig",
    "ParallelConfig",
    "ParquetColumns",
    "ProfileConfig",
    "RecordConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "Section",
    "TrendCheck",
    "UpdateCheck",
    "WarmupConfig",
]
