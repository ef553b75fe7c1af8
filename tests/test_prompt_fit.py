"""What does not fit is found before the first step; and a remedy names what the program then accepts."""

import ast
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import balcap_mega
from balcap_mega.config.load import dotted_keys, load_config
from balcap_mega.config.schema import MAY_CHANGE, RunConfig
from balcap_mega.data.files import ImageFileDataset, ImageRow
from balcap_mega.data.records import CaptionRecord
from balcap_mega.errors import UserError
from balcap_mega.models.families import FAMILIES
from balcap_mega.models.processing import PromptProcessor
from balcap_mega.training.prompt_fit import fitting
from tests.support.distributed import launch

PROMPT = "Describe the image."


def record(size: tuple[int, int], prompt: str = PROMPT) -> CaptionRecord:
    return CaptionRecord("0", Image.new("RGB", size, "green"), prompt, "A field.")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompts_length_is_told_by_the_pictures_size_alone(tiny_checkpoint, family):
    processor = PromptProcessor(tiny_checkpoint(family))
    for size in ((28, 28), (140, 84), (83, 301), (640, 480), (57, 3)):
        for prompt in (PROMPT, "What is it? Say it in some more words."):
            processed = processor(record(size, prompt))
            assert processor.prompt_length(prompt, size) == len(processed.prompt_token_ids)
            assert processor.check(record(size, prompt)) == len(processed.prompt_token_ids)


@pytest.mark.parametrize(
    ("template", "named"),
    [
        (None, "holds no chat template"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "makes 0 images of a message of one image"),
        ("{% for m in messages %}{{ 'User: ' + m['content'] }}{% endfor %}", "fails on an image and a text"),
        ("<image><|image_pad|>", "leaves the text out"),
    ],
)
def test_a_chat_template_that_takes_no_images_is_named(tiny_checkpoint, tmp_path, template, named):
    folder = shutil.copytree(tiny_checkpoint("llava"), tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=named) as error:
        PromptProcessor(folder).check(record((28, 28)))
    assert str(folder) in error.value.problem and "chat template takes images" in error.value.remedy


def fit(folder: str, root: str) -> list[str]:
    """On two ranks, of which each reads every other header: what is refused, and what is left."""
    rows = [ImageRow(f"{n}", f"{n}.png", PROMPT, "A field.") for n in range(10)]
    dataset = ImageFileDataset(rows, root)
    base = {
        "output_dir": "unused", "model": {"path": folder},
        "data": {"source": "jsonl", "path": "rows.jsonl"}, "rewards": {"judge": "mllm"},
        "rollout": {"max_model_len": 128, "max_tokens": 8},
    }  # fmt: skip
    base["rewards"]["endpoint"] = {"base_url": "http://judge/v1", "model": "m"}

    def config(**data) -> RunConfig:
        return RunConfig.model_validate(base | {"data": base["data"] | data})

    said = []
    for refused in (config(), config(too_long="leave_out")):
        with pytest.raises(UserError) as error:
            fitting(refused, [dataset], torch.device("cpu"))
        said.append(str(error.value))
    [left] = fitting(config(too_long="leave_out", max_missing_fraction=0.2), [dataset], torch.device("cpu"))
    return [*said, *(row.image for row in left.rows)]


def test_records_that_do_not_fit_are_named_or_left_out_alike_on_every_rank(tiny_checkpoint, tmp_path):
    for n in range(10):
        Image.new("RGB", (700, 560) if n in (3, 6) else (56, 56)).save(tmp_path / f"{n}.png")
    one, other = launch(2, fit, str(tiny_checkpoint("qwen2_5_vl")), str(tmp_path))
    assert one == other
    refused, too_many, *left = one
    assert re.search(r"2 of 10 records of data.path=rows.jsonl .*: 3\.png \(\d+ tokens\), 6\.png", refused)
    assert "set data.max_pixels" in refused and "data.too_long=leave_out" in refused
    assert "data.max_missing_fraction is 0.01" in too_many
    assert left == [f"{n}.png" for n in range(10) if n not in (3, 6)]


# Remedies

SOURCE = Path(balcap_mega.__file__).parent
KEYS = set(dotted_keys())
SECTIONS = "|".join(sorted({key.split(".")[0] for key in KEYS if "." in key}))
NAMED = re.compile(rf"(?<![\w./])((?:{SECTIONS})(?:\.[a-z_0-9]+)+)\b(?!\()(?:=([\w.]+))?")
# Raised once a run has a folder: there a remedy may only name what a run that goes on may change, or ask for a new one.
IN_A_RUN = ("training", "rollout", "rewards", "packing", "algorithm")
BEFORE_A_RUN = ("training/prompt_fit.py", "training/inputs.py")  # raised before its folder holds a configuration


def constants(node: ast.expr) -> str:
    texts = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
    return " ".join(text for text in texts if isinstance(text, str))


def names(node: ast.expr) -> list[str]:
    return [each.id for each in ast.walk(node) if isinstance(each, ast.Name)]


def remedies() -> list[tuple[str, str]]:
    """(file:line, text) of all that is given as a remedy; in health.py remedies are whatever names keys."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
        given = {name: constants(node.value) for node in assigned for target in node.targets for name in names(target)}
        for node in ast.walk(tree):
            values = []
            if isinstance(node, ast.keyword) and node.arg == "remedy":
                values = [node.value]
            elif isinstance(node, ast.Assign):
                named = any(getattr(target, "id", "") == "remedy" for target in node.targets)
                values = [node.value] if named or path.name == "health.py" else []
            elif isinstance(node, ast.Call) and path.name == "health.py":
                values = node.args
            for value in values:
                text = constants(value) + " " + " ".join(given.get(name, "") for name in names(value))
                found.append((f"{path.relative_to(SOURCE)}:{value.lineno}", text))
    return found


def may_change(key: str) -> bool:
    kind = RunConfig
    for name in key.split("."):
        field = kind.model_fields[name]
        if MAY_CHANGE in field.metadata:
            return True
        kind = field.annotation
    return False


def test_every_remedy_names_keys_that_the_program_then_accepts():
    checked = 0
    for where, text in remedies():
        for key, value in NAMED.findall(text):
            if (SOURCE / key.replace(".", "/")).exists() or key.endswith((".py", ".sh", ".md")):
                continue
            assert key in KEYS, f"{where}: {key} is no key: {text}"
            checked += 1
            if value and not value.isdigit():
                try:
                    load_config("configs/scenes_smoke.yaml", [f"{key}={value}"])
                except UserError as error:
                    assert f"{key}=" not in error.problem, f"{where}: {error}"
            if where.startswith(IN_A_RUN) and not where.startswith(BEFORE_A_RUN):
                assert may_change(key) or "new run" in text, f"{where}: a run that goes on refuses {key}: {text}"
    assert checked > 25
