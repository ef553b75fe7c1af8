#!/usr/bin/env python3
"""Predict memory and step time of a run before it is started; needs neither GPUs nor weights:

    python launch/plan.py --config configs/RUN.yaml --nodes N [key=value ...]      the layout as configured
    python launch/plan.py --config configs/RUN.yaml --nodes N --search             every layout, the best first
    python launch/plan.py --config configs/RUN.yaml --budget N --search            N nodes, the judge's among them
    python launch/plan.py --config configs/RUN.yaml --nodes N --measured ROWS.json from what one GPU was measured to do
    python launch/plan.py --measured ROWS.json                                     measured against predicted
    python launch/plan.py --published                                              published against predicted

The judge is always charged for what the run's rewards.components ask of it: the config's model on --judge-gpus GPUs
beside the --nodes, one node where not given.
Where model.path is not on this machine, its name says which released model is meant. A layout that the run would
refuse, or that does not fit, ends with status 2 and the reason.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from balcap_mega.cli import exit_on_user_error, quiet_libraries
from balcap_mega.config.load import load_config
from balcap_mega.config.schema import RunConfig
from balcap_mega.errors import UserError

if TYPE_CHECKING:
    from balcap_mega.planning.judge import JudgeServers
    from balcap_mega.planning.plan import Planner

DEFAULT_JUDGE = "Qwen/Qwen2.5-VL-72B-Instruct"  # of the recipes


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="the run, as YAML")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--search", action="store_true", help="try every layout")
    parser.add_argument("--fp8", action="store_true", help="with --search: also FP8 in training and rollouts")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="rows of benchmarks/throughput.py --json")
    parser.add_argument("--published", action="store_true", help="hold the planner against published rows")
    parser.add_argument("--image-tokens", type=int, help="of an image; where not given, of one of about a megapixel")
    parser.add_argument("--caption-tokens", type=float, help="mean length of a caption; 175 where not given")
    parser.add_argument("--judge-gpus", type=int, help="GPUs that serve the judge; one node where not given")
    parser.add_argument("--judge-model", help="what they serve; where not given, the config's own")
    parser.add_argument("--judge-measured", type=Path, metavar="FILE", help="of benchmarks/judge.py --endpoint --json")
    parser.add_argument("--captions-per-second", type=float, help="that the judge sustains, instead of all these")
    parser.add_argument("--budget", type=int, metavar="NODES", help="with --search: share them out, judge included")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys that replace the file's")
    arguments = parser.parse_args()
    if not (arguments.config or arguments.measured or arguments.published):
        parser.error("give --config, --measured or --published")
    if arguments.budget is not None and not (arguments.search and arguments.config and arguments.budget > 1):
        parser.error("--budget is at least 2 nodes, with --search and --config")
    if arguments.captions_per_second is not None and arguments.captions_per_second <= 0:
        parser.error("--captions-per-second is above 0")
    if arguments.judge_gpus is not None and arguments.judge_gpus < 1:
        parser.error("--judge-gpus is at least 1")
    if arguments.nodes < 1 or arguments.gpus_per_node < 1:
        parser.error("--nodes and --gpus-per-node are at least 1")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    quiet_libraries()
    with exit_on_user_error():
        found = plan(arguments)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def plan(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print what was asked for; return the same as plain values."""
    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    from balcap_mega.planning import measured, published, tables
    from balcap_mega.planning.hardware import Cluster
    from balcap_mega.planning.layout import Layout
    from balcap_mega.planning.plan import Planner
    from balcap_mega.planning.search import search, split_nodes

    console, found = tables.make_console(), {}
    if arguments.published:
        tables.print_published(console, published.ROWS)
        found["published"] = {row.name: {"value": row.value, "error": row.error()} for row in published.ROWS}
    cluster = Cluster(arguments.nodes, arguments.gpus_per_node)
    if arguments.measured:
        rows = measured.read_rows(arguments.measured)
        tables.print_measured(console, rows)
        found["measured"] = [{"name": row.name, "compared": [vars(c) for c in row.comparisons()]} for row in rows]
        if config:  # the last row of the file is the newest
            tables.print_assumptions(console, rows[-1])
            cluster = replace(cluster, efficiency=rows[-1].efficiency())
    if config:
        planner = Planner.of(
            config,
            cluster,
            image_tokens=arguments.image_tokens,
            caption_tokens=arguments.caption_tokens,
        )
        if arguments.budget:
            check_judged(config)
            splits = split_nodes(planner, judge_model(arguments, config), arguments.budget, fp8=arguments.fp8)
            best = splits[0]
            planner = replace(planner, cluster=replace(cluster, nodes=best.training))
            arguments.judge_gpus = best.judging * cluster.gpus_per_node
            tables.print_split(console, splits)
            found["splits"] = [
                {"training": s.training, "judge": s.judging, "step_seconds": s.plan.step_seconds} for s in splits
            ]
        servers, rate = judge_of(arguments, config, planner)
        planner = replace(planner, captions_per_second=rate, _known={})
        tables.print_facts(console, planner)
        if arguments.search:
            results = search(planner, fp8=arguments.fp8)
            tables.print_judge(console, planner.workload, servers, rate, results.best)
            tables.print_ahead(console, planner, results.best.layout)
            tables.print_search(console, planner, results)
            found |= tables.search_as_json(results)
        else:
            one = planner.plan(Layout.of(config))
            tables.print_judge(console, planner.workload, servers, rate, one)
            tables.print_ahead(console, planner, one.layout)
            tables.print_plan(console, planner, one)
            found["plan"] = tables.as_json(one)
    return found


def judge_model(arguments: argparse.Namespace, config: RunConfig) -> str:
    """What the judge's GPUs serve: the model that sees the pictures."""
    endpoints = config.rewards.endpoints()
    return arguments.judge_model or (
        endpoints.get("verify", config.rewards.endpoint).model if endpoints else DEFAULT_JUDGE
    )


def check_judged(config: RunConfig) -> None:
    if not config.rewards.asks_judge:
        raise UserError(
            "there is no judge to share the nodes with: no component of rewards.components is the judge's",
            remedy="give the nodes with --nodes instead of --budget",
        )


def judge_of(
    arguments: argparse.Namespace, config: RunConfig, planner: "Planner"
) -> "tuple[JudgeServers | None, float | None]":
    """The judge that the step is charged for, and its captions a second: given, measured, or predicted.

    Neither where no component is the judge's: the planner does not know what a reward of one's own takes.
    """
    from balcap_mega.planning.judge import JudgeServers

    if not config.rewards.asks_judge:
        return None, None
    if arguments.captions_per_second:
        return None, arguments.captions_per_second
    if arguments.judge_measured:
        from balcap_mega.rewards.mllm.measure import read_rate

        return None, read_rate(arguments.judge_measured).captions_per_second
    gpus = arguments.judge_gpus or max(arguments.gpus_per_node, 8)
    servers = JudgeServers.of(judge_model(arguments, config), gpus, planner.cluster, planner.workload)
    return servers, servers.captions_per_second(planner.workload)


if __name__ == "__main__":
    main()
