"""What stands in the program is reached by the program: every module, function, class, variable and key of a config.

Vulture (jendrikseipp/vulture) finds names that nothing uses. Use by tests does not count. A string counts as use if it
is the name, or ends in it after a dot or a colon: workers' calls, classes and other programs' keys are named that way.
"""

import ast
import re
from functools import cache
from pathlib import Path

import vulture

REPOSITORY = Path(__file__).parent.parent
SCHEMA = REPOSITORY / "balcap_mega" / "config" / "schema"

# Reached, though nothing here says their names: {(file, names): who reaches them}.
EXCEPTIONS = {
    ("balcap_mega/data/headers.py", "START_OF_SCAN"): "tests that damage pictures",
    ("balcap_mega/parallel/cpu_redirects.py", "wait_event record_event"): "Megatron, of a CUDA stream",
    (
        "balcap_mega/parallel/master_weights.py",
        "_get_main_param_and_optimizer_states _set_main_param_and_optimizer_states",
    ): "Megatron, of a DistributedOptimizer whose state it saves or loads",
    (
        "balcap_mega/rewards/scenes/discourse.py",
        "_on_token _on_pronoun _on_background _on_ground _on_place _on_adjective _on_reads _on_relation "
        "_on_noun_phrase",
    ): "the loop over a sentence's events, by the event's name",
    ("balcap_mega/rewards/judge.py", "utility"): "a run whose reward has that component, by the component's name",
    (
        "balcap_mega/rollout/vllm_runtime/backend.py",
        "supports_draft_weight_update trainer_send_weights receive_weights shutdown",
    ): "vLLM, of a WeightTransferEngine",
    (
        "balcap_mega/rollout/refit/weight_transfer.py",
        "init_info_cls update_info_cls init_transfer_engine",
    ): "vLLM, of a WeightTransferEngine",
}
ARGUMENTS = 100  # vulture's certainty that an argument is unused; what a function is given is its caller's matter


@cache
def sources() -> dict[Path, ast.Module]:
    files = (
        file
        for folder in ("balcap_mega", "kernels", "launch", "benchmarks")
        for file in (REPOSITORY / folder).rglob("*.py")
    )
    return {file: ast.parse(file.read_text("utf-8")) for file in files if file.parent.resolve() == file.parent}


def unreached(files: dict[Path, ast.Module]) -> list[vulture.core.Item]:
    strings = {
        re.split("[.:]", node.value)[-1]
        for tree in files.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    finder = vulture.Vulture(ignore_decorators=["@field_validator*", "@model_validator*"])
    finder.scavenge(map(str, files))

    def counts(item) -> bool:
        if item.typ == "attribute":  # of an object of a library's, it is the library that reads it
            return f"self.{item.name} " in Path(item.filename).read_text("utf-8").splitlines()[item.first_lineno - 1]
        return item.confidence < ARGUMENTS

    return [item for item in finder.get_unused_code() if item.name not in strings and counts(item)]


def test_every_name_is_reached():
    named = {(file, name) for file, names in EXCEPTIONS for name in names.split()}
    found = {(str(Path(item.filename).relative_to(REPOSITORY)), item.name): item for item in unreached(sources())}
    dead = [f"{file}:{found[file, name].first_lineno} {name}" for file, name in found.keys() - named]
    assert not dead, "nothing but tests reaches " + ", ".join(sorted(dead))
    for file, name in named:
        assert name in (REPOSITORY / file).read_text("utf-8"), f"{file} has no {name} any more: drop the exception"


def test_every_key_is_read_outside_the_schema():
    finder = vulture.Vulture()
    finder.scavenge([str(file) for file in sources() if SCHEMA not in file.parents])
    keys = [
        f"{section.name}.{field.target.id}"
        for file, tree in sources().items()
        if SCHEMA in file.parents
        for section in ast.walk(tree)
        if isinstance(section, ast.ClassDef)
        for field in section.body
        if isinstance(field, ast.AnnAssign)
    ]
    through_methods = {"RewardConfig.component_endpoints", "RewardConfig.question_endpoints"}  # `endpoints`
    dead = [key for key in keys if key.rpartition(".")[2] not in finder.used_names]
    dead = [key for key in dead if not key.startswith("HabitsConfig.")]  # read all at once, by their names
    assert len(keys) > 50 and set(dead) <= through_methods, dead


def test_every_module_is_imported():
    imported = set()
    for tree in sources().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                imported.add(node.value)  # by which vLLM imports what it is to run
    for file in sources():
        module = ".".join(file.relative_to(REPOSITORY).with_suffix("").parts)
        if module.startswith("balcap_mega.") and file.name != "__init__.py":
            assert module in imported, f"nothing but tests imports {module}"
