"""Stop at the next step boundary when asked to: SIGINT, SIGTERM, and SLURM's SIGUSR1."""

import signal

import torch
import torch.distributed


class StopRequest:
    """Remembers a signal; `agreed()` is a collective, so that every rank stops after the same step."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        for number in self.SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame) -> None:
        self.received = signal.Signals(number)

    @property
    def reason(self) -> str:
        return self.received.name if self.received else "a signal to another rank"

    def agreed(self, device: torch.device) -> bool:
        """True on all ranks as soon as one of them was asked to stop; the ranks agree through tensors on `device`."""
        flag = torch.tensor([self.received is not None], dtype=torch.int32, device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())
