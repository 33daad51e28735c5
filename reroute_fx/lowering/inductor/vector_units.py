"""Find out which vector units compiled code may use, while something else goes on.

Before its first kernel for a CPU Inductor builds and loads up to ten small libraries, one after the other, and waits
for the processes that do it: seconds with an empty cache, a second with a full one.
"""

import contextvars
import threading
from contextlib import suppress

import torch

_asking: threading.Thread | None = None


def ask_early(device: torch.device) -> None:
    """Begin to find out, once in a process; Inductor keeps the answer."""
    global _asking
    if device.type != "cpu" or _asking is not None:
        return
    # Modules are imported by this thread, which goes on to import others.
    from torch._inductor import codecache, cpp_builder, cpu_vec_isa  # noqa: F401

    def ask() -> None:
        # Who compiles asks again, and meets the error.
        with suppress(Exception):
            cpu_vec_isa.pick_vec_isa()

    # Settings of torch may hold in this context only.
    run = contextvars.copy_context().run
    _asking = threading.Thread(target=run, args=(ask,), name="vector units", daemon=True)
    _asking.start()


def wait_for_answer() -> None:
    """Let nobody ask what is being found out."""
    if _asking is not None:
        _asking.join()
