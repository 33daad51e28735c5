"""Load an artifact where its model was never seen, with python benchmarks/fresh_artifact.py ARTIFACT PROMPT.

Prints JSON: seconds of `reroute_fx.load`, of the first prompt (its first token) and of the second, bytes that the
process holds after them beyond what it held before, at its peak too, and the modules of models that were imported.
"""

import json
import sys

import torch
from record import call_seconds
from safetensors.torch import load_file

import reroute_fx
from reroute_fx.benchmarking.machine import resident_bytes


def main(artifact: str, prompt_file: str) -> None:
    prompt = load_file(prompt_file)
    before, loaded = resident_bytes(), []
    seconds = call_seconds(lambda: loaded.append(reroute_fx.load(artifact)))
    run = torch.no_grad()(lambda: loaded[0](**prompt, logits_to_keep=1, use_cache=False))
    facts = {
        "load_s": seconds,
        "first_prompt_s": call_seconds(run),
        "second_prompt_s": call_seconds(run),
        "held_bytes": resident_bytes() - before,
        "peak_bytes": resident_bytes("VmHWM") - before,
        # That of "auto" lists the names of models and holds no code of any.
        "modeling": [m for m in sys.modules if ".models." in m and ".modeling_" in m and ".auto." not in m],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
