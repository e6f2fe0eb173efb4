"""Parameter groups of another framework, kept in Megatron's formats beside the groups that Megatron looks up.

Megatron divides parameters by its own rule (matrices decay, the rest does not), and passes over an entry of a
checkpoint that it does not know.  What it saves after training on has no such entry, so that it is never stale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anyckpt.checkpoint import OptimizerState

ORIGINAL_GROUPS = "original_param_groups"
"""The entry: of a distributed checkpoint's common state, and of a rank's file."""


def original_groups(state: OptimizerState) -> dict[str, Any]:
    """The entry to keep, by its name; empty where the groups are Megatron's or nothing tells what is in which."""
    if not state.group_of or all("wd_mult" in group or "pre_wd_mult" in group for group in state.groups):
        return {}
    entry = {"param_groups": list(state.groups), "group_of": dict(state.group_of), "order": list(state.order)}
    return {ORIGINAL_GROUPS: entry}


def with_original_groups(state: OptimizerState, entry: Any) -> OptimizerState:
    """The state with the groups of a kept entry; itself where the entry is no such thing or lacks a parameter."""
    if not isinstance(entry, Mapping):
        return state
    groups, group_of, order = entry.get("param_groups"), entry.get("group_of"), entry.get("order")
    if not isinstance(groups, list) or not isinstance(group_of, dict) or not isinstance(order, list):
        return state
    names = {name for tensors in state.slots.values() for name in tensors}
    if not names <= group_of.keys() or not all(isinstance(group, dict) for group in groups):
        return state
    if not all(type(name) is str and type(n) is int and 0 <= n < len(groups) for name, n in group_of.items()):
        return state
    return replace(
        state,
        groups=tuple({str(key): value for key, value in group.items()} for group in groups),
        group_of={name: number for name, number in group_of.items() if name in names or not names},
        order=tuple(name for name in order if type(name) is str),
    )
