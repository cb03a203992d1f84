"""From what a user typed to frozen settings, and every complaint about it.

The dataclasses below are the configuration: their fields are the keys, their values the defaults. A file under
`experiments/` starts from `default_config()` and changes what it needs; the command line changes the rest.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ml_collections import ConfigDict

from fdg_jax import by_name, models
from fdg_jax.backward import resolve_remat
from fdg_jax.methods import PRESETS, Method
from fdg_jax.models import MODELS
from fdg_jax.names import check_name
from fdg_jax.partition import SPLITS
from fdg_jax.pipeline import ENGINES

SOURCES = ("digits", "arrays", "folder", "tfds")
CUTS = (*SPLITS, "published", "balanced")
METHODS = PRESETS
OPTIMIZERS = ("sgd", "adam", "adamw", "nadamw")
RATE_SCHEDULES = ("constant", "piecewise", "cosine")
DTYPES = ("float32", "bfloat16")
RESUMES = ("auto", "params", "never")  # go on where the workdir stands; with its weights alone; refuse a used one
ON_NAN = ("stop", "skip")


class ConfigError(ValueError):
    """The user asked for something that does not exist or does not fit; one line that says what, and the cure."""


@dataclass(frozen=True)
class ModelSettings:
    """`config.model`: a name of `models.MODELS` and its size."""

    name: str = "resnet_cifar"
    depth: int = 20  # layers of a residual network, hidden layers of the mlp
    width: int = 16  # channels of the first group, of wrn in sixteens; units of a hidden layer
    stem: str = "cifar"  # of resnet: "cifar" or "imagenet"
    init: str = "he"  # "he" (normal), or "torch", PyTorch's default, which the code released with FDG used
    pool_window: int = 0  # of resnet_cifar: the mean over a corner of the last map, 6 in that code; 0 for all of it


@dataclass(frozen=True)
class DataSettings:
    """`config.data`: where images come from and what happens to them."""

    source: str = "digits"
    name: str = "cifar10"  # of tfds: any image classification set in its catalogue
    path: str = (
        ""  # of arrays: an .npz file; of folder: the folder; of tfds: its data_dir, by default ~/tensorflow_datasets
    )
    limit: int = 0  # training images to use, the same random ones always; 0 for all
    resize: int = 0  # of folder: pixels of the shorter side, then a crop in the middle; 0 to leave images as they are
    crop_padding: int = 4  # training images are shifted by up to so many pixels
    flip: bool = True  # and mirrored, one in two


@dataclass(frozen=True)
class MethodSettings:
    """`config.method`: a preset of `methods`, its arguments, and corrections of the delay.

    What the method does not take must be at its default. "auto" is the method's own policy, and is replaced by it.
    """

    name: str = "fdg"
    beta: float = 1.0
    policy: str = "auto"  # "stash", "current" or "recompute"; by default what the method's authors do
    order: str = "update_first"  # of fdg and adl; or "forward_first"
    micro_batches: int = 4  # of gpipe, one_f_one_b, pipedream_2bw: into which a batch is split
    steps: int = 4  # of adl: batches whose gradients an update applies
    average: bool = False  # of adl: their mean instead of their sum
    vertical_sync: bool = False  # of pipedream
    head: str = "mlp_sr"  # of dgl; or "linear"
    buffer: int = 0  # of dgl: messages that a stage keeps, to use again; 0 for stages in lock-step
    max_uses: int = 0  # of dgl with a buffer: of a message; 0 for as many as it takes
    slowdown: tuple[int, ...] = ()  # of dgl with a buffer: ticks from one turn to the next, of every stage, as (1,2)
    kind: str = "deep"  # of dni, the network that predicts; or "linear"
    context: bool = True  # of dni: it reads the labels too
    learning_rate: float = 1e-4  # of dni: of its own optimizer, Adam
    width: int = 128  # of dni: channels of its hidden layers
    corrections: str = ""  # as spike_compensation,weight_prediction(assume=held); see `corrections.CORRECTIONS`

    def __post_init__(self) -> None:
        if self.policy == "auto":
            object.__setattr__(self, "policy", by_name.own_default(self.name, "policy", "stash"))


@dataclass(frozen=True)
class OptimSettings:
    """`config.optim`."""

    name: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9  # b1 of the Adams; correction nesterov sets that of nadamw
    nesterov: bool = False
    weight_decay: float = 5e-4  # coupled in sgd, decoupled in adamw and nadamw, on all parameters
    schedule: str = "piecewise"
    milestones: tuple[int, ...] = (150, 225, 275)  # epochs at whose beginning a piecewise rate drops
    decay_factor: float = 0.1
    warmup_epochs: float = 0.0
    warmup_factor: float = 0.1  # of a piecewise schedule; a cosine one rises from 0


@dataclass(frozen=True)
class CheckpointSettings:
    """`config.checkpoint`: when the whole state is saved, what is kept, and how a run goes on."""

    every_steps: int = 0  # 0 for never; one of the last step, and of the moment a signal arrives, is always saved
    every_minutes: float = 10.0  # the same
    keep_last: int = 2
    keep_best: int = 1  # of those with the lowest test error; then every evaluation that is the best so far is saved
    required: bool = False  # the run fails where two in a row, or the last, cannot be written
    resume: str = "auto"  # one of RESUMES


@dataclass(frozen=True)
class TraceSettings:
    """`config.trace`: the window of a run of which a timeline is measured, see `tracing`."""

    first_step: int = 20  # so that programs are compiled and the pipeline is full
    num_steps: int = 0  # 0 for none; a picture shows 16 visits a device, the file all


@dataclass(frozen=True)
class Settings:
    """`config`, the whole of it."""

    seed: int = 0
    num_stages: int = 2
    cuts: str | tuple[int, ...] = "layers"  # the first layer of each stage but the first, or one of CUTS
    engine: str = "auto"  # "mpmd", "fused", or fused where there is one accelerator and mpmd elsewhere
    remat: str = "none"  # what memos keep: "none", "convs" or "full" (see Pipeline), or one a stage, as "full,none"
    epochs: int = 300
    batch_size: int = 128
    dtype: str = "float32"  # of the computation; parameters and updates are float32
    log_every_steps: int = 50
    probe_every_steps: int = 0  # what the delay does to one batch (see probe.py) is measured so often; 0 for never
    init_from: str = ""  # weights to begin with: of a run's workdir, of one of its checkpoints, or its params folder
    on_nan: str = "stop"  # at the next log; or "skip" the update of every stage for a batch whose loss is not finite
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    method: MethodSettings = field(default_factory=MethodSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    trace: TraceSettings = field(default_factory=TraceSettings)
    profile: bool = False  # that window by jax.profiler too, which slows it


def default_config() -> ConfigDict:
    """Every key with its default: the recipe of the FDG papers."""
    config = ConfigDict(dataclasses.asdict(Settings()))
    config.method.policy = "auto"  # for whatever method is chosen
    return config


def varied(config: ConfigDict, variants: str, **known: Callable[[ConfigDict], None]) -> ConfigDict:
    """The configuration after the variants that stand behind the file's name: --config experiments/x.py:cifar100,smoke.

    Args:
        config: of the experiment; changed in place, and returned.
        variants: names, separated by commas, in the order in which they act.
        known: what the experiment's own variants do. "smoke" is known to all.

    Raises:
        ConfigError: there is no such variant.
    """
    for name in filter(None, variants.split(",")):
        try:
            check_name("variant", name, {"smoke", *known})
        except ValueError as error:
            raise ConfigError(str(error)) from None
        known.get(name, smoke)(config)
    return config


def smoke(config: ConfigDict) -> None:
    """Makes of an experiment one that takes seconds: the same method on the digits, with the smallest such network."""
    smallest = {"resnet_cifar": (8, 4), "wrn": (10, 1), "resnet": (50 if config.model.depth >= 50 else 18, 4)}
    depth, width = smallest[config.model.name]
    config.update({"epochs": 1, "batch_size": 64, "log_every_steps": 2, "cuts": "layers", "num_stages": 2})
    config.model.update({"depth": depth, "width": width, "pool_window": min(config.model.pool_window, 1)})
    config.data.update({"source": "digits", "limit": 256, "crop_padding": 1})


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Its leaves by dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return leaves


CONFIG_KEYS = tuple(_flat(dataclasses.asdict(Settings())))  # dotted, as typed after --config.
COMPARISON_KEYS = ("methods", "seeds")  # which the config of a comparison has too


def resolve(config: Mapping[str, Any]) -> Settings:
    """Checks a configuration and freezes it.

    Raises:
        ConfigError: naming the key, its value and the cure.
    """
    plain = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    plain["cuts"] = _parse_cuts(plain.get("cuts", "layers"))
    settings = _freeze(Settings, plain, "")
    try:
        _check(settings)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return settings


def resolve_comparison(config: Mapping[str, Any]) -> dict[tuple[str, int], Settings]:
    """The runs of a comparison, by method as it is typed and seed: one method after the other, all with all seeds.

    Args:
        config: as for `resolve`, with two keys more: "methods" like "bp, fdg(beta=0.5)", arguments being those of
            config.method, and "seeds".

    Raises:
        ConfigError: as `resolve`; a method or a seed is named twice, or none is.
    """
    plain = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    methods, seeds = plain.pop("methods"), _typed("config.seeds", plain.pop("seeds"), ())
    try:
        calls = by_name.read_calls(_typed("config.methods", methods, ""))
    except ValueError as error:
        raise ConfigError(f"config.methods: {error}") from None
    for name, arguments in calls:
        if "name" in arguments:
            raise ConfigError(f"config.methods: a name stands before its arguments; got {name} with {arguments}")
    runs = {
        (by_name.show_call(name, arguments), seed): resolve(
            {**plain, "seed": seed, "method": {**plain["method"], **arguments, "name": name}}
        )
        for name, arguments in calls
        for seed in seeds
    }
    if not runs or len(runs) < len(calls) * len(seeds):
        raise ConfigError(f"config.methods and config.seeds must name some, each once; got {methods!r} and {seeds}")
    return runs


def _freeze(kind: type, given: Any, prefix: str) -> Any:
    """The dataclass `kind` from a mapping, each value of its field's type."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"config.{prefix.rstrip('.')} must hold keys; got {given!r}")
    known = {f.name: f for f in fields(kind)}
    values = {}
    for key, value in given.items():
        try:
            check_name("config key", f"{prefix}{key}", [prefix + name for name in known])
        except ValueError as error:
            raise ConfigError(str(error)) from None
        default = getattr(kind(), key)
        if dataclasses.is_dataclass(default):
            values[key] = _freeze(type(default), value, f"{prefix}{key}.")
        else:
            values[key] = _typed(f"config.{prefix}{key}", value, default)
    return kind(**values)


def _typed(name: str, value: Any, default: Any) -> Any:
    """The value, brought to the default's type where nothing is lost."""
    if isinstance(default, tuple):
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not all(type(v) is int for v in values):
            raise ConfigError(f"{name} must be whole numbers; got {value!r}")
        return values
    if type(default) is float and type(value) is int:
        return float(value)
    if type(value) is not type(default) and name != "config.cuts":
        raise ConfigError(f"{name} must be of type {type(default).__name__}; got {value!r}")
    return value


def differences(saved: Mapping[str, Any], settings: Settings) -> list[str]:
    """Where the settings of a saved run are others, of those that its trajectory depends on: "config.seed was 0, is 1".

    What may change: how often is logged and saved, what is traced, what happens at a NaN, where the data lie, and the
    number of epochs unless the learning rate follows it.
    """
    free = {"log_every_steps", "probe_every_steps", "on_nan", "init_from", "engine", "data.path"}
    free |= {"profile", "trace.first_step", "trace.num_steps"}
    if settings.optim.schedule != "cosine":
        free.add("epochs")
    default, asked = _flat(dataclasses.asdict(Settings())), _flat(dataclasses.asdict(settings))
    given = {**default, **_flat(saved)}  # a run of before a key existed did what is now its default
    return [
        f"config.{key} was {_shown(given[key])}, is {_shown(asked[key])}"
        for key in asked
        if key not in free and not key.startswith("checkpoint.") and _shown(given[key]) != _shown(asked[key])
    ]


def _shown(value: Any) -> str:
    """The same for a tuple and the list that JSON makes of it."""
    return (",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)) or "empty"


def _parse_cuts(cuts: Any) -> str | tuple[int, ...]:
    """Cuts as typed on a command line: a word, or numbers like 3,6 or (3, 6)."""
    if not isinstance(cuts, str):
        return _typed("config.cuts", cuts, ())
    if cuts in CUTS:
        return cuts
    try:
        return tuple(int(number) for number in cuts.strip("()[], ").split(","))
    except ValueError:
        words = " or ".join(CUTS)
        raise ConfigError(f"config.cuts must be layer numbers like 3,6, or {words}; got {cuts!r}") from None


def make_method(settings: MethodSettings) -> Method:
    """The method that the settings name, with its corrections.

    Raises:
        ValueError: they name what does not exist, or what the method does not take.
    """
    given = vars(settings).copy()
    name, corrections = given.pop("name"), given.pop("corrections")
    return by_name.make_method(name, given, vars(MethodSettings()), corrections)


def _check(settings: Settings) -> None:
    for kind, name, valid in (
        ("engine", settings.engine, {*ENGINES, "auto"}),
        ("dtype", settings.dtype, DTYPES),
        ("model", settings.model.name, MODELS),
        ("data source", settings.data.source, SOURCES),
        ("method", settings.method.name, METHODS),
        ("optimizer", settings.optim.name, OPTIMIZERS),
        ("learning rate schedule", settings.optim.schedule, RATE_SCHEDULES),
        ("resume", settings.checkpoint.resume, RESUMES),
        ("on_nan", settings.on_nan, ON_NAN),
    ):
        check_name(kind, name, valid)
    if not isinstance(settings.cuts, str) and len(settings.cuts) + 1 != settings.num_stages:
        stages = len(settings.cuts) + 1
        raise ConfigError(
            f"config.cuts {settings.cuts} make {stages} stages, config.num_stages is {settings.num_stages}; "
            f"add --config.num_stages={stages}"
        )
    resolve_remat(settings.remat, settings.num_stages, make_method(settings.method).policy)
    optim = settings.optim
    for name, value, low in (
        ("num_stages", settings.num_stages, 1),
        ("epochs", settings.epochs, 1),
        ("batch_size", settings.batch_size, 1),
        ("log_every_steps", settings.log_every_steps, 1),
        ("probe_every_steps", settings.probe_every_steps, 0),
        ("seed", settings.seed, 0),
        ("model.depth", settings.model.depth, 1),
        ("model.width", settings.model.width, 1),
        ("model.pool_window", settings.model.pool_window, 0),
        ("data.limit", settings.data.limit, 0),
        ("data.resize", settings.data.resize, 0),
        ("data.crop_padding", settings.data.crop_padding, 0),
        ("optim.learning_rate", optim.learning_rate, 0),
        ("optim.momentum", optim.momentum, 0),
        ("optim.weight_decay", optim.weight_decay, 0),
        ("optim.warmup_epochs", optim.warmup_epochs, 0),
        ("trace.first_step", settings.trace.first_step, 0),
        ("trace.num_steps", settings.trace.num_steps, 0),
        ("checkpoint.every_steps", settings.checkpoint.every_steps, 0),
        ("checkpoint.every_minutes", settings.checkpoint.every_minutes, 0),
        ("checkpoint.keep_last", settings.checkpoint.keep_last, 1),
        ("checkpoint.keep_best", settings.checkpoint.keep_best, 0),
    ):
        if not value >= low or not math.isfinite(value):
            raise ConfigError(f"config.{name} must be finite and at least {low}; got {value}")
    if settings.seed >= 2**32:
        raise ConfigError(f"config.seed must be below 2^32; got {settings.seed}")
    if optim.momentum >= 1:
        raise ConfigError(f"config.optim.momentum must be below 1; got {optim.momentum}")
    if list(optim.milestones) != sorted(set(optim.milestones)) or min(optim.milestones, default=1) < 1:
        raise ConfigError(f"config.optim.milestones must be epochs from 1 on and increase; got {optim.milestones}")
    if optim.name == "adam" and optim.weight_decay:
        raise ConfigError("adam takes no weight decay: use config.optim.name=adamw, or config.optim.weight_decay=0")
    if settings.probe_every_steps and settings.method.buffer:
        raise ConfigError("no probe can follow a batch through buffers: leave config.probe_every_steps at 0")
    if settings.profile and not settings.trace.num_steps:
        raise ConfigError("config.profile=true needs a window of steps; add --config.trace.num_steps=20")
    source, path = settings.data.source, settings.data.path
    if path and source == "digits":
        raise ConfigError(f"config.data.path is for sources on disk, digits come with the package; got {path!r}")
    if not path and source in ("arrays", "folder"):
        raise ConfigError(f"config.data.source={source} needs --config.data.path, the file or folder to read")
    if settings.cuts == "published":
        models.published_cuts(settings.model.name, settings.model.depth, settings.model.width, settings.num_stages)
    if settings.data.resize and source != "folder":
        raise ConfigError(f"config.data.resize is for config.data.source=folder; the source is {source}")
