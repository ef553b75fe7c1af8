"""README's order of imports is the code's: one way, function-level imports too."""

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "balcap_mega"
ANYWHERE = {"errors", "cli", "kernels"}  # import nothing of the rooms (see the test below), so any room may import them


def rooms_in_order() -> list[str]:
    """Rooms as README lists them, each after all that may import it."""
    [line] = re.findall(
        r"^balcap_mega/ +(training ─► .*)$", (REPOSITORY / "README.md").read_text("utf-8"), re.MULTILINE
    )
    return line.split(" ─► ")


def imported_rooms(file: Path) -> set[str]:
    """Names right below `balcap_mega` that this file imports, at its top or inside a function."""
    modules = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports by a relative name"
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return {module.split(".")[1] for module in modules if module.startswith("balcap_mega.")}


def files_by_room() -> dict[str, list[Path]]:
    rooms: dict[str, list[Path]] = {}
    for file in [*PACKAGE.rglob("*.py"), *(REPOSITORY / "kernels").rglob("*.py")]:
        room = "kernels" if PACKAGE not in file.parents else file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        rooms.setdefault(room, []).append(file)
    return rooms


def test_imports_point_along_readmes_arrows():
    order, beside = rooms_in_order(), {"planning", "diagnostics"}
    rooms = files_by_room()
    assert set(rooms) == {*order, *beside, *ANYWHERE, "__init__"}
    for room, files in rooms.items():
        below = {*order[order.index(room) :], *ANYWHERE} if room in order else {*order, room, *ANYWHERE}
        allowed = {room} if room in ANYWHERE else below
        for file in files:
            wrong = imported_rooms(file) - allowed - ({"errors"} if room == "cli" else set())
            assert not wrong, f"{file.relative_to(REPOSITORY)} imports {', '.join(sorted(wrong))}"


def vllm_imports(file: Path) -> set[str]:
    """vLLM's modules that this file imports, at its top or inside a function."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
    return {module for module in modules if module.split(".")[0] == "vllm"}


def test_one_folder_knows_the_insides_of_vllm():
    door = PACKAGE / "rollout" / "vllm_runtime"
    public = {PACKAGE / "diagnostics" / "software.py": {"vllm.platforms"}}  # the doctor asks which device vLLM is for
    folders = (PACKAGE, REPOSITORY / "kernels", REPOSITORY / "launch", REPOSITORY / "benchmarks")
    files = {file for folder in folders for file in folder.rglob("*.py")}
    assert {module for file in door.rglob("*.py") for module in vllm_imports(file)}
    for file in files - set(door.rglob("*.py")):
        wrong = vllm_imports(file) - public.get(file, set())
        assert not wrong, f"{file.relative_to(REPOSITORY)} imports {', '.join(sorted(wrong))}: that is for {door.name}"
        assert "vLLM 0.24" not in file.read_text("utf-8"), f"what only vLLM 0.24 needs is for {door.name}, not {file}"
