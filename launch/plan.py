#!/usr/bin/env python3
"""Predict memory and step time of a run before it is started; needs neither GPUs nor weights:

    python launch/plan.py --config configs/RUN.yaml --nodes N [key=value ...]      the layout as configured
    python launch/plan.py --config configs/RUN.yaml --nodes N --search             every layout, the best first
    python launch/plan.py --config configs/RUN.yaml --nodes N --measured ROWS.json from what one GPU was measured to do
    python launch/plan.py --measured ROWS.json                                     measured against predicted
    python launch/plan.py --published                                              published against predicted

Where model.path is not on this machine, its name says which released model is meant. A layout that the run would
refuse, or that does not fit, ends with status 2 and the reason.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from balcap_mega.cli import exit_on_user_error, quiet_libraries
from balcap_mega.config.load import load_config


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
    parser.add_argument("--captions-per-second", type=float, help="that the judge sustains; it keeps up if not given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys that replace the file's")
    arguments = parser.parse_args()
    if not (arguments.config or arguments.measured or arguments.published):
        parser.error("give --config, --measured or --published")
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
    from balcap_mega.planning.search import search

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
            captions_per_second=arguments.captions_per_second,
        )
        tables.print_facts(console, planner)
        if arguments.search:
            results = search(planner, fp8=arguments.fp8)
            tables.print_search(console, planner, results)
            found |= tables.search_as_json(results)
        else:
            one = planner.plan(Layout.of(config))
            tables.print_plan(console, planner, one)
            found["plan"] = tables.as_json(one)
    return found


if __name__ == "__main__":
    main()
