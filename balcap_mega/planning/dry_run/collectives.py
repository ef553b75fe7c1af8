"""What ranks would say to one another: every collective counted by its group, and answered by nobody."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch.utils._pytree import tree_flatten

# Which argument of a c10d operator is the process group, and which tensors say how much each rank brings along.
_SHAPE = {
    "allreduce_": (1, 0), "broadcast_": (1, 0), "reduce_": (1, 0), "send": (1, 0), "recv_": (1, 0),
    "allgather_": (2, 0), "_allgather_base_": (2, 0), "reduce_scatter_": (2, 1), "_reduce_scatter_base_": (2, 1),
    "gather_": (2, 1), "scatter_": (2, 0), "alltoall_": (2, 1), "alltoall_base_": (2, 1),
    "allreduce_coalesced_": (1, 0), "allgather_into_tensor_coalesced_": (2, 0),
    "reduce_scatter_tensor_coalesced_": (2, 1), "barrier": (1, None),
}  # fmt: skip


@dataclass
class Collectives:
    """count, size: of the collectives by (group, operation); size is that of the whole tensor, once gathered or before
    it is scattered."""

    groups: dict[str, str] = field(default_factory=dict)
    count: Counter[tuple[str, str]] = field(default_factory=Counter)
    size: Counter[tuple[str, str]] = field(default_factory=Counter)

    def copy(self) -> "Collectives":
        return Collectives(self.groups, self.count.copy(), self.size.copy())

    def clear(self) -> None:
        self.count.clear()
        self.size.clear()

    def run(self, operator: torch._ops.OpOverload, arguments: Sequence[Any]) -> Any:
        """Answer an operator of c10d: the tensors are left as they are, the work is done."""
        name = operator._opname
        group_at, tensors_at = _SHAPE[name]
        group = ProcessGroup.unbox(arguments[group_at])
        moved = 0 if tensors_at is None else sum(map(_nbytes, tree_flatten(arguments[tensors_at])[0]))
        self.add(group, name.strip("_"), moved)
        work = FakeWork().boxed()
        return work if len(operator._schema.returns) == 1 else (arguments[0], work)

    def add(self, group: ProcessGroup, operation: str, size: int) -> None:
        """Groups of one rank are left out: nothing travels."""
        if group.size() > 1:
            everybody = group.size() == torch.distributed.get_world_size()
            unnamed = "all ranks" if everybody else f"{group.size()} ranks"
            key = (self.groups.get(group.group_name, unnamed), operation)
            self.count[key] += 1
            self.size[key] += size


def _nbytes(value: Any) -> int:
    return value.nbytes if isinstance(value, Tensor) else 0


def megatron_groups() -> dict[str, str]:
    """What Megatron's process groups are for, by torch.distributed's names of them."""
    from megatron.core import parallel_state

    names = {}
    for what, group in (
        ("data", parallel_state.get_data_parallel_group()),
        ("data", parallel_state.get_data_parallel_group(with_context_parallel=True)),
        ("embedding", parallel_state.get_embedding_group(check_initialized=False)),
        ("model", parallel_state.get_model_parallel_group()),
        ("pipeline", parallel_state.get_pipeline_model_parallel_group()),
        ("tensor", parallel_state.get_tensor_model_parallel_group()),
    ):
        if isinstance(group, ProcessGroup):
            names[group.group_name] = what
    return names
