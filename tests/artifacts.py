"""Artifacts of tiny models, made once for all test files and processes."""

import copy
import fcntl
import functools
import json
import os
from pathlib import Path

import torch
from conversations import IMAGE, routed_model, unrouted_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import reroute_fx
from reroute_fx import Limits, LoadedModel
from reroute_fx.artifact import manifest
from reroute_fx.artifact.exporting import trace
from reroute_fx.artifact.files import list_files
from reroute_fx.capture import find_visual_token_ids, text_decoder
from reroute_fx.lowering import lower
from reroute_fx.lowering.call_schedule import by_name
from reroute_fx.lowering.inductor import aot_regions
from reroute_fx.lowering.inductor.aot_regions import schedule
from reroute_fx.lowering.regions import device_key
from reroute_fx.runtime.loaded_model import Parts

TIERS = (0.6, 0.5, 0.4)
LIMITS = Limits(batch=9, length=96, image_tokens=32)
SMALL = Limits(batch=8, length=128, image_tokens=64)
WORDS = [f"w{i}" for i in range(64)]


@functools.cache
def routed_at(family, tier):
    return reroute_fx.compile(unrouted_model(family), tier=tier, backend="eager")


@functools.cache
def exact_at(family, tier):
    """The same in double precision: what both would compute without rounding."""
    model = copy.deepcopy(unrouted_model(family)).double()
    return reroute_fx.compile(model, tier=tier, backend="eager")


def expect_equal(found, expected, exact):
    """Require that `found` is as far from `exact` as `expected` is, up to the order of roundings.

    Another selection, position or cached token is a thousand times further away.
    """
    noise = (expected - exact).abs().max()
    assert noise < 1e-3
    assert (found - exact).abs().max() < 10 * noise + 1e-6


def processor():
    """Of the tiny LLaVA: a word for each of its ids, pictures of 16 x 16 pixels."""
    words = list(WORDS)
    words[:3], words[IMAGE] = ["<pad>", "<s>", "</s>"], "<image>"
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            additional_special_tokens=["<image>"],
        ),
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def remember(folder, routed):
    """Let this process know the packages of an artifact, as if it had compiled them."""
    for name, program in trace(routed).programs.items():
        for i, region in enumerate(schedule(program).regions):
            held = (folder / "programs" / f"{name}_{i}.pt2").read_bytes()
            aot_regions._packages[device_key(region, torch.device("cpu"))] = held


def sign(folder, change=lambda content: None):
    """Change a manifest, list the files as they are and sign it, as someone would who means harm."""
    path = folder / manifest.NAME
    content = json.loads(path.read_text())
    files = {name: vars(entry) for name, entry in list_files(folder).items() if name != manifest.NAME}
    content["files"] = files
    change(content)
    del content["checksum"]
    path.write_text(json.dumps({"checksum": manifest._checksum(content), **content}))


def loaded_model(family):
    """A `LoadedModel` whose programs run as they are, instead of those of an artifact."""
    return without_its_class(routed_model(family))


def without_its_class(routed, limits=SMALL):
    """See `loaded_model`."""
    traced = trace(routed)
    programs = {name: lower(program, "eager") for name, program in traced.programs.items()}
    return LoadedModel(
        Parts(
            config=routed.config,
            generation_config=routed.generation_config,
            routing_config=routed.routing_config,
            limits=limits,
            dtype=routed.dtype,
            device=routed.device,
            images=traced.images,
            positions=traced.positions,
            layer_features=text_decoder(routed).layer_features,
            visual_ids=find_visual_token_ids(routed.config),
            programs={name: lambda p=p, **given: by_name(p(**given)) for name, p in programs.items()},
            groups=traced.groups,
            stateful=text_decoder(routed).stateful,
        )
    )


def artifact(tmp_path_factory, family, tier=TIERS[0]):
    """The folder of an artifact, which the first process that asks makes."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = Path(root, "artifacts", family)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / str(tier)).exists():
            made = processor() if family == "llava" else None
            reroute_fx.export(routed_at(family, tier), folder / str(tier), limits=LIMITS, processor=made)
    return folder / str(tier)
