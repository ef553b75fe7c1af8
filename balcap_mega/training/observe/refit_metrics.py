"""What a step's refit moved and took, over all ranks."""

import torch.distributed

from balcap_mega.rollout.refit.refit import RefitReport


def refit_metrics(report: RefitReport) -> dict[str, float]:
    """By name, as metrics.jsonl shows them. A collective.

    refit/seconds/PHASE:              of the rank that took longest
    refit/bytes:                      written into the engines of all ranks
    refit/bytes_exchanged:            of those, the ones that came from another rank
    refit/buffer_bytes:               the most extra memory of a rank
    throughput/refit_gb_per_second:   bytes over the seconds of transfer: 10^9 bytes, all ranks together
    """
    reports = [report]
    if torch.distributed.is_initialized():
        reports = [report] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(reports, report)
    seconds = {phase: max(each.seconds[phase] for each in reports) for phase in report.seconds}
    exchanged = sum(each.received_bytes for each in reports)
    written = exchanged + sum(each.local_bytes for each in reports)
    return {
        **{f"refit/seconds/{phase}": value for phase, value in seconds.items()},
        "refit/bytes": written,
        "refit/bytes_exchanged": exchanged,
        "refit/buffer_bytes": max(each.buffer_bytes for each in reports),
        "throughput/refit_gb_per_second": written / seconds["transfer"] / 1e9,
    }
