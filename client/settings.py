"""Which settings a client takes from the server, and which from its own machine.

In a simulation the settings are those of one person, and a client uses them all. A node (the process that a SuperNode starts
for one message) obeys the server in what the method is, and its own node config in what touches the machine: files, devices,
memory, and code that comes with a model. `WHO` says which is which for every setting; docs/deployment.md repeats it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from fedtune.config import RunConfig, Scalar
from fedtune.errors import ConfigError

ONE_MESSAGE = "flwr-clientapp"  # Flower's program for one message on a SuperNode; no simulation runs under this name
SHIPPED = "embedded"  # model and data that come with fedtune, the only ones that a server may name


class Who(StrEnum):
    """Who decides a setting on a node."""

    SERVER = "the server"
    NODE = "the node config"
    NOBODY = "not used on a node"


_SERVER = (
    "algorithm seed rounds clients client_fraction clients_per_round local_steps batch_size lr sampling weighting K eps "
    "directions_per_step server_lr anneal momentum optimizer local_momentum accumulate clip_norm pool_size blocks allocation "
    "reconstruction coordinates lora_rank lora_alpha lora_targets only_client family rank pool_every coefficient_bits "
    "scalar_bits dtype update_rounding instruction_column input_column output_column category_column template max_length "
    "partition dirichlet_alpha min_samples holdout holdout_category"
)
_NODE = "model revision trust_remote_code device device_map offload threads data holdout_file"
_NOBODY = (
    "eval_every eval_samples eval_batch_size generate_samples choices max_new_tokens out resume over_selection min_replies "
    "short_round round_timeout wait_timeout min_clients grace max_examples keep_updates"
)
WHO: Mapping[str, Who] = {
    name: who for names, who in ((_SERVER, Who.SERVER), (_NODE, Who.NODE), (_NOBODY, Who.NOBODY)) for name in names.split()
}
FILES = ("model", "data", "holdout_file")

MOST_DIRECTIONS = 1 << 22
"""Of the local steps of a round, all together: their seeds are drawn before the first step, 8 bytes each."""


def on_a_node() -> bool:
    """Whether this is the process of a SuperNode for one message."""
    return Path(sys.argv[0]).stem == ONE_MESSAGE


def settings_of(asked: Mapping[str, Scalar], node: Mapping[str, Scalar]) -> RunConfig:
    """The settings of a client whose server asks for `asked` and whose node config is `node`.

    Raises:
        ConfigError: a setting that cannot be used, or names what a server must not name.
    """
    if not on_a_node():
        return RunConfig.from_mapping({**asked, **_own(node)})
    if node.get("server-decides", False) is True:
        for key in FILES:
            _refuse_variables(key, str(asked.get(key, "")))
        return _bounded(RunConfig.from_mapping({**asked, **_own(node)}))
    return _bounded(RunConfig.from_mapping(for_node(asked, node)))


def for_node(asked: Mapping[str, Scalar], node: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """What is left of `asked` on a node, and the node's own. Raises ConfigError."""
    kept = {key: value for key, value in asked.items() if WHO.get(key, Who.SERVER) is Who.SERVER}  # unknown keys are refused
    if not node.get("data"):
        kept["holdout_file"] = _shipped("holdout_file", asked, "DATA", ("", SHIPPED))  # what is held out is not trained on
        kept["data"] = _shipped("data", asked, "DATA", (SHIPPED,))
    if not node.get("model"):
        kept["model"] = _shipped("model", asked, "MODEL", (SHIPPED,))
    return {**kept, **_own(node)}


def _own(node: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The settings that the node config has; its `data` is the client's and no setting of the run."""
    names = {key.replace("_", "-"): key for key, who in WHO.items() if who is Who.NODE and key not in ("data", "holdout_file")}
    return {key: node[name] for name, key in names.items() if name in node and node[name] != ""}


def _shipped(key: str, asked: Mapping[str, Scalar], entry: str, allowed: tuple[str, ...]) -> Scalar:
    """What the server names, if it comes with fedtune. Raises ConfigError for anything else, which a node does not open."""
    named = asked.get(key, RunConfig.model_fields[key].default)
    if named in allowed:
        return str(named)
    what = "model" if key == "model" else "data"
    raise ConfigError(
        f'This node has no {what} of its own, and does not open what a server names: put {what}="PATH" into its node config '
        f"({entry} in node.env).",
        key=key,
    )


def _refuse_variables(key: str, value: str) -> None:
    if "$" in value or value.startswith("~"):
        raise ConfigError(
            f"{key} came from the server with a variable or ~ in it, which a node does not expand: give the path."
        )


def _bounded(config: RunConfig) -> RunConfig:
    """`config`, refused if it asks for more than a node does for a server; single settings have their own limits."""
    asked = config.client_steps * config.directions_per_step
    if asked > MOST_DIRECTIONS:
        raise ConfigError(
            f"The server asks for local_steps * directions_per_step = {asked:,}; a node takes {MOST_DIRECTIONS:,} at most.",
            asked=asked,
            most=MOST_DIRECTIONS,
        )
    return config
