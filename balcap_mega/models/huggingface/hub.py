"""A checkpoint that `model.path` names by its id on the Hugging Face Hub, fetched into this host's cache."""

import re
from pathlib import Path

from balcap_mega.config.load import load_config
from balcap_mega.config.preflight import RESOLVED_CONFIG
from balcap_mega.config.schema import ModelConfig, RunConfig
from balcap_mega.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Nothing that could run: no code, no pickled weights. What lies in folders is another form of the same model.
WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
NOT_WANTED = ["*/*"]


def is_on_hub(model: ModelConfig) -> bool:
    """Whether `model.path` is no folder of this host, but reads as a model's id."""
    return model.path is not None and not Path(model.path).exists() and bool(HUB_ID.fullmatch(model.path))


def with_fetched_model(config: RunConfig) -> RunConfig:
    """The run with `model.path` a folder of this host, and `model.revision` the commit that lies there.

    With `model.revision` null, a run that goes on keeps the commit it began with, wherever the Hub's branch is now.
    The ranks of a host fetch each file once: the cache has locks. HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE
    mean what they mean to huggingface_hub. Raises UserError.
    """
    model = config.model
    if not is_on_hub(model):
        return config
    folder = fetch(model.path, model.revision or _began_with(config))
    found = {"path": str(folder), "revision": folder.name}
    return config.model_copy(update={"model": model.model_copy(update=found)})


def fetch(name: str, revision: str | None) -> Path:
    """The folder with what is `WANTED` of that model; its name is the commit. Raises UserError."""
    from huggingface_hub import errors as hub  # only a run that asks for it needs the network's libraries
    from huggingface_hub import snapshot_download

    where = f"model.path={name}" + (f" model.revision={revision}" if revision else "")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=WANTED, ignore_patterns=NOT_WANTED))
    except hub.GatedRepoError:
        problem, remedy = "is a model that the Hub shows to some only", "accept its terms there, and set HF_TOKEN"
    except hub.RepositoryNotFoundError:
        problem = "is no folder here, and the Hub has no such model, or shows it to some only"
        remedy = "give a Hugging Face folder or a model's id; of a private one, set HF_TOKEN"
    except hub.RevisionNotFoundError:
        problem, remedy = "is no revision of that model", "give a branch, tag or commit that it has"
    except hub.LocalEntryNotFoundError:
        problem = "is no folder here, and the Hub cannot be asked, as HF_HUB_OFFLINE or the network has it"
        remedy = "fetch it on a host that can (hf download), or give its folder"
    except (hub.HfHubHTTPError, OSError, ValueError) as error:  # a full disk, too
        problem = f"cannot be fetched ({' '.join(str(error).split())[:300]})"
        remedy = "start again, it goes on from what is there; or give its folder"
    raise UserError(f"{where} {problem}", remedy=remedy) from None


def _began_with(config: RunConfig) -> str | None:
    """The commit with which the run in `output_dir` began, if it is one of this model."""
    resolved = Path(config.output_dir) / RESOLVED_CONFIG
    if not resolved.is_file():
        return None
    model = load_config(resolved).model
    cached = f"models--{config.model.path.replace('/', '--')}"
    return model.revision if model.path and cached in Path(model.path).parts else None
