"""The judge against a real vLLM server on the CPU: schemas, images, seeds and token counts as users will meet them."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from balcap_mega.config.schema import JudgeEndpoint, RewardConfig
from balcap_mega.data.records import CaptionRecord
from balcap_mega.models.tiny import write_tiny_checkpoint
from balcap_mega.rewards.mllm import questions
from balcap_mega.rewards.mllm.judge import MllmJudge
from tests.support.distributed import free_port

CAPTION = "Red above blue."
SPLIT = '{"assertions":["Red","blue"]}'
UNITS = '{"units":["Red","blue"]}'
START_SECONDS = 240


def write_tiny_judge(folder: Path) -> Path:
    """A random model that knows two replies, those with free text, by heart; the schemas alone shape the others.

    Each of the two is a token of its own, and its row of the LM head is the state in which the question ends.
    """
    texts = [questions.prompt(name) for name in ("split", "verify", "units", "cover", "language")]
    write_tiny_checkpoint(folder, "qwen2_5_vl", texts, text_config={"max_position_embeddings": 8192})
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor.tokenizer.add_tokens([SPLIT, UNITS])
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    for question, reply in [(questions.split(CAPTION), SPLIT), (questions.units(CAPTION), UNITS)]:
        text = processor.apply_chat_template(question.body["messages"], tokenize=False, add_generation_prompt=True)
        with torch.no_grad():
            states = model.model(**processor.tokenizer(text, return_tensors="pt")).last_hidden_state
            model.lm_head.weight[processor.tokenizer.convert_tokens_to_ids(reply)] = states[0, -1]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = write_tiny_judge(tmp_path_factory.mktemp("judge") / "model")
    port = free_port()
    log = folder.parent / "server.log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "judge",
        "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--dtype", "float32", "--max-model-len", "8192",
        "--max-num-seqs", "8", "--enable-prefix-caching", "--enable-prompt-tokens-details",
        "--limit-mm-per-prompt", '{"image": 1, "video": 0}',
        # Without this a weak judge may fill its reply with spaces, which JSON allows, up to the token limit.
        "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
    ]  # fmt: skip
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("wb") as output:
        server = subprocess.Popen(
            list(map(str, command)), env=environment, cwd=folder.parent, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            wait_until_healthy(server, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(timeout=60)


def wait_until_healthy(server: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            with opener.open(url, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.5)
    raise TimeoutError(f"no healthy server within {START_SECONDS} s:\n{log.read_text()[-4000:]}")


def make_judge(address: str, model: str = "judge", **changes) -> MllmJudge:
    endpoint = JudgeEndpoint(base_url=address, model=model, **changes)
    return MllmJudge(RewardConfig(judge="mllm", endpoint=endpoint), backoff_seconds=0.1)


@pytest.mark.timeout(400)
def test_the_whole_path_runs_against_vllm(address):
    judge = make_judge(address)
    judge.check()
    records = [CaptionRecord(f"photo {side}", Image.new("RGB", (side, 84), "red"), "", CAPTION) for side in (84, 140)]
    judgements = [judge.submit(record, CAPTION).result(120) for record in [*records, *records]]
    for judgement in judgements:
        assert [a.text for a in judgement.assertions] == ["Red", "blue"]
        assert [CAPTION[a.start : a.stop] for a in judgement.assertions] == ["Red", "blue"]
        assert len(judgement.covered) == 2
        assert all(0 <= score <= 1 for score in judgement.components().values())
    assert judgements[:2] == judgements[2:]  # greedy and seeded: the same caption, the same judgement
    report = judge.report()
    assert not report.missing and not report.retries
    # The check; one extraction of the units that both records share; four questions a caption. The image costs tokens.
    assert report.requests == 5 + 1 + 4 * 4
    assert report.prompt_tokens > 22 * 100 and report.completion_tokens >= 22
    assert report.cached_tokens > 16 * 50, "instructions, and the image before what differs, are in the prefix cache"
    judge.close()

    stranger = make_judge(address, model="another", max_retries=0)
    judgement = stranger.submit(records[0], CAPTION).result(120)
    assert set(judgement.components().values()) == {None}
    assert stranger.report().failures == {"http_404": 3}
    stranger.close()
