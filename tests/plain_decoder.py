"""A Llama decoder in loops over tokens and layers, with whole attention maps, that drops or defers visual tokens.

Written from the papers and the authors' code; it shares nothing with the package. In double precision.
"""

from dataclasses import dataclass, field

import torch


@dataclass
class Answer:
    """Logits of the last prompt token, tokens generated after it, and what decisions kept of the visual tokens."""

    logits: torch.Tensor
    tokens: list[int] = field(default_factory=list)
    kept: dict[int, list[int]] = field(default_factory=dict)


class PlainDecoder:
    """Args:
    model: LLaVA around a Llama decoder, one prompt at a time.
    decisions: tokens to keep, by decision layer.
    previous: whether the layer before a decision layer scores, on its input; otherwise the decision layer.
    deletes: whether what is not kept is gone; otherwise it waits and may come back.
    contiguous: whether positions are counted anew in each stage.
    windows: for each layer how many tokens of the prompt a token sees, itself among them; none for all. Decisions look
        at all.
    """

    def __init__(self, model, decisions, *, previous, deletes, contiguous, windows=()):
        text = model.model.language_model.config
        self.weights = {name: value.double() for name, value in model.state_dict().items()}
        self.layers, self.heads = text.num_hidden_layers, text.num_attention_heads
        self.kv_heads, self.eps = text.num_key_value_heads, text.rms_norm_eps
        self.width = text.head_dim
        self.theta = text.rope_parameters["rope_theta"]
        self.decisions, self.previous = decisions, previous
        self.deletes, self.contiguous = deletes, contiguous
        self.windows = dict(enumerate(windows))

    def weight(self, layer, name):
        return self.weights[f"model.language_model.layers.{layer}.{name}.weight"]

    def norm(self, x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * weight

    def rotate(self, x, positions):
        """`[H, S, D]`: each pair (i, i + D/2) turned by position / theta^(2i/D)."""
        half = self.width // 2
        speed = self.theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = positions[:, None].double() * speed
        first, second = x[..., :half], x[..., half:]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1
        )

    def heads_of(self, layer, name, x, heads):
        return (x @ self.weight(layer, f"self_attn.{name}").T).view(len(x), heads, self.width).transpose(0, 1)

    def attention(self, layer, stream, positions, places=None, cache=None):
        """Attention maps `[H, Q, K]`, keys and values of a layer on its input; earlier ones come first.

        With the places of the tokens in the prompt, what lies outside the layer's window is not seen.
        """
        x = self.norm(stream, self.weight(layer, "input_layernorm"))
        query = self.rotate(self.heads_of(layer, "q_proj", x, self.heads), positions)
        keys = self.rotate(self.heads_of(layer, "k_proj", x, self.kv_heads), positions)
        values = self.heads_of(layer, "v_proj", x, self.kv_heads)
        if cache is not None:
            keys, values = torch.cat([cache[0], keys], 1), torch.cat([cache[1], values], 1)
        repeated = keys.repeat_interleave(self.heads // self.kv_heads, 0)
        logits = query @ repeated.transpose(1, 2) / self.width**0.5
        hidden = torch.ones(logits.shape[1:]).tril(logits.shape[2] - logits.shape[1]) == 0
        window = self.windows.get(layer)
        if places is not None and window is not None:
            for query, own in enumerate(places[-len(stream) :]):
                hidden[query] |= torch.tensor([own - place >= window for place in places])
        return logits.masked_fill(hidden, -torch.inf).softmax(-1), keys, values

    def layer(self, layer, stream, positions, places, cache=None):
        maps, keys, values = self.attention(layer, stream, positions, places, cache)
        mixed = maps @ values.repeat_interleave(self.heads // self.kv_heads, 0)
        mixed = mixed.transpose(0, 1).reshape(len(stream), -1)
        stream = stream + mixed @ self.weight(layer, "self_attn.o_proj").T
        x = self.norm(stream, self.weight(layer, "post_attention_layernorm"))
        gate = x @ self.weight(layer, "mlp.gate_proj").T
        up = x @ self.weight(layer, "mlp.up_proj").T
        return stream + (gate * gate.sigmoid() * up) @ self.weight(layer, "mlp.down_proj").T, (keys, values)

    def logits(self, stream):
        x = self.norm(stream[-1], self.weights["model.language_model.norm.weight"])
        return x @ self.weights["lm_head.weight"].T

    def answer(self, embeds, visual, steps):
        """Args:
        embeds: `[S, d]`, merged.
        visual: places of the visual tokens.
        steps: tokens to generate.
        """
        stream, before = embeds.double(), None
        active, counted, held = list(range(len(stream))), {}, {}
        caches, answer = [], Answer(torch.empty(0))
        for layer in range(self.layers):
            if layer in self.decisions:
                pool = active if self.deletes else list(range(len(stream)))
                scoring = (layer - 1, before) if self.previous else (layer, stream)
                positions = self.positions(pool) if self.deletes else torch.tensor(pool)
                maps, *_ = self.attention(scoring[0], scoring[1][pool], positions)
                row = maps.mean(0)[-1].tolist()
                candidates = [(row[i], place) for i, place in enumerate(pool) if place in visual]
                best = sorted(candidates, key=lambda each: -each[0])[: self.decisions[layer]]
                kept = {place for _, place in best}
                answer.kept[layer] = sorted(visual.index(place) for place in kept)
                active = [place for place in range(len(stream)) if place in kept or place not in visual]
            before = stream.clone()
            run, cache = self.layer(layer, stream[active], self.positions(active), active)
            stream = stream.clone()
            stream[active] = run
            caches.append(cache)
            counted[layer] = len(active) if self.contiguous else len(stream)
            held[layer] = list(active)
        answer.logits = self.logits(stream)
        token = answer.logits.argmax().item()
        for step in range(steps):
            answer.tokens.append(token)
            new = self.weights["model.language_model.embed_tokens.weight"][token][None]
            for layer in range(self.layers):
                position = torch.tensor([counted[layer] + step])
                held[layer].append(len(stream) + step)
                new, caches[layer] = self.layer(layer, new, position, held[layer], caches[layer])
            token = self.logits(new).argmax().item()
        return answer

    def positions(self, active):
        return torch.arange(len(active)) if self.contiguous else torch.tensor(active)
