"""Rendezvous of a job's ranks that keeps apart the successive starts of the same job."""

import time
import uuid
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, Store

from balcap_mega.errors import UserError

POLL_SECONDS = 0.05


def job_store(timeout: timedelta) -> tuple[Store, int, int]:
    """(store for this start of the job, this rank, number of ranks), from torchrun's environment.

    torchrun keeps one store over all restarts of the ranks. A rank that comes early would read keys there that belong
    to an earlier start: gloo would connect to dead processes, and the watchdog would end the run again. Therefore the
    ranks of each start agree on a name and put it before all their keys. Raises UserError, naming them, if ranks do
    not come within `timeout`.
    """
    store, rank, world = next(torch.distributed.rendezvous("env://", timeout=timeout))
    return PrefixStore(agree_on_name(store, rank, world, timeout.total_seconds()), store), rank, world


def agree_on_name(store: Store, rank: int, world: int, seconds: float) -> str:
    """A name that rank 0 draws. It sends it to each rank in reply to a greeting, which is new at every start."""
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"greeting/{rank}", own)
        try:
            name = store.get(f"reply/{own}").decode()
        except torch.distributed.DistError:
            raise UserError(
                f"rank 0 did not answer rank {rank} for {seconds:g} s", remedy="look at the log of rank 0"
            ) from None
        store.set(f"{name}/{rank}", "")
        return name
    deadline, missing = time.monotonic() + seconds, set(range(1, world))
    while missing:
        greeted = [other for other in missing if store.check([f"greeting/{other}"])]
        for other in greeted:  # again and again: the first greeting may be an old one
            store.set(f"reply/{store.get(f'greeting/{other}').decode()}", own)
        missing -= {other for other in greeted if store.check([f"{own}/{other}"])}
        if missing and time.monotonic() > deadline:
            raise UserError(
                f"ranks {', '.join(map(str, sorted(missing)))} did not come to the rendezvous for {seconds:g} s",
                remedy="look at their logs, and whether their hosts reach the first one",
            )
        time.sleep(POLL_SECONDS if missing else 0)
    return own
