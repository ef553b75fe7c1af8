#!/usr/bin/env python3
"""Run the learner's side of one step at full size, on tensors without memory; needs neither GPUs nor weights:

    python launch/dry_run.py --config configs/RUN.yaml --nodes N [key=value ...]

The real program runs for one rank of every pipeline stage: built, a step's captions scored, the update, offload, refit
and checkpoint. Printed beside the planner's figures: peak memory by moment and kind, FLOPs, collectives by group, bytes
of a refit, host memory, and where the host waits for the device. A layout that does not fit ends with status 2.
"""

import argparse
import json
from pathlib import Path

from balcap_mega.cli import exit_on_user_error, quiet_libraries
from balcap_mega.config.load import load_config


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="the run, as YAML")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--image-tokens", type=int, help="of an image; where not given, of one of about a megapixel")
    parser.add_argument("--caption-tokens", type=float, help="mean length of a caption; 175 where not given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys that replace the file's")
    arguments = parser.parse_args()
    if arguments.nodes < 1 or arguments.gpus_per_node < 1:
        parser.error("--nodes and --gpus-per-node are at least 1")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    quiet_libraries()
    with exit_on_user_error():
        dry_run(arguments)


def dry_run(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    from balcap_mega.planning import dry_run as dry
    from balcap_mega.planning.hardware import Cluster
    from balcap_mega.planning.layout import Layout
    from balcap_mega.planning.plan import Planner
    from balcap_mega.planning.tables import make_console, print_facts

    cluster = Cluster(arguments.nodes, arguments.gpus_per_node)
    planner = Planner.of(config, cluster, image_tokens=arguments.image_tokens, caption_tokens=arguments.caption_tokens)
    plan = planner.plan(Layout.of(config), must_fit=False)
    console, steps = make_console(), []
    print_facts(console, planner)
    console.print(f"  {plan.layout}")
    for step in dry.dry_run(planner):
        dry.print_step(console, step, planner, plan)
        steps.append(step)
    dry.print_stand_ins(console, steps)
    dry.print_need(console, steps, plan, cluster.gpu.memory)
    if arguments.json:
        found = [dry.as_json(step, planner, plan) for step in steps]
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    dry.refuse_what_does_not_fit(steps, plan, cluster.gpu.memory)


if __name__ == "__main__":
    main()
