"""CaptionQA and DCScore beside a run: what a run that goes on asks for, drops and reports again."""

import json
import time

import pytest
import torch
from PIL import Image

from balcap_mega.config.schema import RunConfig
from balcap_mega.errors import UserError
from balcap_mega.training.benchmarks import Benchmarks
from tests.support.distributed import free_port
from tests.support.judge_server import JudgeServer


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def configuration(tmp_path, url: str, **endpoint) -> RunConfig:
    asked = {"question": "What is it?", "choices": ["cat", "cup"], "answer": "cup"}
    (tmp_path / "questions.json").write_text(json.dumps([{"id": "a", "questions": [asked]}]))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    files = {"questions": str(tmp_path / "questions.json"), "images": str(tmp_path)}
    return RunConfig(
        output_dir=str(tmp_path),
        eval_every=1,
        model={"tiny": "llava"},
        benchmarks={"captionqa": files, "endpoint": {"base_url": url, "model": "judge", **endpoint}},
    )


def test_a_run_that_goes_on_judges_what_was_captioned_and_drops_what_comes_again(tmp_path, one_rank):
    device = torch.device("cpu")
    for steps in (1, 2, 5):
        folder = tmp_path / "benchmarks" / f"step_{steps:06d}"
        folder.mkdir(parents=True)
        (folder / "captionqa_captions.json").write_text(json.dumps({"a": "A cup." if steps == 1 else "A cat."}))
    figures = tmp_path / "benchmarks" / "step_000002" / "captionqa_figures.json"
    figures.write_text(json.dumps({"benchmark/captionqa": 50.0}))  # judged, and killed before it was reported
    with JudgeServer() as server:
        benchmarks = Benchmarks(configuration(tmp_path, server.base_url), tmp_path, device)
        benchmarks.go_on(3)
        rows: dict[int, dict] = {}
        deadline = time.monotonic() + 30
        while len(rows) < 2 and time.monotonic() < deadline:
            benchmarks.report(lambda steps, found: rows.update({steps: dict(found)}))
            time.sleep(0.05)
        assert len(server.requests) == 1
    assert rows == {
        1: {"benchmark/captionqa": 100.0, "benchmark/captionqa_judged": 1.0},
        2: {"benchmark/captionqa": 50.0},
    }
    assert not (tmp_path / "benchmarks" / "step_000005").exists()


def test_bad_input_is_refused_before_a_model_is_loaded(tmp_path, one_rank):
    device = torch.device("cpu")
    with pytest.raises(UserError, match="NOT_SET_ANYWHERE"):
        Benchmarks(configuration(tmp_path, "http://127.0.0.1:9/v1", api_key_env="NOT_SET_ANYWHERE"), tmp_path, device)
    config = configuration(tmp_path, "http://127.0.0.1:9/v1")
    (tmp_path / "questions.json").unlink()
    with pytest.raises(UserError, match=r"questions\.json"):
        Benchmarks(config, tmp_path, device)
