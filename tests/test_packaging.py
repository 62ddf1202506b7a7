"""The wheel, the extras and the names: what a stranger gets from `pip install`."""

import importlib.metadata
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from curation import search
from curation.errors import UserError

ROOT = Path(__file__).parent.parent
OURS = {"curation", "pipelines", "embeddings", "cli", "training"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # A copy of what git knows, so that a stray build folder in the checkout cannot decide the result.
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in names:
        origin, target = ROOT / name, source / name
        if origin.is_symlink() or origin.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            if origin.is_symlink():
                target.symlink_to(origin.readlink())
            else:
                target.write_bytes(origin.read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_five_packages_and_the_configurations_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops - {t for t in tops if t.endswith(".dist-info")} == OURS
    shipped = {name for name in names if name.startswith("cli/configs/")}
    assert {"cli/configs/run.yaml", "cli/configs/lvd142m.yaml", "cli/configs/lvd1689m.yaml"} <= shipped
    assert any(name.startswith("curation/audit/templates/") for name in names)


def test_the_wheel_installed_elsewhere_runs_curate_init(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    packages = next((environment / "lib").glob("python*")) / "site-packages"
    # Dependencies come from this environment; an editable install does not: a .pth inside that folder is not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = environment / "bin" / "python"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            str(wheel),
        ],
        check=True,
    )
    where = subprocess.run(
        [python, "-c", "import cli; print(cli.__file__)"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert where.stdout.startswith(str(packages))
    done = subprocess.run(
        [environment / "bin" / "curate", "init", "mine.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "sources:" in (tmp_path / "mine.yaml").read_text()


def test_no_dependency_owns_one_of_our_names() -> None:
    owners = importlib.metadata.packages_distributions()
    for name in OURS:
        assert set(owners.get(name, [])) <= {"lvd-curate"}, f"{owners[name]} also install a top-level `{name}`"


def test_faiss_is_in_no_base_dependency() -> None:
    required = importlib.metadata.requires("lvd-curate") or []
    assert not [r for r in required if r.startswith("faiss") and "extra ==" not in r]


def test_without_faiss_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"FAISS is not installed: .*lvd-curate\[cpu\]"):
        search.require_faiss()


def test_with_both_faiss_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "installed_faiss", lambda: ["faiss-cpu", "faiss-gpu"])
    with pytest.raises(UserError, match="faiss-cpu and faiss-gpu are both installed"):
        search.require_faiss()
