"""launch/evaluate.py --model: a checkpoint captions the images, then the judge scores the captions."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import skimage

from balcap_mega.evaluation.pictures import Pictures
from balcap_mega.evaluation.provenance import CaptionsMaker, Provenance, checkpoint_digest
from balcap_mega.models.tiny import write_tiny_checkpoint
from tests.support.judge_server import JudgeServer

TESTS = Path(__file__).parent
PHOTOS = Path(skimage.__file__).parent / "data"


PROMPT = "Describe this image in detail."


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A folder in which a checkpoint captioned three photos, on top of the caption of an interrupted run."""
    folder = tmp_path_factory.mktemp("captioning")
    lines = (TESTS / "data" / "photos.jsonl").read_text().splitlines()[:4]
    (folder / "references.jsonl").write_text("\n".join(lines))
    write_tiny_checkpoint(folder / "model", "llava", lines)
    first = json.loads(lines[0])["image"]
    earlier = {first: "An earlier run's caption."}
    maker = CaptionsMaker(str(folder / "model"), checkpoint_digest(folder / "model"), PROMPT, 8)
    provenance = Provenance(maker)
    provenance.add(earlier, Pictures.look_at(PHOTOS, [first]).digests)
    provenance.write(folder / "captions.json")
    (folder / "captions.json").write_text(json.dumps(earlier))
    with JudgeServer() as server:
        command = [sys.executable, "launch/evaluate.py", "bcapscore", *options(folder, server.base_url)]
        run = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=240)
        judged = {body["messages"][1]["content"] for body in server.asked("language")}
    assert run.returncode == 0, run.stderr[-3000:]
    return folder, first, judged


def options(folder: Path, url: str) -> list[str]:
    named = ["--model", folder / "model", "--captions", folder / "captions.json", "--images", PHOTOS]
    named += ["--references", folder / "references.jsonl", "--output", folder / "judged.jsonl"]
    named += ["--judge-url", url, "--judge-model", "judge", "--caption-tokens", "8", "--max-model-len", "512"]
    return list(map(str, named))


def test_a_checkpoint_is_captioned_and_scored(scored):
    folder, first, judged = scored
    written = json.loads((folder / "captions.json").read_text())
    assert written.pop(first) == "An earlier run's caption."
    assert len(written) == 3 and all(written.values())
    assert len(judged) >= 3
    report = json.loads((folder / "judged.jsonl.report.json").read_text())
    assert report["figures"]["captions"] == 4 and report["figures"]["incomplete"] == 0
    assert report["captions_by"]["checkpoint"] == str(folder / "model")
    assert report["captions_by"]["content"] == checkpoint_digest(folder / "model")


def refused(capsys, monkeypatch, arguments: list[str]) -> str:
    """What launch/evaluate.py says as it refuses these, before anything is asked."""
    with JudgeServer() as server:
        at_server = [server.base_url if argument == "URL" else argument for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "bcapscore", *at_server])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(TESTS.parent / "launch" / "evaluate.py"), run_name="__main__")
        assert exit.value.code == 2 and not server.requests
    return capsys.readouterr().err


def test_finished_captions_of_another_checkpoint_are_refused(scored, tmp_path, monkeypatch, capsys):
    folder, first, _ = scored
    arguments = options(folder, "URL")
    arguments[arguments.index(str(folder / "model"))] = "/no/such/checkpoint"
    assert "--model /no/such/checkpoint" in refused(capsys, monkeypatch, arguments)

    other = shutil.copytree(folder / "model", tmp_path / "model")  # the same but for one weight
    weights = next(other.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    arguments[arguments.index("/no/such/checkpoint")] = str(other)
    assert "captions of another making" in refused(capsys, monkeypatch, arguments)

    assert "prompt" in refused(capsys, monkeypatch, [*options(folder, "URL"), "--caption-prompt", "Say more."])
    kept = json.loads((folder / "captions.json").read_text())
    try:
        (folder / "captions.json").write_text(json.dumps(kept | {first: "Edited by hand."}))
        assert first in refused(capsys, monkeypatch, options(folder, "URL"))
    finally:
        (folder / "captions.json").write_text(json.dumps(kept))
    (tmp_path / "foreign.json").write_text(json.dumps(kept))
    arguments = options(folder, "URL")
    arguments[arguments.index(str(folder / "captions.json"))] = str(tmp_path / "foreign.json")
    message = refused(capsys, monkeypatch, arguments)
    assert "nothing says that" in message and "leave out --model" in message
