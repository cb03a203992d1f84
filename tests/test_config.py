import dataclasses
import inspect
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdg_jax import corrections, methods
from fdg_jax.build import make_optimizer
from fdg_jax.config import (
    CONFIG_KEYS,
    ConfigError,
    MethodSettings,
    Settings,
    default_config,
    differences,
    make_method,
    resolve,
    resolve_comparison,
)
from fdg_jax.names import check_name


def changed(**overrides):
    """The default configuration with dotted keys (as `model__depth`) set to other values."""
    config = default_config().to_dict()
    for key, value in overrides.items():
        *groups, last = key.split("__")
        target = config
        for group in groups:
            target = target[group]
        target[last] = value
    return config


def test_the_defaults_are_the_settings():
    assert resolve(default_config()) == Settings()
    assert dataclasses.asdict(resolve(default_config())) == dataclasses.asdict(Settings())


def test_the_keys_that_users_type():
    promised = (
        "seed num_stages cuts engine epochs batch_size dtype log_every_steps model.name data.source data.path "
        "method.name method.beta method.policy method.order optim.learning_rate"
    )
    assert set(promised.split()) <= set(CONFIG_KEYS)


@pytest.mark.parametrize(
    ("given_cuts", "stages", "cuts"),
    [
        ("layers", 2, "layers"),
        ("parameters", 4, "parameters"),
        ("3", 2, (3,)),
        (3, 2, (3,)),
        ("3,6", 3, (3, 6)),
        ("(3, 6)", 3, (3, 6)),
        ("[3,6]", 3, (3, 6)),
        ((3, 6), 3, (3, 6)),
        ([3, 6], 3, (3, 6)),
    ],
)
def test_cuts_as_they_are_typed(given_cuts, stages, cuts):
    assert resolve(changed(cuts=given_cuts, num_stages=stages)).cuts == cuts


def test_a_whole_number_is_a_float_too():
    assert resolve(changed(optim__learning_rate=1)).optim.learning_rate == 1.0
    assert resolve(changed(optim__milestones=[1, 2])).optim.milestones == (1, 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"enigne": "mpmd"}, "unknown config key 'enigne'; did you mean 'engine'"),
        ({"method__bta": 0.5}, "unknown config key 'method.bta'; did you mean 'method.beta'"),
        ({"engine": "mpdm"}, "unknown engine 'mpdm'; did you mean 'mpmd'"),
        ({"dtype": "float16"}, r"unknown dtype 'float16'; did you mean 'bfloat16' or 'float32'\?"),
        ({"model__name": "resnett"}, "unknown model 'resnett'; did you mean 'resnet'"),
        ({"data__source": "digit"}, "unknown data source 'digit'; did you mean 'digits'"),
        ({"method__name": "fgd"}, "unknown method 'fgd'; did you mean 'fdg'"),
        ({"method__policy": "stahs"}, "unknown policy 'stahs'; did you mean 'stash'"),
        ({"method__order": "update"}, "unknown order 'update'; did you mean 'update_first'"),
        ({"method__name": "dgl", "method__head": "mlp"}, "unknown head 'mlp'; did you mean 'mlp_sr'"),
        (
            {"method__name": "bp", "method__beta": 0.5},
            "bp has no beta, it takes nothing of the kind: leave beta at 1.0; got 0.5",
        ),
        (
            {"method__name": "pipedream", "method__order": "forward_first"},
            "pipedream has no order, it takes policy, vertical_sync: leave order at 'update_first'; got",
        ),
        ({"method__name": "gpipe", "method__policy": "current"}, "gpipe has no policy, it takes micro_batches"),
        ({"method__steps": 2}, "fdg has no steps, it takes beta, policy, order: leave steps at 4; got 2"),
        ({"method__name": "adl", "method__steps": 0}, "steps must be a whole number, at least 1; got 0"),
        ({"method__name": "gpipe", "method__micro_batches": -1}, "micro_batches must be a whole number, at least 1"),
        ({"method__corrections": "spike"}, "unknown correction 'spike'; did you mean 'shrink'|spike_compensation"),
        ({"method__corrections": "nesterov(momentun=0.9)"}, "unknown argument of nesterov 'momentun'; .* 'momentum'"),
        ({"method__corrections": "nesterov(build=open)"}, r"build of Nesterov \(nesterov .* cannot be 'open'"),
        ({"method__corrections": "nesterov(momentum=True)"}, "momentum of Nesterov .* cannot be True"),
        ({"method__corrections": "shrink"}, "shrink needs factors, as in shrink"),
        ({"method__corrections": "shrink(factors=half)"}, "factors of Shrink .* cannot be 'half'"),
        ({"method__corrections": "shrink(0.5)"}, r"'shrink\(0.5\)' must be names with arguments between commas"),
        ({"method__corrections": "shrink(fade=1, fade=2)"}, "arguments between commas, each once, like"),
        ({"method__corrections": "a b"}, "'a b' must be names with arguments between commas"),
        ({"optim__name": "sdg"}, "unknown optimizer 'sdg'; did you mean 'sgd'"),
        ({"optim__schedule": "cos"}, "unknown learning rate schedule 'cos'; did you mean 'cosine'"),
        (
            {"cuts": "layer"},
            "config.cuts must be layer numbers like 3,6, or layers or parameters or published or balanced; got 'layer'",
        ),
        (
            {"cuts": "3,x"},
            "config.cuts must be layer numbers like 3,6, or layers or parameters or published or balanced; got '3,x'",
        ),
        ({"cuts": (3, 6)}, r"config.cuts \(3, 6\) make 3 stages, config.num_stages is 2; add --config.num_stages=3"),
        ({"num_stages": 0}, "config.num_stages must be finite and at least 1; got 0"),
        ({"epochs": -1}, "config.epochs must be finite and at least 1; got -1"),
        ({"batch_size": 2.5}, "config.batch_size must be of type int; got 2.5"),
        ({"seed": -1}, "config.seed must be finite and at least 0; got -1"),
        ({"log_every_steps": True}, "config.log_every_steps must be of type int; got True"),
        ({"method__beta": 1.5}, r"beta must lie in \(0, 1\], or be 0 .* got 1.5"),
        ({"method__beta": float("nan")}, r"beta must lie in \(0, 1\]"),
        ({"optim__learning_rate": float("inf")}, "config.optim.learning_rate must be finite and at least 0; got inf"),
        ({"optim__momentum": 1.0}, "config.optim.momentum must be below 1; got 1.0"),
        ({"optim__milestones": (20, 10)}, r"config.optim.milestones must be epochs .* increase; got \(20, 10\)"),
        ({"optim__milestones": (0, 10)}, r"config.optim.milestones must be epochs from 1 on"),
        ({"seed": 2**32}, r"config.seed must be below 2\^32; got 4294967296"),
        ({"cuts": "published", "model__depth": 32}, "no cuts are published for .*; published are "),
        ({"data__source": "folder"}, "config.data.source=folder needs --config.data.path"),
        ({"data__resize": 32}, "config.data.resize is for config.data.source=folder; the source is digits"),
        ({"optim__milestones": (1.5,)}, "config.optim.milestones must be whole numbers"),
        ({"optim__name": "adam"}, "adam takes no weight decay: use config.optim.name=adamw"),
        ({"data__path": "/somewhere"}, "config.data.path is for sources on disk, digits come with the package"),
        ({"method": "fdg"}, "config.method must hold keys; got 'fdg'"),
        ({"remat": "cnovs"}, "unknown remat 'cnovs'; did you mean 'convs'"),
        ({"remat": "full,none,none"}, "remat must be one word, or one for each of 2 stages; got full,none,none"),
        ({"remat": "full", "method__policy": "current"}, "remat=full does not go with policy 'current'"),
    ],
)
def test_wrong_values_are_refused_in_one_line(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(changed(**overrides))
    assert "\n" not in str(caught.value)


scalars = st.one_of(st.integers(-3, 300), st.floats(), st.booleans(), st.text(max_size=8), st.none())


@given(
    st.sampled_from(CONFIG_KEYS), st.one_of(scalars, st.lists(scalars, max_size=3), st.dictionaries(st.text(), scalars))
)
def test_whatever_is_typed_there_is_settings_or_one_line(key, value):
    complaint = ""
    try:
        resolve(changed(**{key.replace(".", "__"): value}))
    except ConfigError as error:
        complaint = str(error)
    assert "\n" not in complaint


@pytest.mark.parametrize("name", methods.PRESETS)
def test_every_method_is_built_by_name_with_its_own_defaults(name):
    settings = resolve(changed(method__name=name))
    assert str(make_method(settings.method)) == str(methods.PRESETS[name]())
    assert make_method(settings.method).schedule(3) == methods.PRESETS[name]().schedule(3)
    assert make_method(MethodSettings(name)).policy == methods.PRESETS[name]().policy


def test_every_argument_of_every_method_has_a_key():
    """But for corrections, which all take."""
    keys = {field.name for field in dataclasses.fields(MethodSettings)}
    for preset in methods.PRESETS.values():
        assert set(inspect.signature(preset).parameters) <= keys


def test_what_is_set_reaches_the_method():
    def made(**keys):
        return make_method(resolve(changed(**{f"method__{key}": value for key, value in keys.items()})).method)

    adl = made(name="adl", steps=2, average=True, order="forward_first", beta=0.25, policy="current")
    assert (adl.average, adl.beta, adl.policy) == (True, 0.25, "current")
    assert adl.schedule(3) == methods.adl(2, order="forward_first").schedule(3)
    assert made(name="gpipe", micro_batches=2).micro_batches == 2
    assert made(name="pipedream", vertical_sync=True, policy="recompute") == methods.pipedream("recompute", True)
    assert made(name="dgl", head="linear") == methods.dgl("linear")
    assert made(name="pipelined_bp").policy == "current"
    assert made(name="pipelined_bp", policy="stash").policy == "stash"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("spike_compensation", (corrections.SpikeCompensation(),)),
        (
            "spike_compensation,linear_prediction(form=weights, horizon=2),",
            (corrections.SpikeCompensation(), corrections.LinearPrediction("weights", 2)),
        ),
        (" weight_prediction( assume = held )", (corrections.WeightPrediction("held"),)),
        ("shrink(factors=0.5)", (corrections.Shrink(0.5),)),
        ("shrink(factors=(0.25, 1), fade=100)", (corrections.Shrink((0.25, 1), 100),)),
        ("learning_rate_damping(power=0.5, fade=None)", (corrections.LearningRateDamping(0.5),)),
        ("learning_rate_damping(fade=100)", (corrections.LearningRateDamping(1.0, 100),)),
        ("nesterov(low=0.9)", (corrections.Nesterov(low=0.9),)),
        ("switch_to_synchronous(after=5)", (corrections.SwitchToSynchronous(5),)),
    ],
)
def test_corrections_as_they_are_typed(text, expected):
    assert make_method(resolve(changed(method__corrections=text)).method).corrections == expected


def test_the_optimizer_whose_momentum_nesterov_sets_can_be_typed():
    """Or one without momentum; the line that refuses others names both."""
    kept = {"method__corrections": "nesterov(momentum=0.95)"}
    for optim in ({"name": "nadamw"}, {"name": "adamw", "momentum": 0.0}, {"momentum": 0.0}):
        settings = resolve(changed(**kept, **{f"optim__{key}": value for key, value in optim.items()}))
        optimizer = make_optimizer(settings.optim, 1, 1)
        corrections.check(make_method(settings.method).corrections, optimizer, "stash", 2)
    with pytest.raises(ValueError, match=r"config.optim.momentum=0\), or optim.nadamw \(config.optim.name=nadamw\)"):
        corrections.check([corrections.Nesterov()], make_optimizer(resolve(changed()).optim, 1, 1), "stash", 2)


def test_a_comparison_has_a_method_s_name_in_one_place():
    with pytest.raises(ConfigError, match=r"a name stands before its arguments; got fdg with {'name': 'bp'}"):
        resolve_comparison({**changed(), "methods": "fdg(name=bp)", "seeds": (0,)})


def test_an_unknown_method_is_told_all_there_are():
    with pytest.raises(ConfigError) as caught:
        resolve(changed(method__name="fgd"))
    assert ", ".join(sorted(methods.PRESETS)) in str(caught.value)
    with pytest.raises(ValueError, match=r"\(m0, m1, .*, m9\)"):
        check_name("method", "m", {f"m{i}" for i in range(14)})


def test_the_policy_that_is_kept_is_the_one_that_acts():
    assert default_config().method.policy == "auto"
    assert resolve(default_config()).method.policy == "stash"
    assert resolve(changed(method__name="pipelined_bp")).method.policy == "current"


@pytest.mark.parametrize(
    ("key", "name", "value", "words"),
    [
        ("steps", "adl", 2, "config.method.steps was 4, is 2"),
        ("corrections", "fdg", "spike_compensation", "config.method.corrections was empty, is spike_compensation"),
        ("head", "dgl", "linear", "config.method.head was mlp_sr, is linear"),
    ],
)
def test_a_run_goes_on_with_the_same_method_only(key, name, value, words):
    saved = json.loads(json.dumps(dataclasses.asdict(resolve(changed(method__name=name)))))
    asked = resolve(changed(**{"method__name": name, f"method__{key}": value}))
    assert differences(saved, asked) == [words]
    before = {**saved, "method": {k: saved["method"][k] for k in ("name", "beta", "policy", "order")}}
    assert differences(before, resolve(changed(method__name=name))) == []  # of before there were such keys
    assert differences(before, asked) == [words]
