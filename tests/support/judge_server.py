"""A judge endpoint for tests and benchmarks: real HTTP, answers by simple rules, with scripted faults and latency.

python tests/support/judge_server.py --truths tests/data/photos.jsonl

prints its address and serves until it is ended; the "units" in that file are what is true
With rates (tests/support/judge_rates.py) a reply takes as long as its tokens do on a server of that speed.
"""

import argparse
import asyncio
import json
import re
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from aiohttp import web

if __name__ == "__main__":  # started by its path, from anywhere
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support import benchmark_judge

INTERPRETATION = re.compile(r"\b(mood|depth|inviting|cosy|lively)\b", re.IGNORECASE)


NAMES = {
    frozenset({"statements"}): "verify",
    frozenset({"facts", "caption"}): "cover",
    frozenset({"reference"}): "units",
    frozenset({"caption", "question", "options"}): "answer",
}


@dataclass
class Fault:
    """One bad reply: an HTTP status, a raw body, message fields that replace the good ones, or a stall in seconds."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: str | bytes | None = None
    content: str | None = None
    refusal: str | None = None
    finish_reason: str = "stop"
    stall: float = 0.0
    hang_up: bool = False


class RuleJudge:
    """Answers the judge's questions. A statement is correct when it is one of `truths`, whatever its case."""

    def __init__(self, truths: tuple[str, ...] = ()):
        self.truths = {_plain(truth) for truth in truths}

    def __call__(self, name: str, data: dict) -> dict:
        return getattr(self, name)(data)

    def split(self, data):
        return {"assertions": _sentences(data["caption"])}

    def split_quotes(self, data):
        return {"assertions": [{"text": s, "quote": s} for s in _sentences(data["caption"])]}

    def verify(self, data):
        return numbered({number: self._letter(text) for number, text in data["statements"].items()})

    def _letter(self, statement: str) -> str:
        pointable, correct = not INTERPRETATION.search(statement), _plain(statement) in self.truths
        return ("R" if correct else "W") if pointable else ("V" if correct else "X")

    def units(self, data):
        return {"units": _sentences(data["reference"])}

    def cover(self, data):
        said = {_plain(sentence) for sentence in _sentences(data["caption"])}
        return numbered({number: "Y" if _plain(fact) in said else "N" for number, fact in data["facts"].items()})

    def answer(self, data):
        """The first option that the caption names, else the one that says that it cannot be answered."""
        options, caption = data["options"], data["caption"].casefold()
        named = [letter for letter, option in options.items() if option.casefold() in caption]
        return {"answer": (named + [x for x, option in options.items() if option.startswith("Cannot answer")])[0]}

    def ask(self, data):
        """Of three, one that the picture answers, one that common sense does, and one that nothing does."""
        choices = {"colour": ["red", "green"], "sense": ["the sky", "the sea"], "secret": ["one", "two"]}
        return {"questions": [{"question": q, "choices": c, "answer": c[0]} for q, c in choices.items()]}

    def see(self, data):
        return self._of(data, {"colour": "red", "sense": "the sky"})

    def guess(self, data):
        return self._of(data, {"sense": "the sky"})

    def _of(self, data, known):
        wanted = known.get(data["question"], "Cannot answer from the caption")
        return {"answer": next(letter for letter, option in data["options"].items() if option == wanted)}

    def plain(self, body):
        return benchmark_judge.answer(body, self.truths)

    def language(self, data):
        return {"clarity": 10, "fluency": 8, "coherency": 9}


def numbered(letters: dict[str, str]) -> dict[str, str]:
    """Verdicts as the protocol writes them: {"1": "R", "2": "W"} is "1R2W"."""
    return {"verdicts": "".join(f"{number}{letter}" for number, letter in letters.items())}


def _plain(sentence: str) -> str:
    return sentence.strip(" .\n").casefold()


def _sentences(text: str) -> list[str]:
    return [sentence.strip() for sentence in re.split(r"(?<=\.)\s+", text.strip()) if sentence.strip()]


class JudgeServer:
    """Serves `answer(question name, data)` at `base_url` on a thread of its own.

    rates:    what tokens cost; None for a server that only waits `latency` for every reply
    faults:   by question name (or "*"), the faults that its next requests meet, in order
    requests: every body received, with its question name
    """

    def __init__(
        self, answer: Callable[[str, dict], dict] | None = None, latency: float = 0.0, port: int = 0, rates=None
    ):
        self.answer = answer or RuleJudge()
        self._engine = None
        if rates is not None:
            from tests.support.judge_rates import RatedEngine  # which needs a tokenizer

            self._engine = RatedEngine(rates)
        self.latency = latency
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.requests: list[tuple[str, dict]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._port = port

    def __enter__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self):
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_post("/v1/chat/completions", self._complete)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self.base_url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    def asked(self, name: str) -> list[dict]:
        return [body for asked, body in self.requests if asked == name]

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        name = question_name(body)
        self.requests.append((name, body))
        self.headers.append(dict(request.headers))
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return await self._reply(request, name, body)
        finally:
            self._at_once -= 1

    async def _reply(self, request: web.Request, name: str, body: dict) -> web.StreamResponse:
        queue = self.faults[name] or self.faults["*"]
        fault = queue.pop(0) if queue else Fault()
        if fault.hang_up:
            request.transport.close()
        await asyncio.sleep(self.latency + fault.stall)
        number = len(self.requests)
        headers = {"x-request-id": f"server-{number}", **fault.headers}
        if fault.body is not None or fault.status != 200:
            body = fault.body or "fault"
            body = body if isinstance(body, bytes) else body.encode()
            return web.Response(status=fault.status, body=body, headers=headers)
        content = fault.content if fault.content is not None else self._content(name, body)
        contents = content if isinstance(content, list) else [content]
        message = {"role": "assistant", "refusal": fault.refusal}
        reply = {
            "id": f"chatcmpl-{number}",
            "choices": [
                {"index": i, "message": {**message, "content": text}, "finish_reason": fault.finish_reason}
                for i, text in enumerate(contents)
            ],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10},
        }
        if self._engine is not None:
            reply["usage"] = await self._engine.serve(body, "".join(contents))
        return web.json_response(reply, headers=headers)

    def _content(self, name: str, body: dict) -> str | list[str]:
        if name == "plain":
            return self.answer(name, body)
        return json.dumps(self.answer(name, user_data(body)), separators=(",", ":"))


def question_name(body: dict) -> str:
    """Of the judge's own questions, by their schema, or by their data where a dialect has none; else "plain"."""
    form = body.get("response_format", {})
    if "json_schema" in form:
        return form["json_schema"]["name"]
    try:
        keys = frozenset(user_data(body))
    except (ValueError, TypeError, AttributeError):
        return "plain"
    if keys == {"caption"}:
        return "split" if "atomic assertions" in body["messages"][0]["content"] else "language"
    return NAMES.get(keys, "plain")


def user_data(body: dict) -> dict:
    """The JSON object in a request's user message."""
    content = body["messages"][-1]["content"]
    return json.loads(content if isinstance(content, str) else content[-1]["text"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--truths", help="a JSON Lines file of references with units")
    options = parser.parse_args()
    truths = []
    if options.truths:
        with open(options.truths, encoding="utf-8") as file:
            truths = [unit for line in file for unit in json.loads(line)["units"]]
    with JudgeServer(RuleJudge(tuple(truths)), options.latency, options.port) as server:
        print(server.base_url, flush=True)
        threading.Event().wait()
