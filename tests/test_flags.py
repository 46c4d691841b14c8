"""The flags: what is refused, recipes, resuming; and that every flag is read by the program."""
import argparse
import copy

import pytest
from harness import program, without_pictures

import evaluate
import export
import flags
import predict
import train
from core.run import CheckpointError, RunError
from core.run.checkpoint import Checkpoint
from data.augment import Augment

SMALL = ["--data", "recordings", "--weights", "none"]


def check_refused(parse, command_line, name, capsys):
    """Check that parsing exits with code 2 and one line on stderr that holds `name`."""
    with pytest.raises(SystemExit) as stop:
        parse(command_line)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert name in error


# --- ranges and combinations ---

OUT_OF_RANGE = {
    "--epochs": ["0", "-1", "2.5", "100001", "many"],
    "--warmup-epochs": ["-1", "nan", "inf"],
    "--batch-size": ["0", "-4", "1.5", "all"],
    "--effective-batch": ["0", "x"],
    "--seed": ["-1", "1.5"],
    "--min-clips": ["0"],
    "--min-overlap": ["-1", "inf"],
    "--min-event-share": ["0", "1.1"],
    "--negative-share": ["-0.1", "1.1", "nan"],
    "--max-bad-share": ["-0.1", "1.1", "nan"],
    "--seconds": ["0", "-1", "inf", "3601"],
    "--fold": ["x", "40000"],
    "--folds": ["some", "1", "21"],
    "--lr-head": ["nan", "-1", "101"],
    "--lr-backbone": ["inf", "x"],
    "--min-lr-ratio": ["-0.1", "1.1"],
    "--weight-decay": ["-1"],
    "--clip-grad": ["-1", "nan"],
    "--patience": ["0"],
    "--freeze-epochs": ["-1"],
    "--layer-decay": ["1.5"],
    "--ema": ["-0.5", "2"],
    "--gamma": ["-1", "x"],
    "--alpha": ["some", "-1", "nan"],
    "--label-smoothing": ["1.5"],
    "--logit-adjust": ["-1"],
    "--freq-mask": ["-1", "1.5"],
    "--time-mask": ["-1"],
    "--specaug-p": ["2"],
    "--mixup-alpha": ["-1"],
    "--mixup-p": ["-1"],
    "--gain": ["-1", "201"],
    "--noise-p": ["1.5"],
    "--noise-snr": ["5", "a,b", "5,30,40"],
    "--filter-p": ["-0.5"],
    "--shift-p": ["2"],
    "--patchout": ["-0.5", "2"],
    "--dim": ["0", "15360"],
    "--depth": ["0", "1001"],
    "--heads": ["0"],
    "--drop-path": ["1"],
    "--fmin": ["-1"],
    "--fmax": ["nan"],
    "--save-every": ["5x", "-1", ""],
    "--max-skips": ["0"],
    "--eval-batch-size": ["0"],
    "--workers": ["-2", "x"],
}
CHOICES = [
    "--size", "--recipe", "--scan", "--short", "--crop", "--schedule", "--monitor", "--loss",
    "--sampler", "--frontend", "--on-divergence", "--amp", "--cache", "--compile", "--folds",
    "--truncated", "--annotated",
]


@pytest.mark.parametrize("flag", OUT_OF_RANGE)
def test_value_out_of_range_is_refused(flag, capsys):
    for value in OUT_OF_RANGE[flag]:
        check_refused(flags.parse, [*SMALL, f"{flag}={value}"], flag, capsys)


@pytest.mark.parametrize("flag", CHOICES)
def test_unknown_choice_is_refused(flag, capsys):
    check_refused(flags.parse, [*SMALL, flag, "no-such-choice"], flag, capsys)


def test_every_flag_with_a_range_or_choices_is_tested_here():
    parser, _ = flags.build_parser()
    limited = {action.option_strings[0] for action in parser._actions
               if action.choices or action.type not in (None, str)}
    assert limited == set(OUT_OF_RANGE) | set(CHOICES)


@pytest.mark.parametrize("command_line, name", [
    (["--no-such-flag"], "--no-such-flag"),
    (["no-such-word"], "no-such-word"),
    (["--epochs", "3", "--warmup-epochs", "4"], "--warmup-epochs"),
    (["--batch-size", "5", "--effective-batch", "32"], "--effective-batch"),
    (["--alpha", "balanced", "--loss", "bce"], "--alpha"),
    (["--alpha", "2", "--loss", "focal-bce"], "--alpha"),
    (["--alpha", "balanced", "--loss", "focal-bce"], "--alpha"),
    (["--label-smoothing", "0.1"], "--label-smoothing"),
    (["--logit-adjust", "1", "--loss", "bce"], "--logit-adjust"),
    (["--noise-dir", "x"], "--noise-dir"),
    (["--plain", "--compile", "default"], "--plain"),
    (["--plain", "--cache", "ram"], "--plain"),
    (["--folds", "all", "--fold", "1"], "--folds"),
    (["--folds", "all", "--smoke"], "--folds"),
    (["--fmax", "20000"], "fmax"),
    (["--fmin", "5000", "--fmax", "4000"], "fmin"),
    (["--heads", "5"], "heads"),
    (["--seconds", "0.2"], "--seconds"),
])
def test_flags_that_do_not_fit_together_are_refused(command_line, name, capsys):
    check_refused(flags.parse, [*SMALL, *command_line], name, capsys)


def test_folds_are_refused_in_several_processes(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_refused(flags.parse, [*SMALL, "--folds", "all"], "--folds", capsys)


@pytest.mark.parametrize("parse, command_line, name", [
    (evaluate.parse, [], "--ckpt"),
    (evaluate.parse, ["--ckpt", "x.pt", "--split", "all"], "--split"),
    (evaluate.parse, ["--ckpt", "x.pt", "--batch-size", "0"], "--batch-size"),
    (evaluate.parse, ["--ckpt", "x.pt", "--workers", "-1"], "--workers"),
    (evaluate.parse, ["--ckpt", "x.pt", "--amp", "x"], "--amp"),
    (predict.parse, ["--ckpt", "x.pt"], "FILES_OR_FOLDERS"),
    (predict.parse, ["a.wav"], "--ckpt"),
    (predict.parse, ["a.wav", "--ckpt", "x.pt", "--threshold", "1.5"], "--threshold"),
    (predict.parse, ["a.wav", "--ckpt", "x.pt", "--top-k", "0"], "--top-k"),
    (predict.parse, ["a.wav", "--ckpt", "x.pt", "--hop", "0"], "--hop"),
    (predict.parse, ["a.wav", "--ckpt", "x.pt", "--hop", "nan"], "--hop"),
    (predict.parse, ["a.wav", "--ckpt", "x.pt", "--format", "xml"], "--format"),
    (predict.parse, ["a.wav", "--ckpt", "x.pt", "--batch-size", "0"], "--batch-size"),
    (predict.parse, ["a.wav", "--ckpt", "x.pt", "--workers", "0"], "--workers"),
    (export.parse, ["--to", "hf"], "--ckpt"),
    (export.parse, ["--ckpt", "x.pt", "--to", "zip"], "--to"),
])
def test_other_scripts_refuse_invalid_flags(parse, command_line, name, capsys):
    check_refused(parse, command_line, name, capsys)


@pytest.mark.parametrize("parse, names", [
    (flags.parse, ["--data", "--weights", "--warmup-epochs", "--resume", "--plain"]),
    (evaluate.parse, ["--ckpt", "--split", "--data", "--out"]),
    (predict.parse, ["--ckpt", "--out", "--hop", "--embeddings"]),
    (export.parse, ["--ckpt", "--to"]),
])
def test_help_names_the_flags(parse, names, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in names)
    assert "%(" not in text


# --- values that depend on others ---

def test_effective_batch_is_the_next_multiple_of_the_batch_size():
    for size, expected in [("4", 32), ("5", 35), ("64", 64), ("auto", 32)]:
        assert flags.parse([*SMALL, "--batch-size", size])[0].effective_batch == expected
    args, _ = flags.parse([*SMALL, "--batch-size", "5", "--effective-batch", "10"])
    assert args.effective_batch == 10


def test_plain_turns_the_cache_off():
    assert flags.parse([*SMALL, "--plain"])[0].cache == "off"


# --- recipes ---

def test_recipes_set_only_flags_that_exist_to_values_in_their_range():
    _, defaults = flags.build_parser()
    for recipe in flags.RECIPES.values():
        assert recipe.keys() <= defaults.keys()
        given = flags.parse([*SMALL, *flags.as_command_line(recipe)])[1]
        assert recipe.items() <= given.items()


@pytest.mark.parametrize("recipe", flags.RECIPES)
def test_recipe_gives_its_values_and_a_given_flag_wins(recipe):
    args, _ = flags.parse([*SMALL, "--recipe", recipe])
    values = {**flags.RECIPES[recipe], "weights": "none"}
    assert values.items() <= vars(args).items()
    args, _ = flags.parse([*SMALL, "--recipe", recipe, "--mixup-alpha", "0.9", "--shift-p", "0.1"])
    assert (args.mixup_alpha, args.shift_p) == (0.9, 0.1)


def test_given_flag_wins_also_if_its_value_is_the_default():
    args, _ = flags.parse([*SMALL, "--recipe", "augmented", "--mixup-alpha", "0"])
    assert args.mixup_alpha == 0


def test_default_recipe_is_demo_for_the_demo_and_baseline_for_other_data():
    assert flags.parse([])[0].recipe == "demo"
    assert flags.parse([])[0].dim == flags.RECIPES["demo"]["dim"]
    assert flags.parse(["--data", "recordings"])[0].recipe == "baseline"
    assert flags.parse(["--recipe", "baseline"])[0].dim is None


# --- command lines and resuming ---

@pytest.mark.parametrize("command_line", [
    [],
    [*SMALL, "--plain", "--smoke", "--resume", "--fold", "-1", "--audio-dir=-x", "--alpha", "0.25"],
    [*SMALL, "--batch-size", "auto", "--alpha", "balanced", "--lr-head", "0.1", "--resume", "a.pt"],
])
def test_command_line_of_flag_values_gives_the_same_flags(command_line):
    args, _ = flags.parse(command_line)
    again, _ = flags.parse(flags.as_command_line(vars(args)))
    assert again == args


def checkpoint_of(command_line):
    """A checkpoint of a run that was started with a command line."""
    return Checkpoint("x.pt", {"flags": vars(flags.parse(command_line)[0])})


def another_value(flag, started):
    """The words of a command line with a valid value that differs from that of `started`."""
    [action] = [action for action in flags.build_parser()[0]._actions
                if flag in action.option_strings]
    if action.nargs == 0:
        return [flag]
    for value in [*(action.choices or []), "5,20", "0.5", "0.25", "9", "elsewhere"]:
        try:
            parsed = action.type(value) if action.type else value
        except (argparse.ArgumentTypeError, ValueError):
            continue
        if parsed not in (getattr(started, action.dest), "auto"):
            return [f"{flag}={value}"]
    raise AssertionError(f"no other value for {flag}")


ALL_FLAGS = sorted(flags.build_parser()[1])


@pytest.mark.parametrize("name", ALL_FLAGS)
def test_resuming_refuses_a_changed_flag_unless_it_is_free(name):
    flag, (started, _) = "--" + name.replace("_", "-"), flags.parse(SMALL)
    parser, defaults = flags.build_parser()
    given = vars(parser.parse_args(another_value(flag, started)))
    args = argparse.Namespace(**{**defaults, **given})
    assert given[name] != getattr(started, name)
    if name in flags.FREE_ON_RESUME:
        assert getattr(flags.resumed(args, given, checkpoint_of(SMALL)), name) == given[name]
    else:
        with pytest.raises(RunError, match=f"^{flag} "):
            flags.resumed(args, given, checkpoint_of(SMALL))


def test_free_flags_exist():
    assert set(ALL_FLAGS) >= flags.FREE_ON_RESUME


def test_resuming_keeps_the_flags_that_are_not_given():
    started = [*SMALL, "--recipe", "augmented", "--epochs", "9", "--lr-head", "0.01"]
    args, given = flags.parse(["--resume", "--workers", "2"])  # without --data
    resumed = flags.resumed(args, given, checkpoint_of(started))
    expected = {**vars(flags.parse(started)[0]), "resume": "newest", "workers": 2}
    assert vars(resumed) == expected


def test_resuming_accepts_the_flags_of_the_run_again_and_auto():
    started = [*SMALL, "--epochs", "9", "--amp", "bf16"]
    for more in ([], ["--amp", "auto"]):
        args, given = flags.parse([*SMALL, "--epochs", "9", "--resume", *more])
        assert flags.resumed(args, given, checkpoint_of(started)).amp == "bf16"


def test_resuming_refuses_a_checkpoint_with_unknown_flags():
    checkpoint = checkpoint_of(SMALL)
    checkpoint["flags"]["colour"] = 1
    with pytest.raises(CheckpointError, match=r"x\.pt.*colour"):
        flags.resumed(*flags.parse(["--resume"]), checkpoint)


def test_resuming_refuses_a_checkpoint_with_invalid_flags(capsys):
    checkpoint = checkpoint_of(SMALL)
    checkpoint["flags"]["epochs"] = 0
    args, given = flags.parse(["--resume"])
    check_refused(lambda _: flags.resumed(args, given, checkpoint), None, "x.pt", capsys)


# --- every flag is read ---

class RecordedFlags(argparse.Namespace):
    """Flags that note which of them are read, in the set `recorded`."""

    def __init__(self, args, recorded):
        super().__init__(**vars(args))
        object.__setattr__(self, "_recorded", recorded)

    def __getattribute__(self, name):
        if name == "__dict__":
            return {key: value for key, value in super().__getattribute__(name).items()
                    if key != "_recorded"}
        if not name.startswith("_"):
            self._recorded.add(name)
        return super().__getattribute__(name)


def record_train(recorded, more=None):
    """-> prepare: note the flags of train.py that are read after parsing, also from the Augment.

    more: flag values that nothing reads, for the control.
    """
    def prepare(patch):
        real_parse = flags.parse

        def parse(*args):
            values, given = real_parse(*args)
            vars(values).update(more or {})
            return RecordedFlags(values, recorded), given

        def get_attribute(augment, name):
            recorded.add(name)
            return object.__getattribute__(augment, name)
        patch.setattr(flags, "parse", parse)
        patch.setattr(Augment, "__getattribute__", get_attribute)
        patch.setattr(train, "find_divergence", lambda *_: "made for the test")
    return prepare


def test_train_reads_every_flag(tones, tmp_path, monkeypatch):
    """Only the recipe is used in parsing and then no more."""
    recorded = set()
    code = program(monkeypatch, tmp_path, "--on-divergence", "warn", "--batch-size", "auto",
                   data=tones, prepare=record_train(recorded))
    assert code == 0
    assert set(ALL_FLAGS) - recorded == {"recipe"}


def test_control_flag_that_train_does_not_read_is_detected(tones, tmp_path, monkeypatch):
    recorded = set()
    code = program(monkeypatch, tmp_path, "--smoke", data=tones,
                   prepare=record_train(recorded, {"no_such_flag": 1}))
    assert code == 0
    assert "epochs" in recorded
    assert "no_such_flag" not in recorded
    assert "patience" not in recorded  # a dry run has no epochs to wait for


@pytest.mark.parametrize("script, command_line", [
    (evaluate, ["--device", "cpu", "--amp", "off", "--out", "results"]),
    (predict, ["--device", "cpu", "--amp", "off", "--embeddings", "RECORDINGS"]),
    (export, ["--to", "torch", "program.pt2"]),
])
def test_other_scripts_read_every_flag(script, command_line, finished_run, tones, tmp_path,
                                       monkeypatch, restored_signals):
    monkeypatch.chdir(tmp_path)
    recorded, every_flag, real_parse = set(), set(), script.parse

    def parse(argv):
        args = real_parse(argv)
        every_flag.update(vars(args))
        return RecordedFlags(args, recorded)
    words = [str(tones) if word == "RECORDINGS" else word for word in command_line]
    with without_pictures(monkeypatch) as patch:
        patch.setattr(evaluate, "write_report", lambda *_: "")
        patch.setattr(script, "parse", parse)
        assert not script.main(["--ckpt", str(finished_run / "best.pt"), *words])
    assert every_flag
    assert recorded == every_flag


def test_control_recorded_flags_are_copied_without_being_read():
    recorded = set()
    args = RecordedFlags(argparse.Namespace(epochs=3, plain=True), recorded)
    assert copy.copy(vars(args)) == {"epochs": 3, "plain": True}
    assert recorded == set()
    assert args.plain
    assert recorded == {"plain"}
