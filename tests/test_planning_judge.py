"""The judge in a plan: its tokens are the protocol's own, and a step waits for what its GPUs cannot keep up with."""

import json
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from balcap_mega.config.load import load_config
from balcap_mega.config.schema import ComponentConfig, RewardConfig
from balcap_mega.errors import UserError
from balcap_mega.planning import judge
from balcap_mega.planning.hardware import Cluster
from balcap_mega.planning.judge import JudgeServers
from balcap_mega.planning.layout import Layout
from balcap_mega.planning.plan import Planner
from balcap_mega.planning.search import split_nodes
from balcap_mega.planning.workload import Workload

ROOT = Path(__file__).parent.parent
MODEL = "Qwen/Qwen2.5-VL-72B-Instruct"
PAPERS = "precision recall linguistic"
sys.path.insert(0, str(ROOT / "benchmarks"))
import judge_captions  # noqa: E402

from tests.support.judge_rates import IMAGE_TOKENS, PrefixCache, prompt_tokens, token_ids  # noqa: E402
from tests.support.plan_command import plan_command  # noqa: E402


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner.of(load_config(ROOT / "configs" / "qwen2_5_vl_3b.yaml"), Cluster(1))


def counted(exchanges) -> dict[str, Counter]:
    """Tokens by question, as the benchmark counts them: means over the fixture's captions."""
    captions, cache = judge_captions.captions(), PrefixCache(10**9)
    found = defaultdict(Counter)
    for caption in captions:
        for name, body, reply in exchanges(caption):
            ids = prompt_tokens(body)
            counts = {"shared": cache.read(ids), "read": len(ids), "written": len(token_ids(reply)) + 1}
            found[name].update({key: tokens / len(captions) for key, tokens in counts.items()})
    return found


def test_the_fixture_is_what_it_says():
    captions = judge_captions.captions()
    assert len({caption.text for caption in captions}) == len(captions) >= 30
    for caption in captions:
        assert 80 <= len(caption.text.split()) <= 250 and 15 <= len(caption.assertions) <= 45


def test_a_caption_costs_a_third_of_the_protocol_before_and_the_planner_counts_alike():
    captions, found = judge_captions.captions(), counted(judge_captions.exchanges)
    before = json.loads((ROOT / "benchmarks" / "results" / "judge_before.json").read_text())["tokens"]
    written = sum(counts["written"] for counts in found.values())
    assert written <= 0.33 * sum(question["written"] for question in before.values())
    length = sum(len(token_ids(caption.text)) for caption in captions) / len(captions)
    assert length == pytest.approx(judge.FIXTURE_CAPTION_TOKENS, rel=0.01)
    found["verify"].subtract(read=IMAGE_TOKENS, shared=(1 - 1 / len(judge_captions.CAPTIONS)) * IMAGE_TOKENS)
    answers = counted(judge_captions.answer_exchanges)["answer"]
    found["answer"] = Counter({key: tokens / judge_captions.QUESTIONS for key, tokens in answers.items()})
    assert found.keys() == judge.PROTOCOL.keys()
    for question, planned in judge.PROTOCOL.items():
        counts = found[question]
        assert planned.written == pytest.approx(counts["written"], rel=0.01)
        assert planned.cached == pytest.approx(counts["shared"], rel=0.01)
        assert planned.computed == pytest.approx(counts["read"] - counts["shared"], rel=0.01)


def test_the_fixtures_judge_gives_the_same_verdicts_as_its_letters_say():
    """Over HTTP, through the whole judge: what the protocol writes is what it reads."""
    from PIL import Image

    from balcap_mega.config.schema import JudgeEndpoint, RewardConfig
    from balcap_mega.data.records import CaptionRecord
    from balcap_mega.rewards.judge import Verdict
    from balcap_mega.rewards.mllm.judge import MllmJudge
    from tests.support.judge_rates import Rates
    from tests.support.judge_server import JudgeServer

    letters = {"R": Verdict.VERIFIED, "W": Verdict.WRONG, "V": Verdict.NOT_POINTABLE, "X": Verdict.NOT_POINTABLE}
    fast = Rates(prefill=1e7, decode=1e6, token_seconds=1e-5)
    with JudgeServer(judge_captions.FixtureJudge(), rates=fast) as server:
        endpoint = JudgeEndpoint(base_url=server.base_url, model="judge")
        mllm = MllmJudge(RewardConfig(judge="mllm", endpoint=endpoint))
        for caption in judge_captions.captions()[::7]:
            record = CaptionRecord(caption.scene, Image.new("RGB", (40, 30)), "", "", caption.units)
            found = mllm.submit(record, caption.text).result(60)
            expected = {judge_captions.telegram(a): judge_captions.verdict(a) for a in caption.assertions}
            assert [a.text for a in found.assertions] == list(expected)
            assert [a.verdict for a in found.assertions] == [letters[letter] for letter in expected.values()]
            assert found.covered == caption.covered
        report = mllm.report()
        mllm.close()
    assert 0 < report.cached_tokens < report.prompt_tokens and report.completion_tokens > 5 * 200


def test_the_wait_follows_from_the_judges_gpus(planner):
    layout = Layout.of(planner.config)
    waits = []
    for gpus in (4, 8, 16, 64, 512):
        rate = JudgeServers.of(MODEL, gpus, planner.cluster, planner.workload).captions_per_second(planner.workload)
        waits.append(replace(planner, captions_per_second=rate, _known={}).plan(layout).seconds["rewards"])
    assert waits[0] > 1.9 * waits[1] > 3 * waits[2] and waits[-1] == 0
    servers = JudgeServers.of(MODEL, 8, planner.cluster, planner.workload)
    rollout = planner.plan(layout).seconds["rollout"]
    enough = servers.gpus_to_hide(planner.workload, rollout)
    each = servers.captions_per_second(planner.workload) / servers.servers * (enough / servers.tensor)
    assert each * rollout >= planner.workload.captions > (each - each / (enough / servers.tensor)) * rollout


def test_longer_captions_and_larger_judges_cost_more(planner):
    rate = JudgeServers.of(MODEL, 8, planner.cluster, planner.workload).captions_per_second(planner.workload)
    longer = replace(planner.workload, caption_tokens=2 * planner.workload.caption_tokens)
    assert JudgeServers.of(MODEL, 8, planner.cluster, longer).captions_per_second(longer) < 0.6 * rate
    small = JudgeServers.of("Qwen/Qwen2.5-VL-7B-Instruct-AWQ", 8, planner.cluster, planner.workload)
    assert small.captions_per_second(planner.workload) > 3 * rate
    with pytest.raises(UserError, match="does not fit 1 judge GPUs"):
        JudgeServers.of(MODEL, 1, planner.cluster, planner.workload)
    with pytest.raises(UserError, match="no released model"):
        JudgeServers.of("gpt-5", 8, planner.cluster, planner.workload)


def test_a_judge_is_charged_for_what_the_components_ask(planner):
    rates, tokens = {}, {}
    for names in ("precision", "recall", "utility", PAPERS, f"{PAPERS} utility"):
        rewards = RewardConfig(components={name: ComponentConfig(source=name) for name in names.split()})
        asked = Workload.of(planner.config.model_copy(update={"rewards": rewards}), planner.architecture)
        rates[names] = JudgeServers.of(MODEL, 8, planner.cluster, asked).captions_per_second(asked)
        tokens[names] = judge.tokens(asked)
    three, image = tokens[PAPERS], asked.image_tokens
    longer = asked.caption_tokens / judge.FIXTURE_CAPTION_TOKENS
    assert three.written == pytest.approx(363.5 * longer)
    assert tokens["recall"].written == pytest.approx(judge.PROTOCOL["cover"].written * longer)
    assert tokens["recall"].computed + tokens["recall"].cached < image < sum(tokens["precision"])  # who sees the image
    assert tokens["utility"].written == pytest.approx(5 * judge.PROTOCOL["answer"].written * longer)
    assert sum(tokens[f"{PAPERS} utility"]) == pytest.approx(sum(three) + sum(tokens["utility"]))
    assert rates["recall"] > 3 * rates[PAPERS] > 3 * rates[f"{PAPERS} utility"]


@pytest.mark.timeout(280)
def test_a_budget_of_nodes_is_shared_out(planner):
    splits = split_nodes(planner, MODEL, 3)
    assert {(split.training, split.judging) for split in splits} == {(1, 2), (2, 1)}
    assert splits[0].plan.step_seconds <= splits[1].plan.step_seconds
    assert splits[0].judging == 2, "a 3B is trained faster than a 72B judges it"


def test_the_command_line_always_charges_the_judge(tmp_path):
    command = ["--config", str(ROOT / "configs" / "qwen2_5_vl_7b.yaml"), "--json", str(tmp_path / "plan.json")]
    rate = {
        "model": "m", "addresses": 1, "captions": 8, "complete": 8, "captions_per_second": 2.0, "written": 1.0,
        "read": 1.0, "cached": 0.0, "failures": {},
    }  # fmt: skip
    (tmp_path / "rate.json").write_text(json.dumps(rate))
    waits = {}
    for name, options in {
        "node": [],
        "two nodes": ["--judge-gpus", "16"],
        "measured": ["--judge-measured", str(tmp_path / "rate.json")],
    }.items():
        done = plan_command(*command, *options)
        assert done.returncode == 0, done.stderr
        assert "a step waits" in done.stdout and "would hide it" in done.stdout
        waits[name] = json.loads((tmp_path / "plan.json").read_text())["plan"]["seconds"]["rewards"]
    assert waits["measured"] > 400 > waits["node"] > 1.9 * waits["two nodes"] > 0
