"""Routing by the decoder's own layers, called on slices of the stream; eager attention tells the scores."""

import torch
from tiny_models import IMAGE


def by_hand(model, given, config):
    """Logits of one row and the visual tokens that each decision keeps, ``{layer: [places among them]}``.

    Args:
        model: LLaVA whose decoder attends eagerly.
        given: inputs of a row without padding.
        config: decisions of one pool.
    """
    seen, decoder = {}, model.model.language_model

    def look(module, args, kwargs):
        seen.update(hidden=args[0], **kwargs)

    hook = decoder.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    model(**given)
    hook.remove()
    hidden, rotary = seen["hidden"].clone(), seen["position_embeddings"]
    visual = (given["input_ids"][0] == IMAGE).nonzero().flatten().tolist()
    everything = list(range(hidden.shape[1]))

    def call(module, rows, tokens):
        causal = torch.full((len(tokens), len(tokens)), -torch.inf).triu(1)[None, None]
        # One tensor of complex numbers, or cosine and sine.
        own = rotary[:, tokens] if torch.is_tensor(rotary) else tuple(part[:, tokens] for part in rotary)
        return module(rows, attention_mask=causal, position_embeddings=own)

    active, kept = everything, {}
    for number, layer in enumerate(decoder.layers):
        if number in config.decision_layers:
            maps = call(layer.self_attn, layer.input_layernorm(hidden), everything)[1]
            scores = maps[0, :, -1].mean(0)[visual].tolist()
            count = max(1, int(len(visual) * config.keep_ratios[config.decision_layers.index(number)]))
            kept[number] = sorted(sorted(range(len(visual)), key=lambda i: -scores[i])[:count])
            active = [i for i in everything if i not in visual or visual.index(i) in kept[number]]
        output = call(layer, hidden[:, active], active)
        hidden[:, active] = output[0] if isinstance(output, tuple) else output
    return model.lm_head(decoder.norm(hidden)), kept
