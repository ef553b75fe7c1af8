"""What the ranks that `distributed.launch` forks have imported already: it takes longer than most of what they do."""

import balcap_mega.training.run
from balcap_mega.rollout.vllm_runtime.process import import_vllm

import_vllm()

from vllm import LLMEngine  # noqa: E402, F401

import balcap_mega.rollout.refit.weight_transfer  # noqa: E402, F401
