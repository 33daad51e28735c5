"""Trace the operators for a CUDA device that is not there; print what Inductor would be given as JSON.

Run in a process of its own: the tests interpret the kernels, which Triton settles as it is imported.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget

from reroute_fx.lowering.implementations import use_implementations

reroute = torch.ops.reroute
WRAPPER = "triton_kernel_wrapper_functional"


def trace(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> dict[str, Any]:
    """Operators of the traced graph, the tensors that its kernels write, and the sizes and strides of its results."""
    graphs = []

    def keep(graph_module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph_module)
        results = [node.meta["val"] for node in graph_module.graph.output_node().args[0]]
        return lambda *_: results

    with torch.no_grad():
        torch.compile(module, backend=aot_autograd(fw_compiler=keep), dynamic=True)(*inputs)
    (graph,) = graphs
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    names = Counter(str(node.target).rpartition("::")[2].removesuffix(".default") for node in calls)
    written = [sorted(n.kwargs["tensors_to_clone"]) for n in calls if WRAPPER in str(n.target)]
    values = [node.meta["val"] for node in graph.graph.output_node().args[0]]
    results = [[str(size) for size in (*x.shape, *x.stride())] for x in values]
    return {"operators": names, "written": written, "results": results}


def main() -> None:
    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    triton.runtime.driver.set_active(target)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=False)
    with mode:

        def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        index, lengths = tensor(3, 40, dtype=torch.int64), tensor(3, dtype=torch.int64)
        keep, scores = tensor(3, 40, dtype=torch.bool), tensor(3, 40, dtype=torch.float32)
        positions, stream = tensor(3, 21, dtype=torch.int64), tensor(3, 70, 128)
        angles = [tensor(1, 70, 64) for _ in range(2)]
        cases = {
            "visual_scores": (
                lambda q, k, i, n: reroute.visual_scores.default(q, k, i, n, 0.1),
                (tensor(3, 8, 1, 64), tensor(3, 2, 70, 64), index, lengths),
            ),
            "select_tokens": (
                lambda s, i, n, k, x: reroute.select_tokens.default(
                    s, i, n, k, None, x.shape[1], x.shape[1] // 2
                ),
                (scores, index, lengths, keep, stream),
            ),
            "compact_tokens": (
                lambda x, c, s, p: reroute.compact_tokens.default([x, c, s], p, [1, 1, 1]),
                (stream, *angles, positions),
            ),
            "restore_tokens": (
                lambda x, r, p: reroute.restore_tokens.default(x, r, p),
                (stream, tensor(3, 21, 128), positions),
            ),
        }
        made = {}
        for name, (function, inputs) in cases.items():
            module = torch.fx.symbolic_trace(function)
            made[name] = {"opaque": trace(module, inputs)}
            made[name]["kernels"] = trace(use_implementations(module, torch.device("cuda")), inputs)
        print(json.dumps(made))


if __name__ == "__main__":
    main()
