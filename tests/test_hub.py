"""A model by its id on the Hub: a server of its protocol on this host, huggingface_hub itself as the client."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = {
    name: f"content of {name}".encode()
    for name in (
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "merges.txt",
        "tokenizer.model",
        "modeling_evil.py",
        "pytorch_model.bin",
        "weights.pkl",
        "LICENSE.txt",
        "original/config.json",
        "README.md",
    )
}
WANTED = {name for name in FILES if re.fullmatch(r"[^/]+\.(json|safetensors|jinja|txt|model)", name)} - {"LICENSE.txt"}
FIRST, SECOND = "a1" * 20, "b2" * 20
SCRIPT = """
import sys
from balcap_mega.cli import exit_on_user_error
from balcap_mega.config.load import dump_config, load_config
from balcap_mega.models.huggingface.hub import with_fetched_model
with exit_on_user_error():
    config = with_fetched_model(load_config(sys.argv[1], sys.argv[2:]))
    print(config.model.path, config.model.revision)
"""


class Hub:
    """`org/model`, whose branch `main` is at `head`; other commits have the same files."""

    def __init__(self):
        hub, self.head, self.sent = self, FIRST, Counter()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                hub.answer(self)

            def do_GET(self):
                hub.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.split("?")[0]
        headers, body, status = {}, b"", 404
        if found := re.fullmatch(r"/api/models/org/model(/revision/(.+))?", path):
            revision = found[2] or "main"
            if revision in ("main", FIRST, SECOND):
                sha = self.head if revision == "main" else revision
                files = [{"rfilename": name, "size": len(data)} for name, data in FILES.items()]
                body = json.dumps({"id": "org/model", "modelId": "org/model", "sha": sha, "siblings": files}).encode()
                headers, status = {"Content-Type": "application/json"}, 200
            else:
                headers = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}
        elif found := re.fullmatch(r"/api/models/org/model/tree/([^/]+)", path):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in FILES.items()
            ]
            body, headers, status = json.dumps(tree).encode(), {"Content-Type": "application/json"}, 200
        elif found := re.fullmatch(r"/org/model/resolve/([^/]+)/(.+)", path):
            commit = self.head if found[1] == "main" else found[1]
            body, status = FILES[found[2]], 200
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
            if request.command == "GET":
                self.sent[found[2]] += 1
        else:
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.server.shutdown()


def start(hub: Hub, folder: Path, *overrides: str, offline: bool = False) -> subprocess.Popen:
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "configs/scenes_smoke.yaml", "model={path: org/model}",
         f"output_dir={folder / 'run'}", *overrides],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    return out if process.returncode == 0 else err


def test_a_model_is_fetched_once_a_host_at_one_commit_and_a_run_stays_there(hub, tmp_path):
    ranks = [start(hub, tmp_path) for _ in range(2)]
    outputs = {ended(rank) for rank in ranks}
    assert len(outputs) == 1
    path, revision = outputs.pop().split()
    assert revision == FIRST and {file.name for file in Path(path).iterdir()} == WANTED
    assert hub.sent == Counter(dict.fromkeys(WANTED, 1))  # nothing that could run, and each by one rank alone
    run = tmp_path / "run"
    run.mkdir()
    config = {"path": path, "revision": revision}
    smoke = (ROOT / "configs" / "scenes_smoke.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"(?m)^model:(\n .*)+", f"model: {json.dumps(config)}", smoke))
    hub.head = SECOND
    later, elsewhere, asked, without = (
        start(hub, tmp_path), start(hub, tmp_path, f"output_dir={tmp_path / 'new'}"),
        start(hub, tmp_path, f"model.revision={SECOND}"), start(hub, tmp_path, offline=True),
    )  # fmt: skip
    assert [ended(one).split()[-1] for one in (later, elsewhere, asked, without)] == [FIRST, SECOND, SECOND, FIRST]


def test_what_cannot_be_fetched_is_one_line(hub, tmp_path):
    cases = {
        "model={path: org/other}": "the Hub has no such model",
        "model={path: org/model, revision: v9}": "no revision of that model",
        "model={path: models/llava-1.5-7b-hf}": "is no folder here",
    }
    started = [start(hub, tmp_path, override) for override in cases] + [start(hub, tmp_path, offline=True)]
    for process, reason in zip(started, [*cases.values(), "cannot be asked"], strict=True):
        output = ended(process)
        assert reason in output and process.returncode == 2
