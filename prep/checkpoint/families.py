"""Model families: which class runs a config, and whether its experts are on the seam. No family is
named here."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from smoe.artifacts.errors import first_line
from smoe.prep.checkpoint.seam import experts_modules
from smoe.prep.errors import PrepError

# The text decoder alone where there is a class for it; else the whole model, of which text reaches
# the decoder only.
MAPPINGS = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
# What code of a family raises where a value of a config is none that it knows.
UNBUILT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


MOST_LAYERS = 4096  # a model is made layer by layer, before anything else can be known of it


def text_class(config: type) -> type[transformers.PreTrainedModel] | None:
    """The class that generates text for a class of configs, or None."""
    classes = (mapping[config] for mapping in MAPPINGS if config in mapping)
    # transformers annotates its mappings as if all of them held pairs; these hold classes.
    return next(classes, None)  # type: ignore[return-value]


def empty_model(
    config: transformers.PreTrainedConfig, name: str | Path
) -> transformers.PreTrainedModel:
    """The model of `config` on the meta device: its modules without their weights. `name` is for
    the `PrepError`."""
    cls = text_class(type(config))
    if cls is None:
        raise PrepError(
            f"{name}: transformers has no model that generates text for the family "
            f"{config.model_type}."
        )
    config = copy.deepcopy(config)
    if cls.config_class is config.sub_configs.get("text_config"):
        config = config.get_text_config()
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise PrepError(
            f"{name}: config.json says {layers} layers, and models have up to {MOST_LAYERS}: it is "
            "damaged; download it again."
        )
    for part in (config, config.get_text_config()):
        part.dtype = torch.float32
    with contextlib.ExitStack() as contexts:
        for context in cls.get_init_context(torch.float32, False, False, None):
            contexts.enter_context(context)
        try:
            model = cls(config)
        except UNBUILT as error:
            raise PrepError(
                f"{name}: transformers {transformers.__version__} makes no {cls.__name__} of its "
                f"config.json ({type(error).__name__}: {first_line(error)}): a value in it is "
                "damaged, or only a newer transformers knows it."
            ) from error
    model.config.get_text_config().output_router_logits = False
    return model


def refuse_without_seam(model: transformers.PreTrainedModel, name: str | Path) -> None:
    """A `PrepError` with the reason if the model's experts are not run through the seam."""
    if not any(len(module.down_proj) for _, module in experts_modules(model)):
        raise PrepError(
            f"{name} is a {model.config.model_type} model without experts on transformers' "
            "experts interface: either "
            "it is dense, or its family does not offer the interface. smoe prepares "
            "mixture-of-experts models that do."
        )
