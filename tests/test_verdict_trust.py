"""What the report says about confidence, silence and front ends that it does not know."""
from dataclasses import fields, replace

import pytest

import flags
from data.augment import Augment
from metrics import reliability
from model.frontend import FrontendConfig
from report import verdict
from report.card import usage_code
from report.run_files import read_run
from tests.made_run import MadeRun


def sentences(made, **changes):
    """(what is found, what is absent) with some metrics changed."""
    run = read_run(made.folder, made.folder / "test")
    run = replace(run, metrics={**run.metrics, **changes})
    findings = verdict.findings(run)
    return [finding.text for finding in findings.found], findings.absent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return MadeRun(tmp_path_factory.mktemp("made") / "run", ["owl", "wren", "jay"], per_class=40)


def test_confidence_is_absent_from_the_findings_only_if_the_error_may_be_chance(made):
    words = "onfidence that does not match accuracy", "Confidence does not match accuracy"
    found, absent = sentences(made, ece_calibrated=0.146, ece_by_chance=0.1)
    assert any(words[1] in text for text in found)
    assert not any(words[0] in text for text in absent)
    found, absent = sentences(made, ece_calibrated=0.146, ece_by_chance=0.2)  # control
    assert not any(words[1] in text for text in found)
    assert any(words[0] in text for text in absent)


def test_results_of_older_versions_get_the_limit_from_their_scores(made):
    run = read_run(made.folder, made.folder / "test")
    assert reliability(run.scores, run.labels)[1] > 0
    old = {name: value for name, value in run.metrics.items() if name != "ece_by_chance"}
    expected = verdict.findings(run)
    assert verdict.findings(replace(run, metrics=old)) == expected


def test_silent_clips_are_a_finding(made):
    assert any("2 clips of this split without any signal" in text
               for text in sentences(made, silent=2)[0])
    assert not any("signal" in text for text in sentences(made)[0])


def test_headline_names_what_the_interval_is_over(made):
    run = read_run(made.folder, made.folder / "test")
    assert "over the clips" in verdict.headline(run)[1]
    metrics = {**run.metrics, "interval_over": "groups", "groups": 7}
    assert "over the 7 groups of clips" in verdict.headline(replace(run, metrics=metrics))[1]


INFO = {"samples": 22050, "sample_rate": 22050, "short": "repeat", "multi_label": False,
        "temperature": 1.0}


def test_usage_code_refuses_a_front_end_that_it_does_not_know():
    config = replace(FrontendConfig(), kind="pcen")
    code = usage_code(INFO, config, 44, False, (0.0, 1.0))
    compile(code, "usage", "exec")
    assert "NotImplementedError" in code and "pcen" in code
    assert "melspectrogram" not in code and "fbank(" not in code


@pytest.mark.parametrize("kind, word", [("logmel", "melspectrogram"), ("fbank", "kaldi.fbank")])
def test_control_known_front_ends_are_described(kind, word):
    code = usage_code(INFO, FrontendConfig.of(kind), 44, False, (0.0, 1.0))
    compile(code, "usage", "exec")
    assert word in code and "NotImplementedError" not in code


def training_words(made, **changes):
    run = read_run(made.folder, made.folder / "test")
    return " ".join(verdict.training(replace(run, run={**run.run, **changes})))


STRENGTHS = [field.name for field in fields(Augment)
             if field.default == 0 and field.name != "seed"]


@pytest.mark.parametrize("name", [*STRENGTHS, "noise_p", "patchout", "new_one"])
def test_every_augmentation_is_named(made, name, monkeypatch):
    known = flags._add_augmentation_flags

    def with_a_new_one(add):
        known(add)
        add("--new-one", 0.0, float, "an augmentation that the report has never heard of")

    monkeypatch.setattr(flags, "_add_augmentation_flags", with_a_new_one)
    values = {**flags.build_parser()[1], name: 1}
    active = flags.active_augmentations(values)
    assert active == [name]
    assert f"(--{name.replace('_', '-')})" in training_words(made, augmentations=active)


def test_control_no_augmentation_is_named_without_one(made):
    defaults = flags.build_parser()[1]
    assert flags.active_augmentations(defaults) == []
    assert "augmented" not in training_words(made, augmentations=[])
    assert "may be augmented" in training_words(made)  # a run of an older version
