"""What belongs to the package; the rest stands in pyproject.toml.

The folders of the checkout that are packages are searched, for modules and for data, so that none can be forgotten.
"""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = {"reroute_fx": "reroute_fx", "reroute_fx.passes": "passes", "reroute_fx.kernels": "kernels"}


def packages(name: str, folder: str) -> list[str]:
    """A package and those in it."""
    return [name, *(f"{name}.{found}" for found in find_packages(folder))]


def data(folder: str) -> list[str]:
    """Files of a folder that are no modules."""
    paths = (path.relative_to(folder) for path in Path(folder).rglob("[!.]*") if path.is_file())
    return [path.as_posix() for path in paths if path.suffix not in (".py", ".pyc")]


setup(
    packages=[package for name, folder in FOLDERS.items() for package in packages(name, folder)],
    package_dir=FOLDERS,
    package_data={name: data(folder) for name, folder in FOLDERS.items()},
    # Otherwise setuptools adds what it finds in the sdist, and warns of folders with data that are no packages.
    include_package_data=False,
)
