"""Hooks of MkDocs: what the pages link to outside of `docs/`, and the package for the API reference."""

import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)]*)?\)")


@event_priority(100)  # before the plugin that reads it
def on_config(config: Any) -> None:
    """Put the package together as it is installed; griffe doesn't know that setup.py maps two folders into it."""
    package = ROOT / "build" / "api" / "reroute_fx"
    shutil.rmtree(package, ignore_errors=True)
    for source, place in (("reroute_fx", ""), ("passes", "passes"), ("kernels", "kernels")):
        no_code = shutil.ignore_patterns("model", "data", "__pycache__")
        shutil.copytree(ROOT / source, package / place, ignore=no_code, dirs_exist_ok=True)


def on_files(files: Files, config: Any) -> Files:
    """Files of the repository that a page links to become files of the site: it has no other place to link to."""
    for page in files.documentation_pages():
        for path, _ in LINK.findall(page.content_string):
            if not (ROOT / path).exists():
                raise PluginError(f"{page.src_uri} links to {path}, which is not in the repository.")
            for source in [ROOT / path] if (ROOT / path).is_file() else _index(ROOT / path):
                name = _on_site(source)
                if files.get_file_from_path(name) is None:
                    files.append(File.generated(config, name, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links that work in the repository, changed to where the site has the file."""
    return LINK.sub(lambda link: f"]({_target(ROOT / link[1])}{link[2] or ''})", markdown)


def _target(path: Path) -> str:
    return _on_site(path if path.is_file() else _index(path)[0])


def _index(folder: Path) -> list[Path]:
    """What stands for a folder: what it says of itself, then its modules."""
    return sorted(folder.glob("__init__.py")) + sorted(folder.glob("[a-z]*.py"))


def _on_site(path: Path) -> str:
    """A name that browsers show as text."""
    name = path.relative_to(ROOT).as_posix()
    return f"source/{name}.txt" if path.suffix in (".py", ".md") else f"source/{name}"
