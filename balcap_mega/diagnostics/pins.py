"""Compares installed versions with the requirements of setup.py (as installed) and with the lock file."""

import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from balcap_mega.diagnostics.finding import Finding, check, fail, ok, some, warn

DISTRIBUTION = "balcap-mega"
LOCKED = re.compile(r"([A-Za-z0-9._-]+)==(\S+)")
PYTHONS = {"cpu": (3, 11), "cuda": (3, 12)}  # that the lock files are resolved for


def requirements(extra: str = "") -> list[Requirement]:
    """The requirements of setup.py under that extra, or those without any."""
    found = []
    for requirement in map(Requirement, requires(DISTRIBUTION) or ()):
        if requirement.marker is None:
            wanted = extra == ""
        else:
            wanted = extra != "" and requirement.marker.evaluate({"extra": extra})
        if wanted:
            requirement.marker = None
            found.append(requirement)
    return found


@check("python")
def check_python(stack: str) -> Finding:
    """`stack` is cpu or cuda."""
    running = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] == PYTHONS[stack]:
        return ok(running)
    wanted = ".".join(map(str, PYTHONS[stack]))
    return warn(f"{running}; launch/{stack}.lock is for {wanted}", f"make .venv with Python {wanted}")


@check("packages")
def check_requirements(stack: str) -> Finding:
    """FAIL for a package that is missing, or of a version that setup.py refuses."""
    asked = [*requirements(), *(requirements("cuda") if stack == "cuda" else ())]
    problems = []
    for requirement in asked:
        installed = _version(requirement.name)
        if installed is None:
            problems.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(installed, prereleases=True):
            problems.append(f"{requirement.name} {installed} instead of {requirement.specifier}")
    if problems:
        return fail(some(problems), f"bash launch/install.sh{_option(stack)}")
    return ok(f"{len(asked)} requirements of setup.py met, torch {_version('torch')}")


@check("lock")
def check_lock(lock: Path, stack: str) -> Finding:
    """Are the versions those of `lock`? Others get a warning: they may work, but are not tested."""
    pins = {found[1]: found[2] for line in lock.read_text().splitlines() if (found := LOCKED.fullmatch(line))}
    differing = [
        f"{name} {_version(name) or 'missing'} instead of {pinned}"
        for name, pinned in pins.items()
        if _version(name) not in (pinned, pinned.split("+")[0])
    ]
    if differing:
        return warn(f"{some(differing)} (launch/{lock.name})", f"bash launch/install.sh{_option(stack)}")
    return ok(f"all {len(pins)} packages are those of launch/{lock.name}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _option(stack: str) -> str:
    return " --cuda" if stack == "cuda" else ""
