"""What a kind of configuration cannot say of models of several families; each is a ``caveats`` of a family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from anyckpt.config.model import ModelConfig

Caveats = Callable[[ModelConfig, str], Iterable[str]]


def of_kind(of: str, text: str, when: Callable[[ModelConfig], bool] = lambda config: True) -> Caveats:
    """What one kind of configuration cannot say.

    Args:
        of: the kind.
        text: what it is.
        when: whether it is so of a model.
    """
    return lambda config, kind: [text] if kind == of and when(config) else []


def one_residual_after_the_other(config: ModelConfig, kind: str) -> Iterator[str]:
    """Megatron's layers have one residual after the other."""
    if kind != "hf" and config.parallel_residual:
        yield (
            "attention and MLP of a layer run in parallel here, for which Megatron-Core has no layer: the weights are "
            "right, but a stock model of this configuration computes something else"
        )


def erf_gelu(classes: str, key: str) -> Caveats:
    """These classes of NeMo have the erf GELU, the models that were released the tanh one, which the key says."""

    def caveats(config: ModelConfig, kind: str) -> Iterator[str]:
        if kind == "hf" and config.activation == "gelu" and "hf" not in config.extra:
            yield (
                f"NeMo's {classes} classes have the erf GELU, the released models the tanh one: if this is a released "
                f"model, set {key} to gelu_pytorch_tanh in config.json"
            )

    return caveats


def best_of_each_group(transformers: int) -> Caveats:
    """Megatron-Core's count of experts by which it ranks a group follows from the others; transformers' is fixed.

    Args:
        transformers: how many of a group's best experts its rank is the sum of, there.
    """

    def caveats(config: ModelConfig, kind: str) -> Iterator[str]:
        groups, topk = config.moe_router_group_topk, config.moe_router_topk
        if kind != "hf" and (config.moe_router_num_groups or 1) > 1 and groups and topk != transformers * groups:
            best = "best one" if transformers == 1 else f"best {transformers}"
            yield (
                f"Megatron-Core ranks groups of experts by the best {(topk or 0) // groups} of each, transformers by "
                f"the {best}: the model will choose other experts"
            )

    return caveats


LAYER_SPEC = "bridge_layer_spec"
"""An argument of ours: the function of Megatron-Bridge that gives the layers of a family."""


def own_layers(spec: str) -> Caveats:
    """Megatron-LM has no arguments for a family's layers, which Megatron-Bridge has a function for.

    Args:
        spec: the function.
    """
    return of_kind(
        "megatron-args",
        f"Megatron-LM has no arguments for such layers: build the model with {spec}, which run_config.yaml names",
    )
