"""Routing by the decoder's own layers, called on slices of the stream; eager attention tells the scores."""

import torch
from tiny_models import IMAGE


def by_hand(model, given, config, addends=()):
    """Logits of one row and the visual tokens that each decision keeps, ``{layer: [places among them]}``.

    Layers without an attention run on their own tokens alone; decisions before them ask the nearest layer that has one,
    of two the later.

    Args:
        model: vision-language model whose decoder attends eagerly.
        given: inputs of a row without padding.
        config: decisions of one pool.
        addends: what the model adds behind its first layers, ``[1, S, d]`` each; tokens that wait get it, too.
    """
    seen, decoder = {}, model.model.language_model

    def look(module, args, kwargs):
        seen.update(hidden=args[0], **kwargs)

    hook = decoder.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    model(**given)
    hook.remove()
    hidden, rotary, types = (
        seen["hidden"].clone(),
        seen["position_embeddings"],
        seen.get("moe_mm_token_type_ids"),
    )
    visual = (given["input_ids"][0] == IMAGE).nonzero().flatten().tolist()
    everything = list(range(hidden.shape[1]))
    attending = [i for i, layer in enumerate(decoder.layers) if hasattr(layer, "self_attn")]

    def call(module, rows, tokens, attends=True):
        causal = torch.full((len(tokens), len(tokens)), -torch.inf).triu(1)[None, None]
        more = (
            {"moe_mm_token_type_ids": types[:, tokens]}
            if module in decoder.layers and types is not None
            else {}
        )
        # One tensor of complex numbers, or cosine and sine.
        own = rotary[:, tokens] if torch.is_tensor(rotary) else tuple(part[:, tokens] for part in rotary)
        return module(rows, attention_mask=causal if attends else None, position_embeddings=own, **more)

    active, kept = everything, {}
    for number, layer in enumerate(decoder.layers):
        if number in config.decision_layers:
            asked = decoder.layers[min(reversed(attending), key=lambda i: abs(i - number))]
            pool = active if config.action == "physical_delete" else everything
            normed = getattr(asked, "input_layernorm", None) or asked.operator_norm
            maps = call(asked.self_attn, normed(hidden[:, pool]), pool)[1]
            scores = dict(zip(pool, maps[0, :, -1].mean(0).tolist(), strict=True))
            candidates = [i for i, place in enumerate(visual) if place in scores]
            count = max(1, int(len(visual) * config.keep_ratios[config.decision_layers.index(number)]))
            kept[number] = sorted(sorted(candidates, key=lambda i: -scores[visual[i]])[:count])
            active = [i for i in everything if i not in visual or visual.index(i) in kept[number]]
        output = call(layer, hidden[:, active], active, number in attending)
        hidden[:, active] = output[0] if isinstance(output, tuple) else output
        if number < len(addends):
            hidden = hidden + addends[number]
    norm = getattr(decoder, "norm", None) or decoder.embedding_norm
    return model.lm_head(norm(hidden)), kept
