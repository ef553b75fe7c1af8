"""The folder `kernels/` is `balcap_mega.kernels` in every kind of install, and never Hugging Face's `kernels`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code: str, cwd: Path, *options: str, path: Path | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    run = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_transformers_sees_no_kernels_package_from_the_root():
    """Unless the real one is installed, and then it sees that one."""
    code = """
from importlib.util import find_spec
import balcap_mega.kernels.lm_head
from transformers.utils.import_utils import is_kernels_available
spec = find_spec("kernels")
print(is_kernels_available(), spec is not None and spec.origin is not None)
"""
    assert python(code, ROOT).splitlines()[-1] in ("False False", "True True")


def test_an_installed_kernels_distribution_wins_from_the_root(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '99.0'\n")
    code = "import kernels, balcap_mega.kernels.lm_head as ours; print(kernels.__version__, ours.__file__)"
    version, ours = python(code, ROOT, path=tmp_path).split(maxsplit=1)
    assert version == "99.0"
    assert Path(ours).resolve() == ROOT / "kernels" / "lm_head.py"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """What a wheel made from a source archive holds."""
    folder = tmp_path_factory.mktemp("package")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("balcap_mega", "kernels"):
        shutil.copytree(ROOT / name, folder / "checkout" / name, symlinks=True, ignore=ignore)
    shutil.copy(ROOT / "setup.py", folder / "checkout")

    def setup(cwd: Path, *arguments: str) -> None:
        command = [sys.executable, "setup.py", "-q", *arguments]
        subprocess.run(command, cwd=cwd, check=True, capture_output=True, timeout=120)

    setup(folder / "checkout", "sdist", "--dist-dir", str(folder / "archive"))
    (archive,) = (folder / "archive").iterdir()
    shutil.unpack_archive(archive, folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    setup(source, "build", "--build-lib", str(folder / "installed"))
    return folder / "installed"


def test_an_install_holds_the_kernels_inside_the_package(built, tmp_path):
    assert not (built / "kernels").exists()
    code = """
from importlib.util import find_spec
print(find_spec("balcap_mega.kernels.lm_head").origin, find_spec("kernels"))
"""
    origin, top_level = python(code, tmp_path, "-S", path=built).split()
    assert Path(origin) == built / "balcap_mega" / "kernels" / "lm_head.py"
    assert top_level == "None"
