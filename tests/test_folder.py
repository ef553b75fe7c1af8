"""The run folder is one run's at a time, and a disk that is full is named."""

import errno
import os
import subprocess
import sys

import pytest

from balcap_mega.errors import UserError
from balcap_mega.training import folder as run_folder
from balcap_mega.training.folder import RunFolder, full_disk_is_named

HOLD = """
import sys
from pathlib import Path
from balcap_mega.training.folder import RunFolder
with RunFolder(Path(sys.argv[1])).held():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_held_until_its_process_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE", 0.5)
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"is in use by process {other.pid} on "), RunFolder(tmp_path).held():
        pass
    other.kill()
    other.wait()
    with RunFolder(tmp_path).held():
        assert str(os.getpid()) in (tmp_path / "lock").read_text()


def test_a_full_disk_is_the_users_to_mend_and_other_errors_are_not(tmp_path):
    named = r"metrics.jsonl could not be written: No space left.*goes on from"
    with pytest.raises(UserError, match=named), full_disk_is_named(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "metrics.jsonl"))
    with pytest.raises(PermissionError), full_disk_is_named(tmp_path):
        raise PermissionError(errno.EACCES, "no")
