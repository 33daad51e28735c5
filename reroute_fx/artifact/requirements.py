"""What a machine has to offer to run compiled code."""

import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ArtifactError

_INSTRUCTIONS = re.compile(
    r"(sse|ssse|avx|amx|fma|bmi|f16c|popcnt|movbe|abm|gfni|vaes|vpclmul|sve|asimd|i8mm|bf16).*"
)
"""Names of instruction sets, as the system calls them, that a compiler uses where it finds them."""


@dataclass(frozen=True)
class Requirements:
    """What the code of an artifact was compiled for.

    Attributes:
        torch_release: whose libraries the code calls.
        device: ``"cpu"`` or ``"cuda"``.
        machine: of the processor, such as ``"x86_64"``.
        instructions: instruction sets that the processor has to have.
        capability: compute capability of the GPU; None on CPU.
        cuda_release: of CUDA that torch was built with; None on CPU.
    """

    torch_release: str
    device: str
    machine: str
    instructions: tuple[str, ...]
    capability: tuple[int, int] | None = None
    cuda_release: str | None = None

    @classmethod
    def of(cls, device: torch.device) -> "Requirements":
        """Those of code that is compiled here for `device`."""
        version = torch.__version__.split("+")[0]
        if device.type == "cpu":
            return cls(version, "cpu", platform.machine(), _instructions())
        capability = torch.cuda.get_device_capability(device)
        return cls(version, "cuda", platform.machine(), (), capability, torch.version.cuda)

    def __str__(self) -> str:
        gpu = f", CUDA {self.cuda_release}, compute capability {self.capability}" if self.capability else ""
        return f"torch {self.torch_release}, {self.device}, {self.machine}{gpu}"

    def check(self, device: torch.device) -> None:
        """Raise ArtifactError unless `device` can run the code."""
        if self.device != device.type:
            raise self._misfit("device", self.device, device.type, f"load it with device='{self.device}'")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise self._misfit("device", "cuda", "a machine without a GPU", "use one with an NVIDIA GPU")
        here = Requirements.of(device)
        if here.torch_release != self.torch_release:
            raise self._misfit(
                "torch", self.torch_release, here.torch_release, f"pip install torch=={self.torch_release}"
            )
        if here.machine != self.machine:
            raise self._misfit("processor", self.machine, here.machine, "export it on such a machine")
        missing = sorted(set(self.instructions) - set(here.instructions))
        if missing:
            raise self._misfit(
                "processor", f"one with {', '.join(missing)}", "one without", "export it on this machine"
            )
        if self.capability is not None and here.capability is not None:
            # Code for one capability runs on later ones of the same generation.
            if here.capability[0] != self.capability[0] or here.capability < self.capability:
                wanted, found = (".".join(map(str, c)) for c in (self.capability, here.capability))
                raise self._misfit("compute capability", wanted, found, "export it on such a GPU")
            if here.cuda_release != self.cuda_release:
                raise self._misfit(
                    "CUDA", self.cuda_release, here.cuda_release, f"use a torch for CUDA {self.cuda_release}"
                )

    @staticmethod
    def _misfit(field: str, wanted: object, found: object, advice: str) -> ArtifactError:
        return ArtifactError(
            f"The artifact was compiled for {field} {wanted}, but here is {found}; {advice}."
        )


def check_memory(size: int, device: torch.device) -> None:
    """Raise ArtifactError unless `size` bytes of weights fit into what is free."""
    free = _free_bytes(device)
    if free is not None and size > free:
        raise ArtifactError(
            f"The artifact holds {size / 2**30:.1f} GiB of weights, but {device} has {free / 2**30:.1f} GiB free. "
            f"Close other programs or use a larger machine."
        )


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _instructions() -> tuple[str, ...]:
    """Instruction sets of this processor; none where the system doesn't tell."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return ()
    return tuple(
        sorted(name for name in (found[1].split() if found else ()) if _INSTRUCTIONS.fullmatch(name))
    )
