import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdg_jax.config import CONFIG_KEYS, ConfigError, Settings, default_config, resolve


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
