"""What judging costs: tokens by question, and captions a second at a server's rates.

    python benchmarks/judge.py [--json FILE] [--prompts 64] [--group 6] [--decode 6000]
        captions a second, the wait that generation hides, and the step, for one address, four, and the text questions
        elsewhere; beside them what the protocol before this one gave at the same rates (recorded)
    python benchmarks/judge.py --tokens
        tokens written and read by question on the 36 captions of `judge_captions.py`
    python benchmarks/judge.py --endpoint URL --config FILE [key=value ...] [--model NAME] [--json FILE]
        a real judge on the run's own pictures; `launch/plan.py --judge-measured FILE` plans with it

The server (tests/support/judge_rates.py) reads and writes tokens at set rates, in a batch, with a prefix cache. A
caption costs four requests, one of which carries a picture of 1,280 tokens. Generation is a schedule, not a model:
captions finish evenly over its last 70 %, as captions of different lengths do.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from judge_captions import FixtureCaption, answer_exchanges, captions, exchanges
from PIL import Image
from rich.console import Console
from rich.table import Table

from balcap_mega.cli import exit_on_user_error
from balcap_mega.config.load import load_config
from balcap_mega.config.schema import JudgeEndpoint, RewardConfig
from balcap_mega.data.records import CaptionRecord
from balcap_mega.data.sources import build_datasets
from balcap_mega.rewards.mllm.judge import JudgeReport, MllmJudge
from balcap_mega.rewards.mllm.measure import measure, write_rate
from tests.support.judge_rates import TOKENIZER, PrefixCache, Rates, prompt_tokens, token_ids

SERVER = Path(__file__).parent / "judge_server.py"
BEFORE = Path(__file__).parent / "results" / "judge_before.json"
FIRST_FINISHED = 0.3  # of the generation's duration
GENERATION_SECONDS = 8.0
ENDPOINT_RECORDS = 16
TEXT = ("split", "units", "cover", "language")
LAYOUTS = {  # addresses that see pictures, and addresses for the text questions, if those are others
    "one address": (1, 0),
    "four addresses": (4, 0),
    "one address, text questions at another": (1, 1),
    "two addresses, text questions at two others": (2, 2),
}


def count_tokens(asked: Callable[[FixtureCaption], list[tuple[str, dict, str]]]) -> dict[str, dict[str, float]]:
    """By question: tokens written and read a caption, and those of the read ones that a prefix cache has."""
    cache, found = PrefixCache(10**9), {}
    for caption in captions():
        for name, body, reply in asked(caption):
            ids = prompt_tokens(body)
            counts = found.setdefault(name, {"written": 0.0, "read": 0.0, "shared": 0.0})
            for key, tokens in (
                ("shared", cache.read(ids)),
                ("read", len(ids)),
                ("written", len(token_ids(reply)) + 1),
            ):
                counts[key] += tokens / len(captions())
    return found


@contextmanager
def serving(addresses: int, rates: Rates) -> Iterator[tuple[str, ...]]:
    """The addresses of servers in a process of their own."""
    command = [sys.executable, str(SERVER), "--addresses", str(addresses)]
    for name, value in asdict(rates).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield tuple(process.stdout.readline().split())
    finally:
        process.terminate()
        process.wait()


@contextmanager
def judging(vision: Sequence[str], text: Sequence[str]) -> Iterator[MllmJudge]:
    """A judge with these addresses, and for the text questions others if there are any."""
    endpoint = JudgeEndpoint(base_url=tuple(vision), model="vision", concurrency=256, timeout_seconds=600)
    others = {}
    if text:
        others = dict.fromkeys(TEXT, endpoint.model_copy(update={"base_url": tuple(text), "model": "text"}))
    judge = MllmJudge(RewardConfig(judge="mllm", endpoint=endpoint, question_endpoints=others))
    try:
        judge.check()  # opens the first connections
        yield judge
    finally:
        judge.close()


def make_captions(prompts: int, group: int) -> list[tuple[CaptionRecord, str]]:
    """Groups of the fixture's captions, each group about a picture of its own."""
    fixture = captions()
    made = []
    for number in range(prompts):
        place = number * group % len(fixture)
        units = fixture[place].units
        record = CaptionRecord(str(number), Image.new("RGB", (64, 64), (number % 256, 90, 40)), "Describe.", "", units)
        chosen = [fixture[(place + each) % len(fixture)].text for each in range(group)]
        made += [(record, f"{text} Take {number}.") for text in chosen]
    return made


def judge_all(judge: MllmJudge, work: Sequence[tuple[CaptionRecord, str]], generation: float = 0.0) -> float:
    """Seconds until all captions are judged, which finish over `generation` seconds and are submitted as they do."""
    start = time.perf_counter()
    futures = []
    for number, (record, text) in enumerate(work, start=1):
        finished = generation * (FIRST_FINISHED + (1 - FIRST_FINISHED) * number / len(work))
        time.sleep(max(0.0, start + finished - time.perf_counter()))
        futures.append(judge.submit(record, text))
    for future in futures:
        if None in future.result(timeout=900).components().values():
            raise RuntimeError("a judgement is missing: the server does not keep up")
    return time.perf_counter() - start


def measure_layout(vision: int, text: int, work: Sequence[tuple[CaptionRecord, str]], rates: Rates) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, generation in (("alone", 0.0), ("step", GENERATION_SECONDS)):
        with serving(vision + text, rates) as addresses, judging(addresses[:vision], addresses[vision:]) as judge:
            judge_all(
                judge, [(record, f"{text} Earlier.") for record, text in work[: len(work) // 8]]
            )  # of a step before
            before = judge.report()
            found[name] = judge_all(judge, work, generation)
            report = judge.report()
    count = len(work)
    return {
        "captions_per_second": count / found["alone"],
        "judging_alone_seconds": found["alone"],
        "generation_seconds": GENERATION_SECONDS,
        "step_seconds": found["step"],
        "hidden_fraction": 1 - (found["step"] - GENERATION_SECONDS) / found["alone"],
        "written": spent(report, before, "completion_tokens", count),
        "read": spent(report, before, "prompt_tokens", count),
        "cached": spent(report, before, "cached_tokens", count),
    }


def spent(report: JudgeReport, before: JudgeReport, name: str, count: int) -> float:
    return (getattr(report, name) - getattr(before, name)) / count


def show_tokens(console: Console) -> dict:
    now, before = count_tokens(exchanges), json.loads(BEFORE.read_text())["tokens"]
    utility = count_tokens(answer_exchanges)
    table = Table(title=f"Tokens a caption by {TOKENIZER}, mean of {len(captions())} captions")
    for head in ("", "written", "read", "of it shared", "written before", "read before", "share of before"):
        table.add_column(head, justify="right" if head else "left")
    total, earlier = ({key: sum(q[key] for q in rows.values()) for key in now["split"]} for rows in (now, before))
    for name, counts, old in [*((name, now[name], before[name]) for name in now), ("all", total, earlier)]:
        numbers = (counts["written"], counts["read"], counts["shared"], old["written"], old["read"])
        share = f"{counts['written'] / old['written']:.2f}"
        table.add_row(name, *(f"{number:.0f}" for number in numbers), share)
    for name, counts in utility.items():
        table.add_row(f"{name}, for utility", *(f"{counts[key]:.0f}" for key in ("written", "read", "shared")))
    console.print(table)
    return {"tokenizer": TOKENIZER, "captions": len(captions()), "tokens": now | utility, "before": before}


def show_rates(console: Console, options: argparse.Namespace) -> dict:
    rates = Rates(decode=options.decode, prefill=options.prefill)
    work = make_captions(options.prompts, options.group)
    recorded = json.loads(BEFORE.read_text())
    equal = recorded["rates"] == asdict(rates) and recorded["captions"] == len(work)
    rows = {f"before: {name}": row for name, row in recorded["layouts"].items()} if equal else {}
    rows |= {name: measure_layout(*layout, work, rates) for name, layout in LAYOUTS.items()}
    table = Table(title=f"{len(work)} captions; {rates.prefill:,.0f} tokens a second read, {rates.decode:,.0f} written")
    for head in (
        "",
        "captions/s",
        "alone s",
        f"step s of {GENERATION_SECONDS:.0f}",
        "hidden",
        "written",
        "read",
        "cached",
    ):
        table.add_column(head, justify="right" if head else "left")
    for name, row in rows.items():
        numbers = [f"{row['captions_per_second']:.1f}", f"{row['judging_alone_seconds']:.1f}"]
        numbers += [f"{row['step_seconds']:.1f}", f"{row['hidden_fraction']:.0%}"]
        counts = (row[key] for key in ("written", "read", "cached"))
        table.add_row(name, *numbers, *("" if count is None else f"{count:.0f}" for count in counts))
    console.print(table)
    if not equal:
        console.print("Other rates or captions than those that the protocol before was recorded at: none beside it.")
    return {"rates": asdict(rates), "captions": len(work), "layouts": rows}


def show_endpoint(console: Console, options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    if config.rewards.endpoint is None:
        raise SystemExit("judge.py: rewards.endpoint of that config is not set")
    changed = {"base_url": tuple(options.endpoint)} | ({"model": options.model} if options.model else {})
    endpoint = config.rewards.endpoint.model_copy(update=changed)
    judge = MllmJudge(config.rewards.model_copy(update={"endpoint": endpoint, "cache_dir": None}))
    try:
        judge.check()
        dataset, _ = build_datasets(config.data, config.seed)
        records = [dataset[place] for place in range(min(ENDPOINT_RECORDS, len(dataset)))]
        rate = measure(judge, records, config.rollout.group_size, timeout_seconds=3600)
    finally:
        judge.close()
    for name, value in asdict(rate).items():
        console.print(f"{name:22} {value}")
    if options.json is not None:
        write_rate(options.json, rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", action="store_true")
    parser.add_argument("--endpoint", metavar="URL", nargs="+", help="a real judge's addresses")
    parser.add_argument("--config", metavar="FILE", help="with --endpoint: the run, as YAML")
    parser.add_argument("--model", help="with --endpoint: what it serves; the config's model by default")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--group", type=int, default=6)
    parser.add_argument("--decode", type=float, default=Rates.decode, help="tokens a second that a server writes")
    parser.add_argument("--prefill", type=float, default=Rates.prefill, help="tokens a second that a server reads")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    options = parser.parse_args()
    console = Console(width=140)
    if bool(options.endpoint) != bool(options.config):
        parser.error("--endpoint and --config go together")
    if options.endpoint:
        with exit_on_user_error():
            show_endpoint(console, options)
        return
    figures = show_tokens(console) if options.tokens else show_rates(console, options)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
