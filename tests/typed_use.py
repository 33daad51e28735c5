"""What type checkers and editors know of the models that users hold; `make types` reads it, nothing runs it."""

from pathlib import Path
from typing import assert_type

import torch

import reroute_fx
from reroute_fx import (
    LoadedModel,
    Profile,
    RoutedCache,
    RoutedModel,
    Routing,
    RoutingConfig,
    RoutingReport,
    Tuned,
)


def use(model: torch.nn.Module, ids: torch.Tensor) -> None:
    routed = reroute_fx.compile(model, tier=128, method="fastv")
    assert_type(routed, RoutedModel)
    assert_type(routed.report, RoutingReport)
    assert_type(routed.routing_config, RoutingConfig)
    routed.routing_config.save("config.json")
    assert_type(RoutingConfig.load("config.json"), RoutingConfig)
    assert_type(reroute_fx.compile(model, config=Path("config.json")), RoutedModel)
    assert_type(reroute_fx.inspect(model, config="config.json"), RoutingReport)
    assert_type(reroute_fx.tune(model, [{"input_ids": ids}]), Tuned)
    assert_type(routed.visualize({"input_ids": ids}, "pictures"), Path)
    profile = reroute_fx.profile(model, [{"input_ids": ids}], tier=64)
    assert_type(profile, Profile)
    assert_type(profile.proposals(num=3)[0].config, RoutingConfig)
    output = routed(input_ids=ids)
    assert_type(output.logits, torch.Tensor)
    assert_type(output.routing, Routing)
    assert_type(output.past_key_values, RoutedCache | None)
    print(routed.generate(input_ids=ids, max_new_tokens=4)[0], routed.config.model_type, routed.device.index)


def load(folder: Path, ids: torch.Tensor) -> None:
    loaded = reroute_fx.load(folder)
    assert_type(loaded, LoadedModel)
    assert_type(loaded(input_ids=ids).routing, Routing)
    print(loaded.report, loaded.generate(input_ids=ids))
