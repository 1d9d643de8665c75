"""What a rank holds of the parameters of a DeepSpeed engine."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning.fabric.strategies._holding import Holding, averaged, copy_on_each, ranks


def gradients_of(engine: Any) -> str:
    """How gradients meet: in one dtype, as the engine has it."""
    if engine.client_optimizer is None:
        return "are of no use: it was set up for inference"
    how = averaged(engine.dp_world_size, engine.communication_data_type)
    return f"{how}, each rank keeping its part" if how and engine.zero_optimization_stage() > 1 else how


def held_whole(engine: Any, name: str, parameter: Tensor, gradients: str) -> Holding:
    found = Holding.all_of(name, parameter, copy_on_each(engine.dp_world_size), gradients)
    return replace(found, has_gradient=None) if engine.zero_optimization() else found


def part_of(engine: Any, name: str, parameter: Any, gradients: str) -> Holding:
    """At stage 3; ``parameter`` itself is empty, except while it is used."""
    number = engine.dp_world_size
    layout = f"1/{number} of its elements over {ranks(number)}" if number > 1 else "whole, laid out flat"
    if parameter.ds_persist:  # a small one
        layout += ", and whole besides" if parameter.ds_status.name == "AVAILABLE" else ", whole from its first use on"
    return Holding(name, parameter, parameter.ds_tensor, tuple(parameter.ds_shape), layout, gradients)
