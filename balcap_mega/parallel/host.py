"""What messages call this machine and this process."""

import os
import socket

import torch


def node_name() -> str:
    """SLURM's name of this node, or the host's own."""
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


def this_rank() -> str:
    """For messages: `rank 3 on node7`."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return f"rank {rank} on {node_name()}"
