"""Install into a virtual environment with uv, which takes no file twice, from where pip would: .ci/install.py VENV ...

pip's settings (pip.conf, PIP_*) say where packages come from; uv doesn't read them and is told here.
"""

import os
import subprocess
import sys
from pathlib import Path

NAMES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "cert": ("SSL_CERT_FILE", " "),
}
"""uv's variable for a setting of pip, and what stands between several values."""


def settings_of_pip() -> dict[str, str]:
    """Variables for uv."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    values = {}
    # Lines such as global.find-links='/opt/wheels'; the environment, as :env:.find-links, overrules files.
    for line in sorted(lines, key=lambda line: line.startswith(":env:")):
        key, _, value = line.partition("=")
        values[key.rpartition(".")[2]] = value.strip("'").replace("\\n", " ").split()
    return {name: between.join(values[key]) for key, (name, between) in NAMES.items() if values.get(key)}


def main() -> None:
    """Bring uv into this environment if need be, and let it install."""
    venv, *requirements = sys.argv[1:]
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "uv>=0.9,<1"], check=True)
    # pip knows no order of indexes: the best version of all of them is taken.
    variables = {**settings_of_pip(), "UV_INDEX_STRATEGY": "unsafe-best-match", **os.environ}
    command = [uv, "pip", "install", "--quiet", "--python", Path(venv) / "bin" / "python", *requirements]
    raise SystemExit(subprocess.run(command, env=variables).returncode)


if __name__ == "__main__":
    main()
