"""A routed model that needs no model class: programs, and Hugging Face's generation around them."""

import functools
import inspect
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..capture.cropped_images import mark_whole
from ..capture.image_layout import AnyImages, encode
from ..capture.layer_features import LayerFeatures
from ..capture.positions import GridPositions
from ..capture.prompt_groups import PromptGroups
from ..capture.visual_tokens import name_videos, placeholder_of
from ..config.limits import Limits
from ..config.routing_config import RoutingConfig
from ..errors import InputError
from ..lowering import HIDDEN, as_executable
from ..passes.tensor_names import GROUPS
from .prompt import Prompt, PromptReader
from .routed_decoder import RoutedDecoder, current_call
from .routed_model import RoutedModel

Program = Callable[..., dict[str, torch.Tensor]]
PROGRAMS = {
    "embeddings": "inputs_embeds",
    "images": "features",
    "prefill": HIDDEN,
    "continuation": HIDDEN,
    "head": "logits",
}
"""What each program returns, besides what `route` exposes."""


@dataclass(frozen=True)
class Parts:
    """What a routed model is made of.

    Attributes:
        config: of the vision-language model.
        generation_config: its own, for what `generate` is not told.
        routing_config: what is routed.
        limits: of a call.
        dtype: of the weights.
        device: where they lie.
        images: how the model takes pictures.
        positions: how rotary positions follow from a prompt; None if they count its tokens.
        layer_features: visual features that are added inside the decoder; None if there are none.
        visual_ids: placeholders of visual features.
        programs: by the names in `PROGRAMS`.
        asked: inputs that the program for prompts takes because rules ask for them.
        groups: which tokens of a prompt see each other; None if none sees later ones.
        stateful: layers that know earlier tokens by a state, not by attention.
    """

    config: Any
    generation_config: GenerationConfig
    routing_config: RoutingConfig
    limits: Limits
    dtype: torch.dtype
    device: torch.device
    images: AnyImages
    positions: GridPositions | None
    layer_features: LayerFeatures | None
    visual_ids: tuple[int, ...]
    programs: Mapping[str, Program]
    asked: tuple[str, ...] = ()
    groups: PromptGroups | None = None
    stateful: tuple[int, ...] = ()


def _signature_of(template: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a function the signature of another, which `generate` inspects."""
    return functools.wraps(template, assigned=("__doc__",))


class LoadedModel(RoutedModel, GenerationMixin):
    """A routed model from an artifact.

    It takes what a processor returns and generates as the model it was exported from: `forward` returns logits, a
    `RoutedCache` and ``.routing``; `generate` is Hugging Face's. All prompts run the routed programs, those without
    pictures too. Positions follow from the prompt and are not taken. For inference only.

    Attributes:
        limits: the largest call.
        report: what the artifact holds.
        processor: of the model; None if the artifact has none.
    """

    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    base_model_prefix = ""
    _is_stateful = False
    _instead_of_moving = "Pass device= to reroute_fx.load, or export the model in the dtype that you need."
    hf_quantizer = None

    def __init__(self, parts: Parts, report: Any = None, processor: Any = None) -> None:
        super().__init__()
        owner = uuid.uuid4().hex
        self.config, self.generation_config = parts.config, parts.generation_config
        self.device, self.dtype = parts.device, parts.dtype
        self.limits, self.routing_config = parts.limits, parts.routing_config
        self.processor, self._loaded_report = processor, report
        self._parts = parts
        self._decoder = RoutedDecoder()
        self._decoder.prefill = _routed(parts.programs["prefill"])
        self._decoder.continuation = _routed(parts.programs["continuation"])
        self._decoder.routing_config = parts.routing_config
        self._decoder.position_rank = 2 if parts.positions is None else 3
        self._decoder.layer_features = parts.layer_features
        self._decoder.stateful = parts.stateful
        self._decoder.owner = owner
        self._decoder.uses_buckets = False
        self._decoder.config = parts.config.get_text_config(decoder=True)
        self._signature = inspect.signature(type(self)._run)
        self._reader = PromptReader(
            parts.config,
            parts.routing_config,
            parts.visual_ids,
            owner,
            routes_text=True,
            limits=parts.limits,
            asked=parts.asked,
        )
        self._first_call_seconds = {}
        self.eval()

    @property
    def base_model(self) -> "LoadedModel":
        return self

    @property
    def report(self) -> Any:
        return self._loaded_report

    def can_generate(self) -> bool:
        return True

    def is_remote_code(self) -> bool:
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """`generate` asks for it; the programs are compiled as they are."""
        return {}

    def _run(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_images: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        batch_num_images: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        video_second_per_grid: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
    ) -> Any:
        """Logits of a prompt or of what follows it.

        Args:
            input_ids: ``[B, S]`` int64.
            attention_mask: ``[B, S]``, or ``[B, all columns]`` on a cache; 0 for padding.
            past_key_values: a `RoutedCache` of this model, or an empty `DynamicCache`.
            pixel_values: of images, as the processor returns it; only without tokens in the cache.
            pixel_values_images: the same, as the processor of Video-LLaVA calls it.
            pixel_values_videos: of videos.
            image_grid_thw: patches of each image in time, height and width, ``[n, 3]`` int64.
            video_grid_thw: those of each video.
            image_sizes: height and width of each image in pixels, ``[n, 2]`` int64, of models that are told them.
            batch_num_images: how many images were given together, ``[groups]`` int64, of models that cut only images
                that were given alone into tiles; None if all were.
            spatial_shapes: rows and columns of patches of each image, ``[n, 2]`` int64, of models that are told them.
            pixel_attention_mask: 0 for pixels that are padding, ``[B, tiles, height, width]``: none in tiles that hold
                any others. Or 0 for patches that are, ``[n, patches]``: those behind what `spatial_shapes` says.
            second_per_grid_ts: seconds between the frames of each video; None for 1.
            video_second_per_grid: the same, as processors of Qwen-Omni call it.
            mm_token_type_ids: 0 for text, 1 for images, 2 for videos, ``[B, S]``; only models whose videos have the
                placeholder of images need it.
            token_type_ids: taken because processors return it; the ids tell what it says.
            use_cache: whether to return a cache; None for what the config says.
            return_dict: False for a tuple.
            output_attentions: refused if True.
            output_hidden_states: refused if True.
            logits_to_keep: how many columns from the end get logits, all for 0, or which ones.

        Raises:
            InputError: inputs that don't fit the model, its limits or the cache.
        """
        assert input_ids is not None  # PromptReader refuses calls without
        # Compiled programs read memory as it was laid out when they were made.
        input_ids = input_ids.long().contiguous()
        embeds = self._parts.programs["embeddings"](given=input_ids)["inputs_embeds"]
        layers = self._parts.layer_features
        addends = layers.none(embeds) if layers else {}
        grids: dict[int, torch.Tensor] = {}
        pixel_values = pixel_values_images if pixel_values is None else pixel_values
        if spatial_shapes is None:
            _refuse_padded_tiles(pixel_values, pixel_attention_mask)
        else:
            _refuse_other_padding(spatial_shapes, pixel_attention_mask)
            image_grid_thw = spatial_shapes
        videos = {"pixel_values_videos": pixel_values_videos, "mm_token_type_ids": mm_token_type_ids}
        named_ids = name_videos(self.config, input_ids, videos)
        if image_sizes is not None:
            image_grid_thw = mark_whole(image_sizes, batch_num_images)
        for kind, pixels, grid in (
            ("image", pixel_values, image_grid_thw),
            ("video", pixel_values_videos, video_grid_thw),
        ):
            if pixels is not None:
                token = _placeholder(self.config, kind)
                self._refuse_videos(kind)
                if grid is not None:
                    grids[token] = grid.cpu()
                streams = self._put_features(
                    [embeds, *addends.values()], named_ids == token, pixels, grids.get(token)
                )
                embeds, addends = streams[0], dict(zip(addends, streams[1:], strict=True))
        seconds = second_per_grid_ts if video_second_per_grid is None else video_second_per_grid
        addends |= self._groups(input_ids, attention_mask, token_type_ids)
        output = self._decoder.routed_forward(
            _no_other_program,
            inputs_embeds=embeds,
            position_ids=self._positions(named_ids, attention_mask, grids, seconds),
            past_key_values=past_key_values,
            use_cache=use_cache,
            addends=addends,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = output.last_hidden_state[:, kept].contiguous()
        result = CausalLMOutputWithPast(
            logits=self._parts.programs["head"](given=hidden)["logits"],
            past_key_values=output.past_key_values,
        )
        return result.to_tuple() if return_dict is False else result

    @_signature_of(_run)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.routed_forward(functools.partial(type(self)._run, self), *args, **kwargs)

    def _refuse_videos(self, kind: str) -> None:
        if kind == "video" and not self._parts.images.takes_videos:
            raise InputError(
                "The call has videos (pixel_values_videos), but this artifact has a program for pictures only. Leave "
                "them out, or use the model that was exported."
            )

    def _put_features(
        self,
        streams: Sequence[torch.Tensor],
        is_here: torch.Tensor,
        pixels: torch.Tensor,
        grid: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """`streams` with the features of pictures in the places that `is_here` marks.

        The first has the embeddings, ``[B, S, d]``, those that follow what is added inside the decoder.
        """
        images = self._parts.images
        images.check(pixels, grid)
        found = encode(self._parts.programs["images"], images, pixels.to(self.dtype).contiguous(), grid)
        features = found["features"]
        places = is_here[..., None].expand_as(streams[0])
        if (tokens := int(is_here.sum())) != len(features):
            raise InputError(
                f"input_ids holds {tokens} placeholders, but the pictures have {len(features)} features; they do not "
                f"match. Pass input_ids and pixel_values as the processor returned them."
            )
        layers = found["layer_features"] if len(streams) > 1 else ()
        return [
            stream.masked_scatter(places, put.to(stream.dtype))
            for stream, put in zip(streams, (features, *layers), strict=True)
        ]

    def _positions(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        grids: Mapping[int, torch.Tensor],
        seconds: torch.Tensor | None,
    ) -> torch.Tensor | None:
        positions = self._parts.positions
        if positions is None or not grids:
            return None
        is_token = torch.ones_like(ids) if mask is None else mask
        video = placeholder_of(self.config, "video")
        return positions(ids.cpu(), is_token.cpu().bool(), grids, video, seconds).to(self.device)

    def _groups(
        self, ids: torch.Tensor, mask: torch.Tensor | None, types: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """The input of that name, in the columns of the batch, if it is a prompt whose tokens see each other."""
        groups = self._parts.groups
        if groups is None or not isinstance(current_call.get(), Prompt):
            return {}
        is_token = torch.ones_like(ids).bool() if mask is None else mask.bool()
        is_visual = self._reader.is_visual(ids) & is_token
        if types is not None:
            groups.check_types(types, is_visual, is_token)
        return {GROUPS: groups(is_visual, is_token)}

    def _prepare_cache_for_generation(self, generation_config: Any, *args: Any) -> None:
        """Called by `generate` before anything runs."""
        if generation_config.max_length - 1 > self.limits.length:
            raise InputError(
                f"generate was asked for rows of up to {generation_config.max_length} tokens, prompt and answer; "
                f"expected at most limits.length={self.limits.length} and the last one. Ask for fewer with "
                f"max_new_tokens, or export the model with larger limits."
            )
        super()._prepare_cache_for_generation(generation_config, *args)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **given: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Repeat rows for beams and samples, and with each row its pictures."""
        pictures: dict[str, Any] = {}
        if expand_size > 1 and input_ids is not None:
            for kind, names in PICTURES.items():
                held = {name: given.pop(name) for name in names if given.get(name) is not None}
                if held:
                    tokens = (input_ids == _placeholder(self.config, kind)).sum(dim=1).tolist()
                    pictures |= self._parts.images.repeat(held, list(held), tokens, expand_size)
        ids, more = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **given)
        return ids, {**more, **pictures}


PICTURES = {
    "image": (
        "pixel_values",
        "pixel_values_images",
        "image_grid_thw",
        "image_sizes",
        "batch_num_images",
        "spatial_shapes",
        "pixel_attention_mask",
    ),
    "video": ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "video_second_per_grid"),
}
"""Inputs of each kind of pictures: pixels, grids and what else has an entry for each."""


def _refuse_padded_tiles(pixels: torch.Tensor | None, mask: torch.Tensor | None) -> None:
    if pixels is None or mask is None:
        return
    holds_any = pixels.flatten(2).any(dim=2)
    if mask.shape[:2] != pixels.shape[:2] or not mask[holds_any].all():
        raise InputError(
            f"pixel_attention_mask, {list(mask.shape)}, has padding inside a tile of pixel_values, "
            f"{list(pixels.shape)}; expected whole tiles. Let the processor split pictures (do_image_splitting)."
        )


def _refuse_other_padding(shapes: torch.Tensor, mask: torch.Tensor | None) -> None:
    if mask is None:
        return
    patches = shapes.prod(dim=-1)
    places = torch.arange(mask.shape[-1], device=patches.device)
    if mask.ndim != 2 or len(mask) != len(shapes) or ((places < patches[:, None]) != mask.bool()).any():
        raise InputError(
            f"pixel_attention_mask, {list(mask.shape)}, has other patches than spatial_shapes, {shapes.tolist()}; "
            f"expected those of each picture first, then padding. Pass what the processor returns."
        )


def _placeholder(config: Any, kind: str) -> int:
    token = placeholder_of(config, kind)
    if token is None:
        raise InputError(f"The call has {kind}s, but the model takes none. Leave them out.")
    return token


def _routed(program: Program) -> Callable[..., Any]:
    return lambda **inputs: as_executable(program(**inputs))


def _no_other_program(*_: Any, **__: Any) -> Any:
    raise InputError("past_key_values was made by another model; expected a RoutedCache of this one.")
