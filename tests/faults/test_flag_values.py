"""Every flag with odd values: refused in one line, or the run goes on (fault 18)."""
import argparse
import random
import sys

import pytest
from harness import TINY, exit_code, without_pictures

import evaluate
import export
import flags
import predict
import train

NUMBERS = ["0", "-1", "1", "2", "0.5", "1e-300", "1e20", "1e400", "inf", "-inf", "nan", "NaN",
           str(2**31), str(2**63), str(10**30), "1_000", "0x10", "\u0661", " 3 ", "", "1,5",
           "5e-324"]
TEXTS = ["", " ", "x" * 300, "a\nb", "../..", "/dev/null", "/proc/self/mem", "/dev/zero",
         "caf\udce9", "=1+1", "--", "~", "none", "auto", "%s", "{}", "\U0001f426"]
SAMPLE = 40  # pairs of flag and value that are also run in the short suite
# Only parsed: a run with some of their values takes minutes.
SLOW = {"--epochs", "--patience", "--smoke", "--compile", "--workers", "--device", "--seconds"}


def value_flags():
    """The flags of train.py that take a value."""
    parser, _ = flags.build_parser()
    return [action.option_strings[0] for action in parser._actions
            if action.nargs != 0 and action.option_strings]


PAIRS = [(flag, value) for flag in value_flags() for value in NUMBERS + TEXTS]


def check_one_line(error):
    assert error.startswith("error: "), error
    assert error.count("\n") == 1, error


@pytest.mark.parametrize("flag", value_flags())
def test_value_is_accepted_or_refused_in_one_line(flag, capsys):
    for value in NUMBERS + TEXTS:
        try:
            flags.parse(["--data", "somewhere", f"{flag}={value}"])
        except SystemExit as stop:
            assert stop.code == 2, (flag, value)
            check_one_line(capsys.readouterr().err)


@pytest.mark.parametrize("script", [evaluate, predict, export])
def test_other_scripts_refuse_values_in_one_line(script, monkeypatch, capsys):
    parsers = []
    real_parse = argparse.ArgumentParser.parse_args

    def record(parser, argv=None):
        parsers.append(parser)
        return real_parse(parser, argv)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", record)
    required = ["--ckpt", "x.pt"]
    required += {evaluate: [], predict: ["a.wav"], export: ["--to", "hf"]}[script]
    script.parse(required)
    names = [action.option_strings[0] for action in parsers[0]._actions
             if action.nargs != 0 and action.option_strings]
    for name in names:
        for value in NUMBERS + TEXTS:
            try:
                script.parse([*required, f"{name}={value}"])
            except SystemExit as stop:
                assert stop.code == 2, (name, value)
                check_one_line(capsys.readouterr().err)


def run_pairs(pairs, tones, tmp_path, monkeypatch, capsys):
    """Run a tiny training with each value that parsing accepts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    sys.stdout.reconfigure(errors="backslashreplace")  # as core.exits does for the scripts
    with without_pictures(monkeypatch):
        for i, (flag, value) in enumerate(pairs):
            argv = ["--data", tones, *TINY, "--epochs", "1", "--cache", "off"]
            if flag != "--run-dir":
                argv += ["--run-dir", tmp_path / f"run{i}"]
            code = exit_code(train.main, *argv, f"{flag}={value}")
            error = capsys.readouterr().err
            assert code in (0, 2, 3), (flag, value, error)
            if code:
                check_one_line(error)


def test_sampled_values_never_end_in_a_traceback(tones, tmp_path, monkeypatch, capsys):
    pairs = [pair for pair in PAIRS if pair[0] not in SLOW]
    run_pairs(random.Random(0).sample(pairs, SAMPLE), tones, tmp_path, monkeypatch, capsys)


@pytest.mark.long
def test_all_values_never_end_in_a_traceback(tones, tmp_path, monkeypatch, capsys):
    pairs = [pair for pair in PAIRS if pair[0] not in SLOW]
    run_pairs(pairs, tones, tmp_path, monkeypatch, capsys)


def test_control_a_value_that_breaks_the_run_is_detected(tones, tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise ZeroDivisionError
    monkeypatch.setattr(train, "RelativeSchedule", broken)
    with pytest.raises(ZeroDivisionError):
        run_pairs([("--gamma", "1")], tones, tmp_path, monkeypatch, capsys)
