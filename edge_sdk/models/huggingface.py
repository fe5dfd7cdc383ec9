"""`huggingface`: any model of transformers by its type (bert, llama, ...) and the numbers of its
configuration, randomly initialised: `--option config=hidden_size=64,num_hidden_layers=4`.

What the spec says is not said again: vocabulary, length, images. With the task tokens and as many
outputs as ids, a causal model ends in its own head; others have fresh exits behind each cut. All
tokens count: nothing is masked."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import nn

from edge_sdk.errors import ConfigError, LackError
from edge_sdk.helpers.imports import optional_module
from edge_sdk.helpers.text import one_line, parse_option
from edge_sdk.models import register_family
from edge_sdk.models.cutting.stages import nearest
from edge_sdk.models.from_module import module_names
from edge_sdk.models.packages import PackageOptions, check_name, check_whole, image_axes, staged
from edge_sdk.models.staged import StagedModel
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.tasks.metrics import METRICS


class HuggingfaceOptions(PackageOptions, frozen=True):
    config: Annotated[
        str, Meta(description="of its configuration, KEY=VALUE with commas (as transformers has)")
    ] = ""


def make(spec: ModelSpec, options: HuggingfaceOptions) -> nn.Module:
    """Raises ConfigError without the package, for an unknown type or an unknown key."""
    transformers, auto = _package()
    check_name(options, "huggingface", sorted(auto.CONFIG_MAPPING_NAMES))
    check_whole(spec, "huggingface")
    usual = transformers.AutoConfig.for_model(options.model)
    given = dict(parse_option(part) for part in options.config.split(",") if part)
    known = [key for key in usual.to_dict() if not key.startswith("_")]
    for key in given:
        if key not in known:
            raise ConfigError(f"{options.model} has no {key!r} in config; {nearest(key, known)}")
    told: dict[str, Any] = {
        "vocab_size": spec.vocabulary,
        "use_cache": False,
        "tie_word_embeddings": False,
    }
    pad = getattr(usual, "pad_token_id", None)
    told["pad_token_id"] = pad if pad is not None and pad < spec.vocabulary else None
    if not spec.vocabulary:
        channels, height, _ = image_axes(spec, "huggingface, without a vocabulary of ids,")
        told = {"num_channels": channels, "image_size": height, "tie_word_embeddings": False}
    told = {key: value for key, value in told.items() if key in known}
    config = transformers.AutoConfig.for_model(options.model, **(given | told))
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and spec.vocabulary and longest < spec.input_shape[0]:
        raise ConfigError(
            f"config max_position_embeddings {longest}, the data have {spec.input_shape[0]} tokens"
        )
    kind = "AutoModelForCausalLM" if _is_causal(spec, options) else "AutoModel"
    try:
        module: nn.Module = getattr(transformers, kind).from_config(config)
    except ModuleNotFoundError as error:  # it names its own file and not what lacks below that
        why = one_line(str(error.__cause__ or error))
        raise LackError(
            f"the family huggingface cannot load {options.model} of transformers: {why}; what it "
            "needs lacks, or is for another torch"
        ) from error
    return module


def _package() -> tuple[Any, Any]:
    what = "the family huggingface"
    package = optional_module("transformers", what, "huggingface")
    return package, optional_module(
        "transformers.models.auto.configuration_auto", what, "huggingface"
    )


def _is_causal(spec: ModelSpec, options: HuggingfaceOptions) -> bool:
    """Whether it is made with the head that tells the next token."""
    if spec.task != "tokens" or spec.num_classes != spec.vocabulary:
        return False
    _package()
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    masked = options.model in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return options.model in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not masked


def build(spec: ModelSpec, options: HuggingfaceOptions) -> StagedModel:
    return staged(spec, options, make)


def names(spec: ModelSpec, options: HuggingfaceOptions) -> dict[str, str]:
    """Files of a type's models have its name before that of a tensor, as in
    bert.encoder.layer.0; the module without a head has not."""
    found = module_names(build(spec, options))
    if _is_causal(spec, options):
        return found
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        prefix = make(spec, options).base_model_prefix
    return {name: f"{prefix}.{original}" for name, original in found.items()}


register_family(
    "huggingface",
    build,
    HuggingfaceOptions,
    names,
    tasks=tuple(METRICS),
    takes_ids=True,
    makes_any=True,
)
