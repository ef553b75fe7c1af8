"""launch/evaluate.py --model: a checkpoint captions the images, then the judge scores the captions."""

import json
import subprocess
import sys
from pathlib import Path

import skimage

from balcap_mega.models.tiny import write_tiny_checkpoint
from tests.support.judge_server import JudgeServer

TESTS = Path(__file__).parent
PHOTOS = Path(skimage.__file__).parent / "data"


def test_a_checkpoint_is_captioned_and_scored(tmp_path):
    lines = (TESTS / "data" / "photos.jsonl").read_text().splitlines()[:4]
    (tmp_path / "references.jsonl").write_text("\n".join(lines))
    write_tiny_checkpoint(tmp_path / "model", "llava", lines)
    first = json.loads(lines[0])["image"]
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({first: "An earlier run's caption."}))
    with JudgeServer() as server:
        command = [sys.executable, "launch/evaluate.py", "bcapscore", "--model", tmp_path / "model"]
        command += ["--captions", captions, "--references", tmp_path / "references.jsonl", "--images", PHOTOS]
        command += ["--output", tmp_path / "judged.jsonl", "--judge-url", server.base_url, "--judge-model", "judge"]
        command += ["--caption-tokens", "8", "--max-model-len", "512"]
        run = subprocess.run(list(map(str, command)), cwd=TESTS.parent, capture_output=True, text=True, timeout=240)
        judged = {body["messages"][1]["content"] for body in server.asked("language")}
    assert run.returncode == 0, run.stderr[-3000:]
    written = json.loads(captions.read_text())
    assert written.pop(first) == "An earlier run's caption."
    assert len(written) == 3 and all(written.values())
    assert len(judged) >= 3
    report = json.loads((tmp_path / "judged.jsonl.report.json").read_text())
    assert report["figures"]["captions"] == 4 and report["figures"]["incomplete"] == 0
