"""Time the MLLM judge against a local server that takes a set time for every reply.

    python benchmarks/judge.py [--json FILE] [--latency 0.5] [--prompts 64] [--group 8] [--concurrency 64]

throughput  captions and requests a second, all captions at once against one caption after another with one request at
            a time; and with no latency at all, which is what the client and the server themselves cost.
step        a step in which captions finish generating over a period longer than the judging: judged as they finish,
            against judged when all are finished, against one after another (from the measured rate). The share hidden
            is 1 - (step - generation) / (judging alone).

The server (tests/support/judge_server.py) is a process of its own. Every caption costs four requests, two of them one
after the other, and one of them carries a 512 x 512 photo. Generation is a schedule, not a model: captions finish
evenly over its last 70 %, as captions of different lengths do.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from balcap_mega.config.schema import JudgeEndpoint, RewardConfig
from balcap_mega.data.records import CaptionRecord
from balcap_mega.rewards.mllm.judge import MllmJudge

SERVER = Path(__file__).parents[1] / "tests" / "support" / "judge_server.py"
REQUESTS_A_CAPTION = 4  # split, verify, cover, language; the units are given
FIRST_FINISHED = 0.3  # of the generation's duration
UNITS = tuple(f"There is object {number}." for number in range(8))


@contextmanager
def serving(latency: float) -> Iterator[str]:
    """The address of a judge server in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, str(SERVER), "--latency", str(latency)], stdout=subprocess.PIPE, text=True
    )
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


@contextmanager
def judging(address: str, concurrency: int) -> Iterator[MllmJudge]:
    endpoint = JudgeEndpoint(base_url=address, model="judge", concurrency=concurrency)
    judge = MllmJudge(RewardConfig(judge="mllm", endpoint=endpoint))
    try:
        judge.check()  # opens the first connection
        yield judge
    finally:
        judge.close()


def make_captions(prompts: int, group: int) -> list[tuple[CaptionRecord, str]]:
    noise = np.random.default_rng(0)
    photos = [Image.fromarray(noise.integers(0, 256, (64, 64, 3), np.uint8)).resize((512, 512)) for _ in range(prompts)]
    records = [CaptionRecord(str(i), photo, "Describe.", "…", UNITS) for i, photo in enumerate(photos)]
    text = " ".join(f"There is object {number} in the picture." for number in range(10))
    return [(record, f"{text} This is caption {number}.") for record in records for number in range(group)]


def judge_all(judge: MllmJudge, captions: list[tuple[CaptionRecord, str]]) -> float:
    """Seconds to judge all captions, submitted together."""
    start = time.perf_counter()
    futures = [judge.submit(record, text) for record, text in captions]
    wait(futures)
    return time.perf_counter() - start


def judge_one_by_one(judge: MllmJudge, captions: list[tuple[CaptionRecord, str]]) -> float:
    start = time.perf_counter()
    for record, text in captions:
        wait([judge.submit(record, text)])
    return time.perf_counter() - start


def step(judge: MllmJudge, captions: list[tuple[CaptionRecord, str]], generation: float) -> float:
    """Seconds of a step whose captions finish over `generation` seconds and are judged as they do."""
    start = time.perf_counter()
    futures = []
    for number, (record, text) in enumerate(captions, start=1):
        finished = generation * (FIRST_FINISHED + (1 - FIRST_FINISHED) * number / len(captions))
        time.sleep(max(0.0, start + finished - time.perf_counter()))
        futures.append(judge.submit(record, text))
    wait(futures)
    return time.perf_counter() - start


def wait(futures) -> None:
    for future in futures:
        if None in future.result(timeout=600).components().values():
            raise RuntimeError("a judgement is missing: the server does not keep up")


def measure(latency: float, prompts: int, group: int, concurrency: int) -> dict[str, float]:
    captions = make_captions(prompts, group)
    one_by_one = captions[:: max(1, len(captions) // 5)][:5]
    with serving(latency) as address:
        with judging(address, 1) as judge:
            single = len(one_by_one) / judge_one_by_one(judge, one_by_one)
        with judging(address, concurrency) as judge:
            alone = judge_all(judge, captions)
        generation = 1.5 * alone
        with judging(address, concurrency) as judge:
            overlapped = step(judge, captions, generation)
    with serving(0.0) as address, judging(address, concurrency) as judge:
        bare = judge_all(judge, captions)
    count = len(captions)
    return {
        "latency_seconds": latency,
        "captions": count,
        "concurrency": concurrency,
        "captions_per_second": count / alone,
        "requests_per_second": REQUESTS_A_CAPTION * count / alone,
        "captions_per_second_one_by_one": single,
        "speedup": count / alone / single,
        "requests_per_second_without_latency": REQUESTS_A_CAPTION * count / bare,
        "generation_seconds": generation,
        "judging_alone_seconds": alone,
        "step_seconds_overlapped": overlapped,
        "step_seconds_judged_afterwards": generation + alone,
        "step_seconds_one_by_one": generation + count / single,
        "hidden_fraction": 1 - (overlapped - generation) / alone,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.5)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = measure(options.latency, options.prompts, options.group, options.concurrency)
    for name, value in figures.items():
        print(f"{name:38} {value:10.3f}")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
