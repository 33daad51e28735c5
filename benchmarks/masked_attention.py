"""Attention with the masks of a Gemma 3 on CPU: the fused kernel with a mask as programs use it, and flex attention.

    python benchmarks/masked_attention.py [--num-iters 15] [--output-json masked_attention_cpu.json]

Of a prompt of pictures of which the tokens see each other, and of the first stage of tier 128, which runs on some of
its tokens: one layer with a window and one without, each handed what says who sees whom. *Causal* is the fused kernel
without a mask, which sees other tokens and is here for its time only. Making a mask is counted apart: one is
made once for all layers of a kind in a stage. Flex attention (arXiv 2412.05496) leaves out blocks in which nobody sees
anybody, which its block mask tells, and reads the same token indices and groups as the mask is made of.
"""

import os
import tempfile
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from decoders import Prompts
from record import RESULTS, NumIters, OutputJson, alternate, first_calls, number_table, save, summary
from rich.console import Console
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from reroute_fx import RoutingConfig
from reroute_fx._compat import settle_cpu_math
from reroute_fx.capture.prompt_groups import PromptGroups

TIER, LAYERS, TEXT, HEAD_DIM = 128, 32, 40, 64
PROMPTS = {"616 tokens": ((144,) * 4, 256), "4136 tokens": ((256,) * 16, 1024)}
"""Visual tokens of each picture, and the window."""


class Rows:
    """Some tokens of a prompt: their places and groups, and random queries, keys and values ``[1, H, S', D]``."""

    def __init__(self, prompts: Prompts, kept: int, heads: int) -> None:
        is_visual = prompts.is_visual
        groups = PromptGroups("pictures")(is_visual, torch.ones_like(is_visual))[0]
        chosen = torch.randperm(prompts.visual)[:kept]
        places = torch.cat([is_visual[0].nonzero()[chosen], (~is_visual[0]).nonzero()]).flatten()
        self.index = places.sort().values
        self.groups = groups[self.index]
        length = len(self.index)
        self.query = torch.randn(1, heads, length, HEAD_DIM)
        self.key, self.value = (torch.randn(1, heads // 2, length, HEAD_DIM) for _ in range(2))

    def sees(self, window: int | None) -> Callable[..., torch.Tensor]:
        """Whether the query of a row sees the key of another, as flex attention asks."""
        index, groups = self.index, self.groups

        def sees(_: Any, __: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            same = (groups[query] == groups[key]) & (groups[key] > 0)
            seen = (index[key] <= index[query]) | same
            return seen if window is None else seen & (index[key] > index[query] - window)

        return sees

    def mask(self, window: int | None) -> torch.Tensor:
        """``[1, 1, S', S']`` bool."""
        row = torch.arange(len(self.index))
        return self.sees(window)(None, None, row[:, None], row[None])[None, None]


def contenders(rows: Rows, window: int | None) -> dict[str, Callable[[], Any]]:
    """What is measured: ways to attend, and what each needs made before."""
    length, given = len(rows.index), (rows.query, rows.key, rows.value)
    fused = torch.compile(F.scaled_dot_product_attention, dynamic=True)
    # For any number of rows the code that torch 2.13 generates does not compile.
    flex = torch.compile(flex_attention, dynamic=False)
    make_mask = torch.compile(rows.mask, dynamic=True)
    find_blocks = torch.compile(create_block_mask, dynamic=False)
    sees = rows.sees(window)

    def make_blocks() -> Any:
        return find_blocks(sees, None, None, length, length, device="cpu")

    mask, blocks = make_mask(window), make_blocks()
    runs = {
        "causal": lambda: fused(*given, is_causal=True, enable_gqa=True),
        "mask": lambda: fused(*given, attn_mask=mask, enable_gqa=True),
        "flex": lambda: flex(*given, block_mask=blocks, enable_gqa=True),
    }
    torch.testing.assert_close(runs["flex"](), runs["mask"](), atol=1e-5, rtol=1e-4)
    return runs | {"making the mask": lambda: make_mask(window), "making blocks": make_blocks}


def main(
    num_iters: NumIters = 15,
    heads: Annotated[int, typer.Option(help="query heads; half as many keys")] = 12,
    output_json: OutputJson = RESULTS / "masked_attention_cpu.json",
) -> None:
    """Measure, and write what was measured."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="masked_attention_")
    settle_cpu_math()
    torch.manual_seed(0)
    config = RoutingConfig.from_tier(TIER, num_layers=LAYERS)
    found: list[dict[str, Any]] = []
    for name, (pictures, window) in PROMPTS.items():
        prompts = Prompts(torch.zeros(1, sum(pictures) + TEXT, 1), pictures)
        entering = config.tokens_per_layer(LAYERS, prompts.visual)
        for kept in (prompts.visual, entering[config.decision_layers[0]]):
            rows = Rows(prompts, kept, heads)
            for reach in (window, None):
                runs = contenders(rows, reach)
                first_calls(runs)
                samples = alternate(runs, num_iters)
                row = {"prompt": name, "rows": len(rows.index), "window": reach, "seconds": samples}
                found.append({**row, "ms": {way: summary(samples[way]) for way in samples}})
    setting = {"heads": heads, "head_dim": HEAD_DIM, "tier": TIER, "dtype": "float32"}
    path = save(output_json, {"setting": setting, "layers": found})
    table = number_table("prompt", "rows", "window", *found[0]["ms"], title="p50 ms of one layer")
    for row in found:
        times = (f"{each['p50_ms']:.2f}" for each in row["ms"].values())
        table.add_row(row["prompt"], str(row["rows"]), str(row["window"] or ""), *times)
    Console(width=120).print(table, f"written to {path}", sep="\n")


if __name__ == "__main__":
    typer.run(main)
