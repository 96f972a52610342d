"""Builds the package in every way a user may, installs it in a fresh environment, and looks at what arrived."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "shared")

CHECK = """
import importlib.util, pathlib, sys
import pcm_fast, pcm_fast._native, pcm_fast.kernels
print(pathlib.Path(pcm_fast._native.__file__).parent)
assert pcm_fast.__version__ and pcm_fast.kernels.__version__ == "0"
found = importlib.util.find_spec("kernels")
assert found is None or not pathlib.Path(found.origin).samefile(pcm_fast.kernels.__file__), found
from pcm_fast.presets import trained_experts, trained_pcm
for directory in (*trained_experts().values(), trained_pcm()):
    assert (directory / "adapter_model.safetensors").is_file(), directory
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    whole = {**os.environ, "PCM_FAST_CUDA": "0", **environment}  # what CUDA adds is built once, for tests/gpu
    return subprocess.run([str(word) for word in command], cwd=cwd, env=whole, capture_output=True, text=True)


def run_well(*command: str | Path, cwd: Path, **environment: str) -> str:
    result = run(*command, cwd=cwd, **environment)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


class Environment:
    """A fresh virtual environment that also sees the packages of the one that runs the tests, save ours."""

    def __init__(self, path: Path) -> None:
        self.path = path
        venv.create(path, with_pip=False)
        self.python = path / "bin" / "python"
        # A path file inside another environment's folder is not read: our own editable install stays out of sight.
        (self.site_packages / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")

    @property
    def site_packages(self) -> Path:
        return next((self.path / "lib").glob("python*/site-packages"))

    def install(self, *what: str | Path, cwd: Path, **environment: str) -> None:
        pip = [sys.executable, "-m", "pip", "--python", self.python]
        flags = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
        run_well(*pip, "install", *flags, *what, cwd=cwd, **environment)

    def check(self, cwd: Path) -> Path:
        """Imports everything, runs the console script; returns where the extension lies."""
        help_text = run_well(self.path / "bin" / "pcm-fast", "--help", cwd=cwd)
        assert "generate" in help_text
        return Path(run_well(self.python, "-c", CHECK, cwd=cwd).strip())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, so that nothing is built into the one under test."""
    target = tmp_path_factory.mktemp("source") / "pcm-fast"
    shutil.copytree(ROOT, target, ignore=LEFT_OUT)
    return target


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run_well(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (archive,) = folder.glob("pcm_fast-*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel made of the sdist, so that one compilation tests both."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    run_well(*pip, "--wheel-dir", folder, sdist, cwd=folder)
    (archive,) = folder.glob("pcm_fast-*.whl")
    return archive


def test_sdist_holds_every_source(sdist: Path, source: Path) -> None:
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    folders = ["pcm_fast", "csrc", "kernels", "tests", "bench", "docs"]
    wanted = {
        str(path.relative_to(source)) for folder in folders for path in (source / folder).rglob("*.*") if path.is_file()
    }
    wanted -= {name for name in wanted if ".egg-info" in name or name.endswith((".so", ".pyc"))}
    wanted |= {"pyproject.toml", "setup.py", "README.md", "LICENSE", "Makefile"}
    assert wanted - inside == set()


def test_wheel_holds_the_package_and_nothing_else(wheel: Path, source: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        metadata = archive.read(next(name for name in inside if name.endswith("METADATA"))).decode()
    assert {name.partition("/")[0] for name in inside if ".dist-info/" not in name} == {"pcm_fast"}
    package = {str(path.relative_to(source)) for path in (source / "pcm_fast").rglob("*.py")}
    package |= {f"pcm_fast/{path.relative_to(source)}" for path in (source / "kernels").rglob("*.py")}
    assert package - inside == set()
    assert "pcm_fast/py.typed" in inside
    assert sum(name.startswith("pcm_fast/_native.") and name.endswith(".so") for name in inside) == 1
    assert "License-Expression: Apache-2.0" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in inside)


def test_wheel_install(wheel: Path, source: Path, tmp_path: Path) -> None:
    fresh = Environment(tmp_path / "venv")
    fresh.install(wheel, cwd=tmp_path)
    assert fresh.check(cwd=tmp_path) == fresh.site_packages / "pcm_fast"
    # A console script does not put the working directory on the path: the sources do not hide the installed package.
    assert "generate" in run_well(fresh.path / "bin" / "pcm-fast", "--help", cwd=source)


def test_editable_install(source: Path, tmp_path: Path) -> None:
    fresh = Environment(tmp_path / "venv")
    fresh.install("--editable", source, cwd=tmp_path)
    assert fresh.check(cwd=tmp_path) == source / "pcm_fast"
    run_well(fresh.python, "-c", "import pcm_fast._native, pcm_fast.kernels", cwd=source)


def test_transformers_imports_beside_our_kernels(tmp_path: Path) -> None:
    """Hugging Face has a package ``kernels`` too; with the repository root on the path transformers finds ours."""
    code = "import transformers, transformers.integrations.hub_kernels, kernels; print(kernels.__file__)"
    found = run_well(sys.executable, "-c", code, cwd=ROOT)
    assert Path(found.strip()) == ROOT / "kernels" / "__init__.py"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("1", "PCM_FAST_CUDA=1: no CUDA toolkit found (nvcc is not on PATH)"),
        ("foo", "PCM_FAST_CUDA: expected 0, 1 or auto, got 'foo'"),
    ],
)
def test_cuda_switch_refuses(choice: str, message: str, source: Path, tmp_path: Path) -> None:
    result = run(sys.executable, "setup.py", "--version", cwd=source, PCM_FAST_CUDA=choice, PATH=str(tmp_path))
    assert result.returncode != 0
    assert message in result.stderr


def test_cuda_switch_off(source: Path) -> None:
    version = run_well(sys.executable, "setup.py", "--version", cwd=source, PCM_FAST_CUDA="0")
    automatic = run_well(sys.executable, "setup.py", "--version", cwd=source, PCM_FAST_CUDA="auto")
    assert version.split()[-1] == automatic.split()[-1]
