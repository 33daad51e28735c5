"""Pictures of measurements that are written."""

from pathlib import Path

from ..errors import InputError
from .json_files import check_file
from .optional_libraries import optional_library


def check_plot(path: str | Path) -> Path:
    """The path of a picture that matplotlib can write.

    Raises:
        BackendUnavailableError: matplotlib is missing.
        InputError: no such folder or format.
    """
    optional_library("matplotlib", "bench", "for plots")
    from matplotlib.backend_bases import FigureCanvasBase

    target = check_file(path)
    formats = FigureCanvasBase.get_supported_filetypes()
    if target.suffix.removeprefix(".") not in formats:
        raise InputError(
            f"path is {str(path)!r}; expected a name that ends in one of {', '.join(sorted(formats))}. Use .png."
        )
    return target
