"""The judge's endpoints over real HTTP: dialects, several addresses, pressure, credentials and what the cache knows."""

import asyncio
import json
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path

import pytest
from aiohttp import web

from balcap_mega.config.schema import DialectConfig, JudgeEndpoint, RewardConfig
from balcap_mega.errors import UserError
from balcap_mega.rewards.mllm.addresses import Addresses
from balcap_mega.rewards.mllm.dialect import as_sent
from balcap_mega.rewards.mllm.judge import MllmJudge
from balcap_mega.rewards.mllm.pressure import AdaptiveLimit
from balcap_mega.training.judging import patience
from tests.support.distributed import free_port
from tests.support.judge_server import Fault, JudgeServer, RuleJudge
from tests.test_judge_mllm import CAPTION, FAILURE_SECONDS, TRUTHS, judged, make_judge, make_record
from tests.test_security import RawServer

REFUSALS = json.loads((Path(__file__).parent / "data" / "judge_refusals.json").read_text())


@pytest.fixture
def server():
    with JudgeServer(RuleJudge(TRUTHS)) as server:
        yield server


# ---- dialects

REMEDIES = {
    "temperature_not_supported": "rewards.endpoint.dialect.temperature=false",
    "wants_max_tokens": "rewards.endpoint.dialect.token_limit=max_tokens",
    "no_json_schema": "rewards.endpoint.dialect.replies=json_object",
    "no_images": "rewards.question_endpoints.verify",
    "no_seed": "rewards.endpoint.dialect.seed=false",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_the_check_shows_the_servers_words_and_the_setting_that_helps(server, name):
    refusal = REFUSALS[name]
    question = "verify" if name == "no_images" else "language"
    server.faults[question] = [Fault(status=refusal["status"], body=json.dumps(refusal["body"]))]
    judge = make_judge(server)
    with pytest.raises(UserError) as caught:
        judge.check()
    judge.close()
    message = refusal["body"]["error"]["message"] if "error" in refusal["body"] else refusal["body"]["detail"]
    assert message in caught.value.problem and REMEDIES[name] in caught.value.remedy


BODY = {
    "messages": [],
    "max_completion_tokens": 100,
    "temperature": 0,
    "top_p": 0.9,
    "seed": 0,
    "response_format": {"type": "json_schema", "json_schema": {"schema": {"pattern": "^1$", "type": "string"}}},
}


@pytest.mark.parametrize(
    ("dialect", "left_out", "has"),
    [
        ({}, set(), {"max_completion_tokens": 100}),
        ({"token_limit": "max_tokens"}, {"max_completion_tokens"}, {"max_tokens": 100}),
        ({"thinking_tokens": 4000}, set(), {"max_completion_tokens": 4100}),
        ({"temperature": False}, {"temperature", "top_p"}, {"seed": 0}),
        ({"seed": False}, {"seed"}, {"temperature": 0}),
        ({"replies": "none"}, {"response_format"}, {}),
        ({"replies": "json_object"}, set(), {"response_format": {"type": "json_object"}}),
        (
            {"patterns": False},
            set(),
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "string"}}}},
        ),
        ({"extra_body": {"top_k": 1}}, set(), {"top_k": 1}),
    ],
)
def test_a_request_is_put_as_the_dialect_says(dialect, left_out, has):
    sent = as_sent(BODY, "judge", DialectConfig(**dialect))
    assert sent["model"] == "judge" and not left_out & set(sent)
    assert sent | has == sent
    assert set(BODY) - left_out <= set(sent)


def test_a_whole_caption_is_judged_in_the_barest_dialect(server):
    bare = {"token_limit": "max_tokens", "temperature": False, "seed": False, "replies": "none"}
    judge = make_judge(server, dialect=bare)
    server.faults["verify"] = [Fault(content="{")]  # and a second opinion needs neither temperature nor seed
    judge.check(["language", "units", "cover", "split"])
    with_schemas = make_judge(server)
    assert judged(judge, CAPTION) == judged(with_schemas, CAPTION)
    judge.close()
    with_schemas.close()
    sent = [body for _, body in server.requests if "response_format" not in body]
    assert len(sent) >= 8 and not any({"temperature", "seed", "max_completion_tokens"} & set(body) for body in sent)


# ---- placement


def test_each_question_can_have_an_endpoint_of_its_own():
    with ExitStack() as stack:
        names = ("split", "verify", "units", "cover", "language")
        servers = {name: stack.enter_context(JudgeServer(RuleJudge(TRUTHS))) for name in names}
        endpoints = {name: JudgeEndpoint(base_url=server.base_url, model=name) for name, server in servers.items()}
        default = JudgeEndpoint(base_url="http://127.0.0.1:1/v1", model="nobody")
        judge = MllmJudge(RewardConfig(judge="mllm", endpoint=default, question_endpoints=endpoints))
        judge.check()
        assert judged(judge, CAPTION).components() == pytest.approx(
            {"precision": 0.5, "recall": 2 / 3, "linguistic": 0.9}
        )
        judge.close()
        for name, server in servers.items():
            assert {(asked, body["model"]) for asked, body in server.requests} == {(name, name)}


def test_an_images_requests_go_to_one_address_and_a_lost_address_loses_none():
    with ExitStack() as stack:
        servers = [stack.enter_context(JudgeServer(RuleJudge(TRUTHS), latency=0.02)) for _ in range(3)]
        addresses = [server.base_url for server in servers]
        endpoint = JudgeEndpoint(base_url=addresses, model="judge", timeout_seconds=20, max_retries=0)
        judge = MllmJudge(RewardConfig(judge="mllm", endpoint=endpoint), backoff_seconds=0.01)
        records = [make_record(f"photo {number}", units=("There is a red car",)) for number in range(12)]

        def judge_all(start: int) -> list:
            futures = [judge.submit(record, f"{CAPTION} Take {start + n}.") for record in records for n in range(3)]
            return [future.result(FAILURE_SECONDS).components() for future in futures]

        assert all(None not in found.values() for found in judge_all(0))
        assert sum(len(server.requests) for server in servers) == 36 * 4
        assert all(len(server.requests) % 12 == 0 for server in servers), "a record's twelve requests stay together"
        assert all(server.requests for server in servers)
        lost = servers[0]
        lost.stop()
        assert all(None not in found.values() for found in judge_all(10))
        report = judge.report()
        assert report.moved > 0 and not report.failures and not report.missing
        back = JudgeServer(RuleJudge(TRUTHS), port=int(lost.base_url.split(":")[2].split("/")[0]))
        with back:  # at the address of the lost one
            deadline = time.monotonic() + 30
            while not back.requests and time.monotonic() < deadline:
                judge_all(20)
                time.sleep(0.2)
            assert back.requests, "an address that answers again is taken back"
        judge.close()


def test_only_a_lost_addresss_keys_move():
    async def places() -> None:
        async def never(url: str) -> bool:
            return False

        addresses = Addresses([f"http://host{n}/v1" for n in range(4)], 8, never)
        keys = [str(number) for number in range(400)]
        before = {key: addresses.order(key)[0] for key in keys}
        shares = [sum(first is address for first in before.values()) for address in addresses.all]
        assert all(60 < share < 140 for share in shares)
        for _ in range(3):
            addresses.failed(addresses.all[2])
        after = {key: addresses.order(key)[0] for key in keys}
        assert {key for key in keys if before[key] is not after[key]} == {
            key for key in keys if before[key] is addresses.all[2]
        }
        await addresses.close()

    asyncio.run(places())


def test_the_job_shares_an_addresss_concurrency():
    with JudgeServer(RuleJudge(TRUTHS), latency=0.05) as server:
        endpoint = JudgeEndpoint(base_url=server.base_url, model="judge", concurrency=8)
        judges = [MllmJudge(RewardConfig(judge="mllm", endpoint=endpoint), sharers=4) for _ in range(4)]
        futures = [
            judge.submit(make_record(units=("x",)), f"Caption {number}.") for number in range(8) for judge in judges
        ]
        for future in futures:
            future.result(FAILURE_SECONDS)
        for judge in judges:
            judge.close()
        assert server.most_at_once <= 8


def test_patience_covers_every_address_that_a_question_may_be_sent_to():
    def config(**changes):
        return RewardConfig(judge="mllm", endpoint=JudgeEndpoint(base_url="http://a/v1", model="m"), **changes)

    slow = JudgeEndpoint(base_url=["http://b/v1", "http://c/v1"], model="m", timeout_seconds=500)
    assert patience(config(question_endpoints={"split": slow})) > 1.9 * patience(config()) * 500 / 120


# ---- pressure


def limit_after(events, ceiling: int = 64) -> AdaptiveLimit:
    """The limit after rounds of ("ok", seconds) or ("refused",), under load: whoever ends is followed by the next."""

    async def play() -> AdaptiveLimit:
        limit, under_way = AdaptiveLimit(ceiling), deque()
        for kind, *seconds in events:
            for _ in range(int(limit.limit)):
                while limit.under_way < int(limit.limit):
                    under_way.append(await limit.begin())
                limit.end(under_way.popleft(), "verify", *seconds, refused=kind == "refused")
        return limit

    return asyncio.run(play())


def test_concurrency_grows_while_answers_come_quickly_up_to_its_ceiling():
    assert limit_after([("ok", 1.0)] * 2).limit == 32
    assert limit_after([("ok", 1.0)] * 10).limit == 64
    assert limit_after([("ok", 1.0)] * 10, ceiling=5).limit == 5


def test_a_refused_round_halves_it_once_and_it_grows_by_one_a_round_afterwards():
    assert limit_after([("ok", 1.0)] * 4 + [("refused",)]).limit == 32
    assert 33 < limit_after([("ok", 1.0)] * 4 + [("refused",)] + [("ok", 1.0)] * 2).limit < 35
    assert limit_after([("refused",)] * 50).limit == 1


def test_answers_that_take_longer_lower_it():
    assert limit_after([("ok", 1.0)] * 4 + [("ok", 5.0)]).limit <= 48
    assert limit_after([("ok", 1.0)] * 4 + [("ok", 1.3)]).limit == 64


def test_who_waits_is_served_in_turn_and_a_cancelled_one_holds_no_place():
    async def play() -> None:
        limit = AdaptiveLimit(1)
        first = await limit.begin()
        second, third = (asyncio.ensure_future(limit.begin()) for _ in range(2))
        await asyncio.sleep(0)
        second.cancel()
        limit.end(first, "", 1.0)
        limit.end(await asyncio.wait_for(third, 1), "", 1.0)
        assert limit.under_way == 0
        limit.end(await asyncio.wait_for(limit.begin(), 1))

    asyncio.run(play())


def test_questions_about_a_caption_do_not_wait_behind_those_about_a_later_one():
    with JudgeServer(RuleJudge(TRUTHS), latency=0.05) as server:
        judge = make_judge(server, concurrency=1)
        for future in [judge.submit(make_record(units=("x",)), f"Caption {number}.") for number in range(3)]:
            future.result(FAILURE_SECONDS)
        judge.close()
    asked = [json.dumps(body).partition("Caption ")[2][0] for _, body in server.requests]
    assert asked.count("0") == 4  # split, cover, language, and verify, which waits for split's answer
    for caption in "01":  # one later request may have got the place that split left
        last = len(asked) - asked[::-1].index(caption)
        assert sum(other > caption for other in asked[:last]) <= 1


def test_a_server_that_says_429_is_asked_less_at_once_and_every_caption_is_judged():
    at_once = 0

    class Busy(JudgeServer):
        async def _reply(self, request, name, body):
            if self._at_once > 4:
                return web.Response(status=429)
            return await super()._reply(request, name, body)

    with Busy(RuleJudge(TRUTHS), latency=0.02) as server:
        judge = make_judge(server, max_retries=30)
        futures = [judge.submit(make_record(units=("x",)), f"Caption {number}.") for number in range(40)]
        at_once = [future.result(FAILURE_SECONDS) for future in futures]
        assert all(None not in judgement.components().values() for judgement in at_once)
        report = judge.report()
        assert report.retries["http_429"] > 0 and report.limit < 16 and report.waited_seconds > 0
        assert report.retries["http_429"] < 160, "it does not go on asking as much"
        judge.close()


# ---- credentials and proxies


def test_netrc_decides_nothing(server, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password hunter2\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-123")
    for changes, sent in (({}, None), ({"api_key_env": "JUDGE_KEY"}, "Bearer sk-secret-123")):
        judge = make_judge(server, **changes)
        assert None not in judged(judge, CAPTION).components().values()
        judge.close()
        assert {headers.get("Authorization") for headers in server.headers} == {sent}
        server.headers.clear()


def test_the_environments_proxy_is_used_with_its_own_credentials_and_no_others(monkeypatch, tmp_path):
    async def proxy(request: web.Request) -> web.Response:
        return web.json_response(
            {"choices": [{"message": {"content": '{"clarity": 8, "fluency": 9, "coherency": 7}'}}]}
        )

    netrc = tmp_path / "netrc"
    netrc.write_text("machine judge.example login me password hunter2\nmachine 127.0.0.1 login me password hunter2\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with RawServer(proxy) as server:
        for credentials, expected in (("", None), ("me:pass@", "Basic bWU6cGFzcw==")):
            monkeypatch.setenv("http_proxy", f"http://{credentials}127.0.0.1:{server.port}")
            endpoint = JudgeEndpoint(base_url="http://judge.example/v1", model="m", max_retries=0)
            judge = MllmJudge(RewardConfig(judge="mllm", endpoint=endpoint))
            judge.check(["language"])
            judge.close()
            request = server.requests[-1]
            assert str(request.url).startswith("http://judge.example/v1/")
            assert request.headers.get("Proxy-Authorization") == expected and "Authorization" not in request.headers


# ---- what the cache knows


def test_the_cache_knows_address_model_and_dialect(server, tmp_path):
    with JudgeServer(RuleJudge()) as other:
        asked = {}
        for name, at, changes in (
            ("first", server, {}),
            ("again", server, {}),
            ("other address", other, {}),
            ("other dialect", server, {"dialect": {"extra_body": {"top_k": 1}}}),
            ("other form", server, {"dialect": {"replies": "json_object"}}),
        ):
            at.requests.clear()
            judge = make_judge(at, tmp_path / "cache", **changes)
            judged(judge, CAPTION)
            judge.close()
            asked[name] = len(at.requests)
        both = JudgeEndpoint(base_url=[server.base_url, f"http://127.0.0.1:{free_port()}/v1"], model="judge")
        judge = MllmJudge(RewardConfig(judge="mllm", endpoint=both, cache_dir=str(tmp_path / "cache")))
        judged(judge, CAPTION)
        judge.close()
    assert asked == {"first": 5, "again": 0, "other address": 5, "other dialect": 5, "other form": 5}
    assert judge.report().cache_hits == 5, "an address more forgets nothing"


# ---- captions that assert more than a judge can check


@pytest.mark.parametrize(
    "reply",
    [
        Fault(content=json.dumps({"assertions": [f"object {n}" for n in range(129)]})),
        Fault(content=json.dumps({"assertions": [f"object {n}" for n in range(500)]})),
        Fault(content=json.dumps({"assertions": [f"object {n}" for n in range(500)]})[:2000], finish_reason="length"),
    ],
    ids=["one more", "many more", "cut"],
)
def test_more_assertions_than_can_be_checked_never_pay(server, reply):
    server.faults["split"] = [reply]
    judge = make_judge(server, max_retries=0)
    judgement = judged(judge, " ".join(f"There is a red car {n}." for n in range(500)))
    judge.close()
    assert judgement.precision == 0.0 and not server.asked("verify")


def test_a_judge_that_runs_away_over_a_short_caption_is_not_believed(server):
    server.faults["split"] = [Fault(content=json.dumps({"assertions": ["red car"] * 400}))]
    judge = make_judge(server)
    assert judged(judge, CAPTION).precision == 0.5 and judge.report().retries == {"off_schema": 1}
    judge.close()


def test_quotes_are_asked_for_only_where_they_will_be_shown(server):
    judge = make_judge(server)
    plain = judge.submit(make_record(), CAPTION).result(FAILURE_SECONDS)
    assert {name for name, _ in server.requests} >= {"split"} and not server.asked("split_quotes")
    quoted = judge.submit(make_record(), CAPTION, quotes=True).result(FAILURE_SECONDS)
    assert len(server.asked("split_quotes")) == 1 and len(server.asked("split")) == 1
    assert plain == quoted  # a claim in the caption's own words is found without being quoted
    judge.close()


def test_what_requests_share_comes_first(server):
    judge = make_judge(server)
    record = make_record(units=("There is a red car", "A dog sits on the car"))
    for number in range(2):
        judge.submit(record, f"Take {number}. {CAPTION}").result(FAILURE_SECONDS)
    judge.close()
    for name, shared in (("verify", '"statements"'), ("cover", '"facts"')):
        first, second = (json.dumps(body["messages"]) for body in server.asked(name))
        same = next(place for place in range(len(first)) if first[place] != second[place])
        assert first.index(shared.replace('"', '\\"')) < same and "Take" in first[same - 10 : same + 10]
    image, text = server.asked("verify")[0]["messages"][1]["content"]
    assert image["type"] == "image_url" and text["type"] == "text"
