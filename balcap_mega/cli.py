"""How an entry point ends when its user's input is wrong: one line, exit status 2."""

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from balcap_mega.errors import UserError

RANK_0_SPEAKS_FIRST = 2.0  # seconds


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` into one line on stderr and exit status 2; any other exception keeps its traceback.

    Most bad input fails on every rank at once: rank 0 says so, and torchrun ends the others while they wait. What
    fails on another rank only (a file missing on its node) is said by that rank after the wait.
    """
    try:
        yield
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            time.sleep(RANK_0_SPEAKS_FIRST)
        message = f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}"
        if notes := getattr(error, "__notes__", ()):
            message += f" ({'; '.join(notes)})"
        print(message, file=sys.stderr, flush=True)
        tell_launcher(message)
        sys.exit(2)


def tell_launcher(message: str) -> None:
    """Why this process ends, for torchrun, which closes its own account with it."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        Path(file).write_text(json.dumps(content), encoding="utf-8")


def quiet_libraries() -> None:
    """Turn off what libraries say about one another, unless the user has asked for it; call it before importing them.

    `python -W default`, TORCH_CPP_LOG_LEVEL=INFO and HF_HUB_DISABLE_PROGRESS_BARS=0 bring it back.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        for library in ("megatron", "vllm"):
            logging.getLogger(library).setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
