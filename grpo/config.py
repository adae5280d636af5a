"""The whole run file: the rooms' configs plus what belongs to the algorithm, the learner and the cluster.

`load_config(path, overrides)` is the only way in: TOML, then `-o table.key=value`, then strict validation. Every error
is one `ConfigError` that names the field and the remedy; nothing heavier than pydantic is imported here.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from rewards.config import RewardConfig
from rollout.config import RolloutConfig, SamplingConfig, TasksConfig
from stability.config import StabilityConfig

C = TypeVar("C", bound=BaseModel)


class ConfigError(ValueError):
    """A run file that cannot work: the message names the field and the remedy."""


class RunConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """The run as a whole."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run folder."""
    steps: int = Field(ge=1)
    """Training steps; one step trains on `grpo.prompts_per_step` groups."""
    seed: int = Field(default=0, ge=0)
    """Decides data order and every sample's seed."""
    output_dir: str = "runs"
    """The run folder is `output_dir/name`."""
    eval_every: int = Field(default=0, ge=0)
    """Evaluate every n steps, and before the first and after the last; 0 = never."""
    eval_samples: int = Field(default=1, ge=1)
    """Completions per held-out task: 1 gives pass@1, k gives pass@1 and pass@k."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Save every n steps; a last checkpoint is always written at the end and on Ctrl-C."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Older complete checkpoints are deleted."""
    tensorboard: bool = True
    """Write TensorBoard events beside `metrics.jsonl`."""


class ModelConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """The base checkpoint."""

    path: str
    """A Hugging Face model folder or id; a relative folder is looked up beside the run file, then where you are."""
    recipe: str | None = None
    """`./file.py:function`, called with the folder when `path` does not exist yet, to make the model there."""


class GrpoConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Batch arithmetic and the objective's shape."""

    group_size: int = Field(default=8, ge=2)
    """Completions per prompt, G."""
    prompts_per_step: int = Field(default=32, ge=1)
    """Groups per training step."""
    updates_per_batch: int = Field(default=1, ge=1)
    """Optimizer steps per step: the batch is split into that many whole-group parts."""
    max_off_policy_steps: int = Field(default=0, ge=0)
    """Generation may run ahead by this many policy versions; 0 = synchronous."""
    loss_aggregation: Literal["sequence", "token"] = "sequence"
    """`sequence`: mean over sequences of token means (the paper); `token`: mean over all tokens of the update."""
    refill_zero_signal: bool = False
    """Draw further prompts in place of groups whose rewards are all equal (dynamic sampling)."""
    max_refills: int = Field(default=2, ge=1)
    """At most this many times `prompts_per_step` extra groups per step when refilling."""
    max_drop_rate: float = Field(default=0.5, ge=0, lt=1)
    """The run stops when rewards could not be had for more than this share of a step's samples."""


class LearnerConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """The FSDP2 training group."""

    ranks: int = Field(default=1, ge=1)
    """Processes that share the model; one GPU each where there are GPUs. The first reads it, in float32 (twice if a KL
    strength is above zero), into the host memory of its node."""
    lr: float = Field(default=1e-6, gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a half cosine to zero at the run's last optimizer step."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled, on every parameter."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the gradient's running mean."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the squared gradient's running mean."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type; master weights, gradients' reduction and optimizer state are float32."""
    max_tokens_per_microbatch: int = Field(default=16384, ge=1)
    """Packed tokens per forward; the longest prompt + completion must fit."""
    gradient_checkpointing: bool = True
    """Recompute decoder layers in the backward pass: less memory, about a third more compute."""
    cpu_threads: int = Field(default=1, ge=1)
    """Compute threads of one rank on a machine without GPUs."""


class ClusterConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Where the actors run, and how long anyone waits for anyone."""

    address: str | None = None
    """Ray address to join (`auto` finds the running one); unset joins the cluster whose job the run is, or starts a
    private Ray on this machine."""
    layout: Literal["colocated", "disaggregated"] = "disaggregated"
    """`colocated`: engines and learner ranks share GPUs and take turns; `disaggregated`: each has its own."""
    start_timeout_s: float = Field(default=600, gt=0)
    """Longest wait for an actor to come up."""
    generate_timeout_s: float = Field(default=1800, gt=0)
    """Longest wait for one group of completions."""
    train_timeout_s: float = Field(default=3600, gt=0)
    """Longest wait for one training step or checkpoint."""
    sync_timeout_s: float = Field(default=600, gt=0)
    """Longest wait for one weight sync."""
    max_worker_restarts: int = Field(default=8, ge=0)
    """A lost rollout worker is replaced this often before the run stops."""
    reward_workers: int = Field(default=4, ge=1)
    """Processes that reward functions run in; synchronous functions run one call at a time in each."""


class DebugConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """What is kept for looking closer."""

    dump_batches: bool = False
    """Write every step's batch for `keel replay`."""
    samples_per_step: int = Field(default=8, ge=0)
    """Completions written to `samples.jsonl` per step."""


class DomainConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """What one domain does differently; unset fields follow the global tables."""

    weight: float | None = Field(default=None, gt=0)
    """Relative share of the prompts among the domains that set one; unset: the share it has by number of tasks."""
    beta: float | None = Field(default=None, ge=0)
    delta: Annotated[float, Field(gt=0)] | Literal["off"] | None = None
    eps_low: float | None = Field(default=None, gt=0, lt=1)
    eps_high: float | None = Field(default=None, gt=0)
    temperature: float | None = Field(default=None, gt=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    max_new_tokens: int | None = Field(default=None, ge=1)
    rewards: tuple[RewardConfig, ...] | None = None
    """Replaces the global `[[rewards]]` for this domain."""


class TrainConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """A complete, validated run file."""

    run: RunConfig
    model: ModelConfig
    tasks: TasksConfig
    sampling: SamplingConfig = SamplingConfig()
    grpo: GrpoConfig = GrpoConfig()
    stability: StabilityConfig = StabilityConfig()
    learner: LearnerConfig = LearnerConfig()
    rollout: RolloutConfig = RolloutConfig()
    cluster: ClusterConfig = ClusterConfig()
    debug: DebugConfig = DebugConfig()
    rewards: tuple[RewardConfig, ...] = Field(min_length=1)
    domains: dict[str, DomainConfig] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _read_delta_off(cls, data: Any) -> Any:
        """TOML has no null: `delta = "off"` is how a run file unsets the mask."""
        stability = data.get("stability") if isinstance(data, dict) else None
        if isinstance(stability, dict) and stability.get("delta") == "off":
            return {**data, "stability": {**stability, "delta": None}}
        return data

    @model_validator(mode="after")
    def _check_arithmetic(self) -> TrainConfig:
        if self.grpo.prompts_per_step % self.grpo.updates_per_batch:
            raise ValueError(
                f"grpo.updates_per_batch = {self.grpo.updates_per_batch} must divide grpo.prompts_per_step = "
                f"{self.grpo.prompts_per_step}: every update trains on whole groups"
            )
        if self.longest_sequence > self.learner.max_tokens_per_microbatch:
            raise ValueError(
                f"learner.max_tokens_per_microbatch = {self.learner.max_tokens_per_microbatch} cannot hold the longest "
                f"sequence: tasks.max_prompt_tokens + max_new_tokens = {self.longest_sequence}; raise it or shorten "
                "them"
            )
        return self

    @model_validator(mode="after")
    def _check_truncation(self) -> TrainConfig:
        if self.truncates and not self.stability.keep_sampling_mask and not self.stability.allow_biased_truncation:
            raise ValueError(
                "sampling truncates (top_p < 1 or top_k > 0) but stability.keep_sampling_mask is off, so every ratio "
                "would be wrong by the cut-off probability mass: turn keep_sampling_mask on, sample with top_p = 1 and "
                "top_k = 0, or set stability.allow_biased_truncation = true"
            )
        return self

    @model_validator(mode="after")
    def _check_layout(self) -> TrainConfig:
        workers, ranks, parallel = self.rollout.workers, self.learner.ranks, self.rollout.tensor_parallel_size
        if self.cluster.layout == "colocated" and (workers != ranks or parallel != 1):
            raise ValueError(
                "cluster.layout = colocated pairs one engine with one learner rank on each GPU, but rollout.workers = "
                f"{workers}, learner.ranks = {ranks}, rollout.tensor_parallel_size = {parallel}: make the first two "
                "equal and the last one 1, or choose cluster.layout = disaggregated"
            )
        if self.rollout.sleep_while_training and self.cluster.layout != "colocated":
            raise ValueError(
                "rollout.sleep_while_training gives an engine's GPU memory to the learner on the same GPU: set "
                "cluster.layout = colocated, or leave it off"
            )
        if self.rollout.sleep_while_training and self.grpo.max_off_policy_steps > 0:
            raise ValueError(
                "rollout.sleep_while_training stops generation while the learner trains, but "
                f"grpo.max_off_policy_steps = {self.grpo.max_off_policy_steps} asks for both at once: set one of them "
                "to its default"
            )
        return self

    def sampling_of(self, domain: str) -> SamplingConfig:
        """The sampling of a domain: its overrides over `[sampling]`."""
        return _overridden(self.sampling, self.domains.get(domain))

    def stability_of(self, domain: str) -> StabilityConfig:
        """The stability knobs of a domain: its overrides over `[stability]`."""
        return _overridden(self.stability, self.domains.get(domain))

    def rewards_of(self, domain: str) -> tuple[RewardConfig, ...]:
        """The rewards of a domain: its own list, or the global one."""
        override = self.domains.get(domain)
        return self.rewards if override is None or override.rewards is None else override.rewards

    @property
    def all_sampling(self) -> tuple[SamplingConfig, ...]:
        """Every sampling setting that can occur in the run."""
        return (self.sampling, *(self.sampling_of(name) for name in self.domains))

    @property
    def truncates(self) -> bool:
        """Whether any domain samples from a truncated distribution."""
        return any(s.top_p < 1.0 or s.top_k > 0 for s in self.all_sampling)

    @property
    def needs_reference(self) -> bool:
        """Whether any KL strength is above zero, so that a frozen reference must be held."""
        return any(s.beta > 0 for s in (self.stability, *(self.stability_of(name) for name in self.domains)))

    @property
    def longest_sequence(self) -> int:
        """Most tokens a prompt and its completion can have together."""
        return self.tasks.max_prompt_tokens + max(s.max_new_tokens for s in self.all_sampling)

    @property
    def max_parity_error(self) -> float:
        """The parity probe's threshold in nats, by engine dtype unless set."""
        if self.stability.max_parity_error is not None:
            return self.stability.max_parity_error
        return 1e-3 if self.rollout.dtype == self.learner.dtype == "float32" else 0.15

    @property
    def run_dir(self) -> Path:
        return Path(self.run.output_dir) / self.run.name


def _overridden(base: C, override: DomainConfig | None) -> C:
    """`base` with the fields that a domain sets."""
    if override is None:
        return base
    values = override.model_dump(
        include=set(type(base).model_fields) & set(DomainConfig.model_fields), exclude_none=True
    )
    return base.model_copy(update={key: None if value == "off" else value for key, value in values.items()})


def load_config(path: str | Path, overrides: tuple[str, ...] = ()) -> TrainConfig:
    """Reads a run file, applies `table.key=value` overrides and validates.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown or impossible; names it and the remedy.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such run file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    return make_config(data, overrides, source=path)


def make_config(data: dict[str, Any], overrides: tuple[str, ...] = (), *, source: Path) -> TrainConfig:
    """Applies `table.key=value` overrides to the tables, in place, and validates.

    Raises:
        ConfigError: a field is unknown or impossible; names it, the file that it came from, and the remedy.
    """
    for override in overrides:
        _apply_override(data, override)
    try:
        return TrainConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(source, error)) from None


def _apply_override(data: dict[str, Any], override: str) -> None:
    """Sets one `table.key=value`; the value is read as TOML, or taken as a string if it is not TOML."""
    key, separator, raw = override.partition("=")
    parts = key.strip().split(".")
    if not separator or len(parts) < 2:
        raise ConfigError(f"override {override!r}: write it as table.key=value, for example -o learner.lr=1e-4")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    table: Any = data
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {override!r}: {part!r} is not a table")
    table[parts[-1]] = value


def _explain(path: Path, error: ValidationError) -> str:
    """All problems of a run file, one line each: field, what is wrong, what was given."""
    lines = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = _unknown_key(problem["loc"])
        elif problem["type"] != "value_error" and problem["type"] != "missing":
            message = f"{message} (got {problem['input']!r})"
        lines.append(f"{path}: {field + ': ' if field else ''}{message}")
    return "\n".join(lines)


def _unknown_key(location: tuple[int | str, ...]) -> str:
    """Names the nearest known key for one that does not exist."""
    import difflib

    model: Any = TrainConfig
    for part in location[:-1]:
        if isinstance(part, str) and hasattr(model, "model_fields") and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            model = {"domains": DomainConfig, "rewards": RewardConfig}.get(part, annotation)
    known = list(getattr(model, "model_fields", {}))
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
    return f"unknown key; {hint}"
