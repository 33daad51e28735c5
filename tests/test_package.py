"""What is built from the checkout: sdist and wheel, whole and without warnings."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"reroute_fx": ROOT / "reroute_fx", "passes": ROOT / "passes", "kernels": ROOT / "kernels"}


def in_the_tree():
    """Names in the package of all modules and data of the checkout."""
    for name, folder in FOLDERS.items():
        place = Path("reroute_fx") if name == "reroute_fx" else Path("reroute_fx", name)
        for path in folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield (place / path.relative_to(folder)).as_posix()


def test_the_wheel_that_comes_of_the_sdist_is_whole(tmp_path):
    # Of a copy: setuptools writes into what it builds from, where others may be building.
    copied = tmp_path / "copied"
    shutil.copytree(ROOT, copied, ignore=shutil.ignore_patterns(".*", "build", "benchmarks", "*.egg-info"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(copied)]
    # Setuptools warns that it doesn't compile where Python was told not to.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "warning" not in output.lower(), output
    assert len(list(tmp_path.glob("*.tar.gz"))) == 1
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == set(in_the_tree())
    assert {"reroute_fx/methods/__init__.py", "reroute_fx/kernels/select_tokens/triton.py"} < names
    assert {"reroute_fx/py.typed", "reroute_fx/grounding/model/model.safetensors"} < names
