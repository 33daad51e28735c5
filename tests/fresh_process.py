"""Run artifacts where their models were never seen: python fresh_process.py INPUTS ARTIFACT...

Prints JSON: the tokens that each artifact generates, the selections and last logits of the prompt, and the modules of
models that were imported. Anything unpickled, traced or compiled is an error.
"""

import json
import sys

import torch
from safetensors.torch import load_file


def fail(*_: object, **__: object) -> None:
    raise AssertionError("a program was traced or compiled")


if __name__ == "__main__":
    torch.set_num_threads(1)
    inputs = load_file(sys.argv[1])

    import reroute_fx

    unpickled: list[str] = []
    sys.addaudithook(lambda event, _: unpickled.append(event) if event == "pickle.find_class" else None)
    torch.export.export = torch.compile = torch._inductor.aoti_compile_and_package = fail
    results = []
    for path in sys.argv[2:]:
        model = reroute_fx.load(path)
        with torch.no_grad():
            output = model(**inputs)
            tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        kept = {layer: [row.tolist() for row in rows] for layer, rows in output.routing.selected.items()}
        results.append({"tokens": tokens.tolist(), "kept": kept, "logits": output.logits[:, -1].tolist()})
    # That of "auto" lists the names of models and holds no code of any.
    modeling = [m for m in sys.modules if ".models." in m and ".modeling_" in m and ".auto." not in m]
    print(json.dumps({"results": results, "modeling": modeling, "unpickled": unpickled}))
