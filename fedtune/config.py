"""Every setting of a run: frozen, flat (Flower's run config holds only scalars), checked once at the door.

A preset is a TOML file of these keys. The same file works for `fedtune simulate FILE` and for
`flwr run . --run-config FILE`; `[tool.flwr.app.config]` in pyproject.toml repeats the defaults
(a test keeps the two equal). Names follow the papers: K, eps, lr, server_lr, local_steps (tau, T), client_fraction (m).
Unset is "" for text and 0 for numbers, since Flower's run config has no null.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator

from fedtune import methods, toml
from fedtune.contradictions import refuse_contradictions, refuse_overwritten
from fedtune.errors import ConfigError
from fedtune.foreign import for_screen
from fedtune.source_names import expand, split_source
from fedtune.values import as_written, checked, kind_of, refuse_unknown, refused

Scalar = methods.Scalar
YEAR = 31_536_000.0  # seconds: longer than any run, and short enough for every clock


class RunConfig(BaseModel):
    """One run. Construct with `RunConfig.load`, `RunConfig.from_mapping` or keyword arguments.

    Raises:
        UnknownSettingError: a key that does not exist.
        ContradictionError: two settings that exclude each other.
        ConfigError: a value out of range or of the wrong type.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    # ------------------------------------------------------------------ the method
    algorithm: Literal[
        "fedkseed", "fedkseed-pro", "ferret", "subspace", "fedavg", "lora", "fedzo", "decomfl", "local", "central"
    ] = Field(
        "fedkseed",
        description="fedkseed, fedkseed-pro (arXiv 2312.06353) or ferret (arXiv 2409.06277); to compare with: fedavg (full "
        "weights), lora (FedIT), fedzo, decomfl (arXiv 2405.15861), local (one client alone), central (all data in one place)",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="names every random stream of the run")
    rounds: int = Field(10, ge=1, le=1_000_000, description="server rounds")
    clients: int = Field(8, ge=1, le=1_000_000, description="clients in the federation (nodes to wait for in a deployment)")
    client_fraction: float = Field(0.5, gt=0, le=1, description="share of the clients asked each round (m in the papers)")
    clients_per_round: int = Field(0, ge=0, le=1_000_000, description="number asked each round; 0: from client_fraction")
    local_steps: int = Field(
        50,
        ge=1,
        le=1_000_000,
        description="optimisation steps per client and round (tau in FedKSeed, T in Ferret); central does those of all clients "
        "that a round would ask",
    )
    batch_size: int = Field(1, ge=1, le=65536, description="samples per step (micro-batch for Ferret)")
    lr: float = Field(0.0, ge=0, description=f"local learning rate (eta); 0: {methods.rates_in_words()}")
    sampling: Literal["uniform", "examples"] = Field(
        "uniform", description="chance of a client to be asked: equal, or in proportion to its samples"
    )
    weighting: Literal["examples", "equal"] = Field(
        "examples", description="weight of a client's update: by number of samples, or equal"
    )
    K: int = Field(
        1024,
        ge=2,
        le=65536,
        description="fedkseed: candidate seeds in the pool; ferret and subspace: coordinates that a client sends in a round "
        "(with allocation official: candidate seeds in the pool, as in its code); the others have no use for it",
    )
    # ------------------------------------------------------------------ fedkseed
    eps: float = Field(5e-4, gt=0, description="half the distance between the two evaluations of a step")
    directions_per_step: int = Field(
        1, ge=1, le=65536, description="directions whose slopes a step measures on its batch and averages (P in DeComFL)"
    )
    # ------------------------------------------------------------------ ferret
    server_lr: float = Field(1.0, gt=0, description="step of the server along the mean update (1: as measured)")
    anneal: Literal["none", "linear", "cosine"] = Field("none", description="schedule of server_lr over the rounds")
    momentum: float = Field(0.0, ge=0, lt=1, description="ferret: server momentum on the coordinates (fixed pool only)")
    optimizer: Literal["", "sgd", "momentum", "adamw"] = Field(
        "",
        description="rule of first-order local steps; '': sgd (as in Ferret's paper; subspace: of the normalised gradient); "
        "momentum and adamw keep one or two float32 copies of the weights in memory (subspace: of K numbers) and start afresh "
        "every round; adamw: betas 0.9 and 0.999 (subspace: 0.99), no weight decay",
    )
    local_momentum: float = Field(0.9, ge=0, lt=1, description="momentum of optimizer momentum")
    accumulate: int = Field(
        1, ge=1, le=65536, description="first order: micro-batches per step (n_accum); above 1 all gradients are in memory"
    )
    clip_norm: float = Field(
        0.0,
        ge=0,
        description="first order: gradient norm above which a local step is scaled down; 0: off (else all gradients are in "
        "memory)",
    )
    pool_size: int = Field(
        0, ge=0, le=65536, description="most coordinates one block can get (ferret, subspace); 0: chosen from K"
    )
    blocks: Literal["auto", "one", "grouped", "tensor"] = Field(
        "auto", description="parameters that share coefficients: auto is grouped for ferret and subspace, one for others"
    )
    allocation: Literal["norm-sqrt-size", "norm", "uniform", "official"] = Field(
        "norm-sqrt-size",
        description="ferret, subspace: how K is divided over blocks (Ferret's paper uses norm); official: K for the block "
        "that moved most, "
        "in proportion to the norm for the others, at least 2",
    )
    reconstruction: Literal["unbiased", "shrunken", "official"] = Field(
        "unbiased",
        description="ferret: scale 1/K_l (unbiased, the paper), 1/(K_l + d_l) (least error), or official: 1/(3 K_l) "
        "with each rank-one piece clipped to norm 10, as in its code",
    )
    coordinates: Literal["", "own", "shared"] = Field(
        "",
        description="seeds that a client's coordinates are of; own ('' for ferret): its own choice from the pool, so that "
        "errors average over clients; shared ('' for subspace, which has nothing else): the same for all, so that a round is K "
        "numbers on the way down too",
    )
    # ------------------------------------------------------------------ the methods to compare with
    lora_rank: int = Field(8, ge=1, le=1024, description="lora: rank of an adapter")
    lora_alpha: float = Field(16.0, gt=0, description="lora: an adapter's product is scaled by lora_alpha / lora_rank")
    lora_targets: str = Field(
        "auto",
        min_length=1,
        description="lora: names of the layers that get an adapter, with commas between; auto: all linear ones but the head",
    )
    only_client: str = Field("", description="local: id of the client that trains; '': the first")
    # ------------------------------------------------------------------ directions
    family: Literal["hadamard", "rademacher", "gaussian", "lowrank", "torch", "torch-truncated"] = Field(
        "hadamard",
        description="rule from seed to direction; gaussian is the papers' distribution; lowrank a product of thin normal "
        "factors for each matrix; torch and torch-truncated are the draws of FedKSeed's and Ferret's official codes (slow, "
        "for parity: docs/fidelity.md)",
    )
    rank: int = Field(1, ge=1, le=256, description="lowrank: rank of a matrix's direction")
    pool_every: int = Field(
        0, ge=0, le=1_000_000, description="rounds after which a fresh pool is drawn; 0: one pool for the run, for subspace 1"
    )
    # ------------------------------------------------------------------ wire
    coefficient_bits: int = Field(
        0,
        ge=0,
        le=32,
        description="bits per coefficient on the way down, 2 to 24 (full weights: to 32); 0: 8, for full weights 32",
    )
    scalar_bits: Literal[0, 1, 2, 4, 8, 16, 32] = Field(
        0,
        description="bits per scalar gradient, coordinate or weight on the way up (1 to 4: coordinates only, 8: not for "
        "weights); 0: 16, for full weights 32",
    )
    # ------------------------------------------------------------------ model
    model: str = Field("embedded", min_length=1, description="folder, hub name, or 'embedded' (ships with fedtune)")
    revision: str = Field("", description="revision of a hub model")
    trust_remote_code: bool = Field(False, description="run Python code that comes with a hub model")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="type of the weights")
    update_rounding: Literal["nearest", "stochastic", "master"] = Field(
        "nearest",
        description="how a client's steps are rounded to 16-bit weights: nearest, stochastic (up or down by chance, right in "
        "the mean) or master (a float32 copy takes the steps; twice the weights more memory)",
    )
    device: str = Field("auto", min_length=1, description="auto, cpu, cuda, cuda:N or mps")
    device_map: Literal["none", "auto", "balanced", "sequential"] = Field(
        "none", description="spread the model's layers over all GPUs, as accelerate does (extra multi-gpu); none: one device"
    )
    offload: bool = Field(
        False,
        description="fedkseed: weights stay in host memory and go to the device module by module, so that the model need not "
        "fit it",
    )
    threads: int = Field(0, ge=0, le=4096, description="CPU threads of torch; 0: 1 below 20 M parameters, else all cores")
    # ------------------------------------------------------------------ data
    data: str = Field("embedded", description="JSON, JSONL or Parquet file, hub:NAME, DATASET:PATH, or 'embedded'")
    instruction_column: str = Field("instruction", description="column with the instruction")
    input_column: str = Field("input", description="column with the optional input; '' for none")
    output_column: str = Field("output", description="column with the response that is trained on")
    category_column: str = Field("category", description="column that partition and held-out category refer to")
    template: Literal["alpaca", "fedkseed", "chat", "plain"] = Field(
        "alpaca",
        description="how a sample becomes a prompt: alpaca, fedkseed (its official code's sentence), "
        "chat (the tokenizer's template) or plain",
    )
    max_length: int = Field(256, ge=8, le=2**20, description="tokens of prompt and response together")
    # ------------------------------------------------------------------ partition
    partition: Literal["iid", "dirichlet", "column", "quantity"] = Field(
        "iid", description="iid, dirichlet (label skew), column (one value of category_column a client), quantity skew"
    )
    dirichlet_alpha: float = Field(
        0.5, gt=0, le=1_000_000, description="concentration of dirichlet and quantity; smaller is more skewed"
    )
    min_samples: int = Field(10, ge=1, le=1_000_000, description="fewest usable samples a client may get")
    holdout: float = Field(0.1, ge=0, lt=1, description="share of the rows held out for evaluation")
    holdout_category: str = Field("", description="hold out all rows of this category instead")
    holdout_file: str = Field("", description="evaluate on this file instead")
    # ------------------------------------------------------------------ evaluation
    eval_every: int = Field(
        1, ge=0, le=1_000_000, description="evaluate every n rounds (always before the first and after the last); 0: only those"
    )
    eval_samples: int = Field(0, ge=0, le=2**31, description="held-out samples to use; 0: all")
    eval_batch_size: int = Field(16, ge=1, le=65536, description="samples per evaluation batch (changes no result)")
    generate_samples: int = Field(
        0, ge=0, le=2**31, description="held-out samples to generate for ROUGE-L and exact match; 0: none"
    )
    choices: str = Field(
        "",
        description="answers to choose from, for accuracy by likelihood: A|B|C, column:NAME (a list in each held-out row) or "
        "auto (the different responses of a sample's category, where they are few); '': accuracy is not measured",
    )
    max_new_tokens: int = Field(128, ge=1, le=100_000, description="longest generated response")
    # ------------------------------------------------------------------ the run
    out: str = Field("", description="run folder; '': runs/<preset>-<date>-<time>")
    resume: str = Field("", description="run folder of a run to carry on, with the settings that it had (docs/ledger.md)")
    over_selection: float = Field(
        0.0, ge=0, le=100, description="share of further clients asked each round, against failures; all that answer are used"
    )
    min_replies: int = Field(
        0, ge=0, le=1_000_000, description="usable updates without which a round changes nothing (short_round); 0: one"
    )
    short_round: Literal["skip", "repeat"] = Field(
        "skip",
        description="a round with fewer than min_replies usable updates: go on to the next one, or ask again, other clients",
    )
    round_timeout: float = Field(
        3600.0,
        gt=0,
        le=YEAR,
        description="seconds a client has for one round; it stops a little before and returns the steps done",
    )
    wait_timeout: float = Field(600.0, gt=0, le=YEAR, description="seconds to wait for enough clients to connect")
    min_clients: int = Field(
        0, ge=0, le=1_000_000, description="clients without whom the first round does not begin; 0: all of them"
    )
    grace: float = Field(
        3.0,
        ge=0,
        le=1_000_000,
        description="the slow have this many times as long as half (or min_replies) took, 30 s at least; 0: no limit",
    )
    max_examples: int = Field(
        1_000_000, ge=1, lt=2**32, description="most samples that a client may have: its weight in a round"
    )

    keep_updates: bool = Field(
        True, description="false: updates above 1 MB (full weights) go once their round is written; it cannot be replayed then"
    )

    # ------------------------------------------------------------------ construction

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Check `values` (from TOML, Flower or the command line) and return the frozen config.

        Raises:
            ConfigError: or one of its subclasses, naming the key, the value and the fix.
        """
        return cls.model_validate(dict(values))

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Read a preset (TOML, flat) and apply `overrides`; relative paths stay relative to the working directory."""
        values = toml.read(Path(path), "preset")
        if "arms" in values:
            raise ConfigError(f"'{path}' compares several algorithms: run it with `fedtune compare {shlex.quote(str(path))}`.")
        return cls.from_mapping({**values, **(overrides or {})})

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """The door: types, ranges, contradictions; what depends on the algorithm is filled in, so that a config says what is
        used. `model_fields_set` are the settings that were given, and not those that were filled in.
        """
        if not isinstance(values, Mapping):
            return handler(values)
        refuse_unknown(values, cls.model_fields)
        asked = checked(values, cls.model_fields)
        usual = {key: field.default for key, field in cls.model_fields.items()}
        refuse_overwritten({**usual, **asked}, usual)
        try:
            found = handler(methods.filled(asked, usual["algorithm"]))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise refused(str(first["loc"][0]), first["input"], first["msg"]) from None
        given = {key for key, value in asked.items() if value == getattr(found, key)}
        object.__setattr__(found, "__pydantic_fields_set__", given)
        refuse_contradictions(found)
        return found

    # ------------------------------------------------------------------ derived values

    @property
    def first_order(self) -> bool:
        """Whether clients compute gradients."""
        return self.algorithm in methods.FIRST_ORDER

    @property
    def alone(self) -> bool:
        """Whether one party trains and nothing is sent between parties."""
        return self.algorithm in methods.ALONE

    @property
    def client_steps(self) -> int:
        """Local steps of a client in a round; of `central`, those of all clients that a round of the others asks."""
        return self.local_steps * (self.asked_per_round if self.algorithm == "central" else 1)

    @property
    def asked_per_round(self) -> int:
        """Number of clients asked in each round, at least 1: `clients_per_round`, or floor(client_fraction * clients).

        The fraction is taken as it is written: 0.29 of 100 clients are 29, although the float next to 0.29 is below it.
        """
        return self.clients_per_round or max(1, math.floor(as_written(self.client_fraction) * self.clients))

    @property
    def invited_per_round(self) -> int:
        """Clients asked in each round with `over_selection`: ceil(asked_per_round * (1 + over_selection)), at most all.

        One where one party trains alone.
        """
        if self.alone:
            return 1
        return min(self.clients, math.ceil(self.asked_per_round * (1 + as_written(self.over_selection))))

    @property
    def needed_replies(self) -> int:
        """Usable updates without which a round changes nothing: `min_replies`, at least 1."""
        return max(1, self.min_replies)

    def as_mapping(self) -> dict[str, Scalar]:
        """All settings as a flat mapping of scalars, in the order of declaration."""
        return dict(self.model_dump())

    def replace(self, **changes: Scalar) -> Self:
        """What construction with the settings that were given, and `changes`, gives; what was filled in is filled in anew."""
        given = {key: value for key, value in self.as_mapping().items() if key in self.model_fields_set}
        return self.from_mapping({**given, **changes})

    def with_absolute_paths(self, root: Path | None = None) -> Self:
        """A copy whose local paths are absolute, with environment variables expanded, for processes that start elsewhere."""
        base = root or Path.cwd()
        changes: dict[str, Scalar] = {}
        for key in ("model", "data", "holdout_file", "out", "resume"):
            value = expand(getattr(self, key))
            prefix, path = split_source(value) if key in ("data", "holdout_file") else ("", value)
            path = expand(path)  # a ~ behind the prefix
            local = path not in ("", "embedded") and prefix != "hub" and (key != "model" or (base / path).exists())
            path = str((base / path).resolve()) if local else path
            changes[key] = f"{prefix}:{path}" if prefix else path
        return self.replace(**changes)


def read_setting(text: str) -> tuple[str, Scalar]:
    """`"key=value"` as key and value. The value follows TOML; what TOML cannot read, or reads as no scalar, is text.

    So is a number or a truth value for a setting that takes text: `revision=123`, `only_client=7`.

    >>> read_setting("lr=1e-5"), read_setting("model=foo"), read_setting("seed='7'"), read_setting("only_client=7")
    (('lr', 1e-05), ('model', 'foo'), ('seed', '7'), ('only_client', '7'))

    Raises:
        ConfigError: there is no "=", or no key.
    """
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not key:
        raise ConfigError(f"A setting is KEY=VALUE, not '{for_screen(text, 80)}'.")
    try:
        read = toml.parse(f"value = {value}").get("value") if "\n" not in value else value
    except ValueError:
        read = value
    field = RunConfig.model_fields.get(key)
    kinds: Any = str if field is not None and kind_of(field) is str else bool | int | float | str
    return key, read if isinstance(read, kinds) else value
