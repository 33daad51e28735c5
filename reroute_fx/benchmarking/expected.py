"""What the theory promises for a batch: FLOPs of the prefill, bytes of a decoding step."""

from dataclasses import dataclass
from typing import Any

from ..analysis.routing_report import RoutingReport
from ..capture import text_decoder
from .workload import Workload


@dataclass(frozen=True)
class Theory:
    """Costs of the decoder for a batch, tokens only: padding is not counted.

    Attributes:
        prefill_flops: of the routed prefill, scoring included.
        unrouted_prefill_flops: of the unrouted one.
        step_bytes: that one routed decoding step reads: weights, and keys and values at half of the new tokens.
        unrouted_step_bytes: that an unrouted one reads.
    """

    prefill_flops: int
    unrouted_prefill_flops: int
    step_bytes: int
    unrouted_step_bytes: int

    @property
    def prefill_speedup(self) -> float:
        return self.unrouted_prefill_flops / self.prefill_flops

    @property
    def step_speedup(self) -> float:
        return self.unrouted_step_bytes / self.step_bytes


def theory_of(model: Any, report: RoutingReport, work: Workload) -> Theory:
    """Costs summed over the rows; a row without visual tokens is not routed.

    All visual tokens of a row are taken for one pool, also where each image is one.
    """
    flops, unrouted_flops = 0, 0
    weights = weight_bytes(model)
    read, unrouted_read = weights, weights
    for visual, text in zip(work.visual_tokens, work.text_tokens, strict=True):
        prompt = report.at(visual_tokens=visual, text_tokens=text)
        # One step is not timed, and a step reads what it wrote.
        steps = 1 + (work.new_tokens + 1) // 2
        half = report.at(visual_tokens=visual, text_tokens=text + steps)
        flops += (prompt.routed if visual else prompt.unrouted).flops
        unrouted_flops += prompt.unrouted.flops
        read += (half.routed if visual else half.unrouted).kv_bytes
        unrouted_read += half.unrouted.kv_bytes
    return Theory(flops, unrouted_flops, read, unrouted_read)


def weight_bytes(model: Any) -> int:
    """Bytes of the decoder's layers and of the head; of a mixture all experts. Of the embeddings a step reads rows."""
    decoder = text_decoder(model)
    embeddings = decoder.get_input_embeddings().weight
    layers = sum(p.nbytes for p in decoder.parameters() if p is not embeddings)
    return int(layers + model.get_output_embeddings().weight.nbytes)
