"""A step of a run at full size on tensors without memory: what one rank of each pipeline stage takes.

`device` takes a GPU's part and `world` the other ranks'; `gpu_branches` has the program choose as on a GPU; `step` runs
it, watched by `watched`; `compare` holds what was found against the planner, and `report` prints both.
"""

from balcap_mega.planning.dry_run.compare import refuse_what_does_not_fit
from balcap_mega.planning.dry_run.report import as_json, print_need, print_stand_ins, print_step
from balcap_mega.planning.dry_run.run import dry_run

__all__ = ["as_json", "dry_run", "print_need", "print_stand_ins", "print_step", "refuse_what_does_not_fit"]
