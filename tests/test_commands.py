"""What all command lines share: one line about whatever is wrong, and the flag that was meant."""

import pytest

from fdg_jax.commands import Parser, complain


@pytest.fixture
def parser():
    parser = Parser(prog="x", allow_abbrev=False)
    parser.add_argument("table")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--rate", type=float)
    return parser


def test_what_is_right_is_read(parser):
    given = parser.parse_args(["t", "--rate", "-0.5", "--sweep"])
    assert (given.table, given.rate, given.sweep) == ("t", -0.5, True)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["t", "--sweeep"], "unknown flag 'sweeep'; did you mean 'sweep'"),
        (["t", "--sweep.x=1"], "unknown flag 'sweep.x'; did you mean 'sweep'"),
        (["t", "-swep=1"], "unknown flag 'swep'; did you mean 'sweep'"),
        (["t", "--xyz"], "unknown flag 'xyz'; it must be one of (help, rate, sweep)"),
        (["t", "u"], "unexpected argument 'u'; --help explains"),
        (["t", "--rate=a"], "argument --rate: invalid float value: 'a'; --help explains"),
        ([], "the following arguments are required: table; --help explains"),
    ],
)
def test_what_is_wrong_gets_one_line(parser, words, line, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(words)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert err.startswith(f"fdg_jax: {line}")
    assert (out, err.count("\n")) == ("", 1)


def test_flags_of_others_are_left_to_them(parser, capsys):
    given, rest = parser.parse_known_args(["t", "--config", "x.py", "--config.beta", "-0.5", "--sweep", "-1"])
    assert given.sweep
    parser.check_flags(rest, ["config"])
    with pytest.raises(SystemExit, match=r"^2$"):
        parser.check_flags(rest)
    with pytest.raises(SystemExit, match=r"^2$"):
        parser.check_flags(["--confg", "x.py"], ["config"])
    assert "unknown flag 'confg'; did you mean 'config'" in capsys.readouterr().err


def test_complaints_go_to_stderr_and_return_the_status(capsys):
    assert complain(ValueError("no"), 7) == 7
    assert capsys.readouterr() == ("", "fdg_jax: no\n")
