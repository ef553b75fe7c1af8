"""BalCap-Mega: balanced reinforcement learning for image captioners on Megatron-Core and vLLM."""

__version__ = "0.1.0"
