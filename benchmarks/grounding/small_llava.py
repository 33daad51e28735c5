"""The small LLaVA of the grounding study, untrained: tokenizer, processor and model."""

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from reroute_fx.grounding.questions import NUMBERS, RELATIONS
from reroute_fx.grounding.scenes import COLOURS, SHAPES, SIDE, SIZES, TEXTURES
from reroute_fx.loading.models_by_name import CHECKPOINT

IMAGE = "<image>"
PATCH = 14
WIDTH, HEADS, DECODER_LAYERS, TOWER_LAYERS = 128, 4, 16, 6

_WORD = r"(?: \[|, )[0-9]\.[0-9]{2}| ?[A-Za-z]+| ?[\],.?:]|[\s\S]"
"""A number of a box with the sign before it; a word or a sign with the space before it; or any character."""
_SENTENCES = ("USER", "ASSISTANT", "Where", "Is", "Are", "is", "are", "the", "there", "a", "exactly")
_NOUNS_AND_ANSWERS = ("thing", "things", "yes", "no")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word and number that questions and answers have, with and without a space before it."""
    shapes = [form for shape in SHAPES for form in (shape, f"{shape}{'es' if shape == 'cross' else 's'}")]
    relations = [word for relation in RELATIONS for word in relation.split()]
    words = [*_SENTENCES, *_NOUNS_AND_ANSWERS, *SIZES, *TEXTURES, *COLOURS, *shapes]
    words += [*relations, *NUMBERS, *"],.?:"]
    numbers = [form for hundredth in range(101) for form in number_forms(hundredth)]
    special = ["<unk>", "<s>", "</s>", "<pad>", IMAGE]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), "isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    forms = [form for word in words for form in (word, f" {word}")]
    tokenizer.train_from_iterator(["\n", " ", *forms, *numbers], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=[IMAGE],
        padding_side="left",
    )


def number_forms(hundredth: int) -> tuple[str, str]:
    """A number as the first of a box, and as another one."""
    return f" [{hundredth / 100:.2f}", f", {hundredth / 100:.2f}"


def build_processor() -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ),
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
        chat_template=(CHECKPOINT / "chat_template.jinja").read_text(),
    )


def build_model(
    processor: LlavaProcessor, seed: int, layers: int = DECODER_LAYERS
) -> LlavaForConditionalGeneration:
    """A CLIP tower and a Llama decoder, joined as LLaVA-1.5 does: features of the last layer but one."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 3,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=PATCH,
    )
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=image_id, vision_feature_layer=-2
        )
    )
    _start_well(model, tokenizer)
    _order_numbers(model, tokenizer)
    return model


def _start_well(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Let words look up what is described by the same words, and tokens pass on what they find.

    After mimetic initialization (Trockman and Kolter 2023, arXiv 2305.09828): queries and keys are alike in the
    dimensions that positions turn slowly, values times outputs are a share of the identity. In two heads of each layer
    queries and keys are those of words alone. Without, decoders of 16 and 24 layers didn't find out in 2000 steps that
    words tell things apart.
    """
    embeddings = model.get_input_embeddings().weight
    torch.nn.init.normal_(embeddings)
    layers = model.model.language_model.layers
    _, of_words = directions()
    width = WIDTH // HEADS
    slow = (torch.arange(WIDTH) % (width // 2)) >= width // 4
    head_of = torch.arange(WIDTH) // width
    with torch.no_grad():
        words = [number for token, number in tokenizer.get_vocab().items() if token.strip().isalpha()]
        embeddings[words] = F.normalize(embeddings[words] @ of_words @ of_words.T, dim=1) * WIDTH**0.5
        for layer in layers:
            attention = layer.self_attn
            query, key = attention.q_proj.weight, attention.k_proj.weight
            query[slow] *= 1.6
            query[(head_of < 2) & ~slow] *= 0.3
            key[slow] = query[slow]
            for head in range(2):
                mixing, _ = torch.linalg.qr(torch.randn(width, width))
                rows = slow & (head_of == head)
                query[rows] = key[rows] = 0.7 * (of_words @ mixing[:, : width // 2]).T
            torch.nn.init.orthogonal_(attention.v_proj.weight)
            attention.o_proj.weight.copy_(attention.v_proj.weight.T / len(layers) ** 0.5)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)


def directions() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Directions of the four numbers of a box `[d, 24]` and of words `[d, 32]`, all at right angles."""
    random = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=random))
    waves = number_waves().shape[1]
    *sides, words = basis.split([waves] * 4 + [WIDTH - 4 * waves], dim=1)
    return sides, words


def number_waves() -> torch.Tensor:
    """Each hundredth from 0 to 1 as cosines and sines of 12 frequencies, of unit length `[101, 24]`."""
    turns = torch.arange(101)[:, None] / 202 * torch.arange(1, 13) * 2 * torch.pi
    return torch.cat([turns.cos(), turns.sin()], dim=1) / 12**0.5


def _order_numbers(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Let numbers start out near their neighbours, read and written: a decoder that has read much knows their order."""
    waves = number_waves()
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        mixing, _ = torch.linalg.qr(torch.randn(WIDTH, waves.shape[1] + 2))
        length = weight.norm(dim=1).mean()
        placed = length * waves @ mixing[:, :-2].T
        for value, vector in enumerate(placed):
            for form, apart in zip(number_forms(value), mixing[:, -2:].T, strict=True):
                weight.data[tokenizer.convert_tokens_to_ids(form)] = vector + length * apart


def grow(model: LlavaForConditionalGeneration, trained: int) -> None:
    """Spread the first `trained` decoder layers over the depth; what comes between starts as a copy that adds nothing.

    The model says the same before and after (block expansion, Wu et al. 2024, arXiv 2401.02415).
    """
    layers = model.model.language_model.layers
    every = len(layers) // trained
    states = [
        {name: value.clone() for name, value in layer.state_dict().items()} for layer in layers[:trained]
    ]
    for i, layer in enumerate(layers):
        layer.load_state_dict(states[i // every])
        if i % every:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
