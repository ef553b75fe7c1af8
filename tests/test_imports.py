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
