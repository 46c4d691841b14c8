"""The layers of the program: who may import whom, and what each may do."""
import ast
import sys
from typing import ClassVar

import pytest
from conftest import ROOT
from harness import both, program, stop_at

import train

# From the top down. A file may import from the layers below its own and from its own package. In
# the same layer only build may import flags.
LAYERS = [
    ["train", "evaluate", "predict", "export"],
    ["flags", "flag_checks", "build"],
    ["core"],
    ["report"],
    ["model", "data", "losses", "sched", "metrics"],
    ["util"],
]
ALSO_ALLOWED = {("build", "flags"), ("build", "flag_checks"), ("flags", "flag_checks")}
# report reads tables and arrays that others computed: of the leaves it may use only metrics.
NOT_ALLOWED = {("report", name) for name in ("model", "data", "losses", "sched")}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
PACKAGES = [name for name in LEVEL if (ROOT / name).is_dir()]
# Decoding, splits and tables run in worker processes and in tools that need no torch.
WITHOUT_TORCH = ["report", "util.py", *(f"data/{name}.py" for name in (
    "audio", "clip_rng", "manifest", "named", "sampling", "scan", "splits", "stream", "tables",
    "xenocanto"))]
WITHOUT_FILES = ["losses", "sched", "metrics",
                 *(f"model/{name}.py" for name in ("ast", "frontend", "groups", "relevance"))]


def files_of(name):
    """The Python files of a package or of one module."""
    path = ROOT / name
    if path.is_dir():
        return sorted(path.glob("**/*.py"))
    return [path if path.suffix else path.with_suffix(".py")]


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_modules(tree, package):
    """Full names of the modules that a file imports, also within functions.

    package: dotted name of the package that the file is in, "" for a script.
    """
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            parents = parents[:len(parents) - node.level + 1]
            if not parents:
                modules.add("." * node.level)  # above the package
            else:
                modules.add(".".join([*parents, *filter(None, [node.module])]))
    return modules


def forbidden_imports(tree, package, layer):
    """The modules that a file of `layer`, a package or module in LEVEL, must not import."""
    forbidden = []
    for module in sorted(imported_modules(tree, package)):
        name = module.split(".")[0]
        if name == layer or (layer, name) in ALSO_ALLOWED:
            continue
        is_below = name in LEVEL and LEVEL[name] > LEVEL[layer]
        is_external = name not in LEVEL and not module.startswith(".")
        if (layer, name) in NOT_ALLOWED or not (is_below or is_external):
            forbidden.append(module)
    return forbidden


def package_of(path):
    """Dotted name of the package that a file is in, "" for a script."""
    return ".".join(path.relative_to(ROOT).parent.parts)


@pytest.mark.parametrize("layer", LEVEL)
def test_imports_point_down(layer):
    for path in files_of(layer):
        assert forbidden_imports(parse(path), package_of(path), layer) == [], path


@pytest.mark.parametrize("source, package, layer, forbidden", [
    ("import numpy, model.ast\nfrom .audio import read", "data", "data", ["model.ast"]),
    ("def f():\n    from sched import lr_factor", "losses", "losses", ["sched"]),
    ("from core.run import Run", "model", "model", ["core.run"]),
    ("from ..scoring import evaluate\nfrom .progress import Progress", "core.run", "core", []),
    ("from ...data import audio", "core.run", "core", ["..."]),
    ("import train\nfrom metrics import METRICS", "core", "core", ["train"]),
    ("import flags", "core", "core", ["flags"]),
    ("from model.ast import AST\nfrom metrics import confusion", "report", "report", ["model.ast"]),
    ("from core import scoring", "report", "report", ["core"]),
    ("import evaluate, flags", "", "predict", ["evaluate"]),
    ("import build", "", "flags", ["build"]),
    ("import flags", "", "build", []),
    ("import data.audio", "", "util", ["data.audio"]),
])
def test_control_forbidden_import_is_detected(source, package, layer, forbidden):
    assert forbidden_imports(ast.parse(source), package, layer) == forbidden


def test_util_needs_only_the_standard_library():
    modules = imported_modules(parse(ROOT / "util.py"), "")
    assert {name.split(".")[0] for name in modules} <= sys.stdlib_module_names


def test_every_folder_and_script_with_code_is_in_a_layer():
    scripts = {path.stem for path in ROOT.glob("*.py")}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    around = {"bench", "docs", "experiments", "tests"}
    assert (scripts | packages) - around == set(LEVEL)


# --- what a layer may do ---

def reads_flags(tree):
    """Whether code imports argparse or reads an attribute of something called `args`."""
    reads_args = any(isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
                     and node.value.id == "args" for node in ast.walk(tree))
    return reads_args or "argparse" in imported_modules(tree, "")


def opens_files(tree):
    """Whether code calls open, read_text, read_bytes, write_text or write_bytes."""
    names = {"open", "read_text", "read_bytes", "write_text", "write_bytes"}
    called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return any(getattr(function, "id", getattr(function, "attr", None)) in names
               for function in called)


def imports_torch(tree):
    return any(module.split(".")[0] == "torch" for module in imported_modules(tree, "x.y"))


@pytest.mark.parametrize("package", PACKAGES)
def test_package_does_not_see_the_flags(package):
    for path in files_of(package):
        assert not reads_flags(parse(path)), path


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_code_without_tensors_does_not_import_torch(name):
    for path in files_of(name):
        assert not imports_torch(parse(path)), path


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_computations_open_no_files(name):
    for path in files_of(name):
        assert not opens_files(parse(path)), path


@pytest.mark.parametrize("check, source", [
    (reads_flags, "def f(args):\n    return args.epochs"),
    (reads_flags, "import argparse"),
    (opens_files, "with open('x') as file:\n    pass"),
    (opens_files, "from pathlib import Path\nPath('x').read_text()"),
    (imports_torch, "import torch.nn.functional as F"),
    (imports_torch, "def f():\n    from torch import nn"),
])
def test_control_forbidden_code_is_detected(check, source):
    assert check(ast.parse(source))
    assert not check(ast.parse("def f(*args):\n    return g(*args, open=True)"))


# --- only the schedule sets a learning rate ---

class RecordedGroup(dict):
    """A parameter group that notes which file sets its learning rate."""
    writers: ClassVar[set[str]] = set()

    def __setitem__(self, key, value):
        if key == "lr":
            self.writers.add(sys._getframe(1).f_code.co_filename)
        super().__setitem__(key, value)


def record_writers(patch):
    """prepare: train with recorded groups."""
    real_groups = train.parameter_groups
    RecordedGroup.writers = set()
    patch.setattr(train, "parameter_groups",
                  lambda *args: [RecordedGroup(group) for group in real_groups(*args)])


def check_rates(factors):
    """-> prepare: before each step, compare each group's rate with its base; note the factor."""
    def prepare(patch):
        real_step = train.train_step

        def train_step(learner, *rest):
            factor = learner.schedule.factor(int(learner.schedule.steps))
            for group in learner.optimizer.param_groups:
                assert float(group["lr"]) == pytest.approx(group["initial_lr"] * factor, rel=1e-12)
            factors.append(factor)
            return real_step(learner, *rest)
        patch.setattr(train, "train_step", train_step)
    return prepare


def diverge_once(patch):
    """prepare: the run's second epoch counts as diverged."""
    patch.setattr(train, "find_divergence", lambda accuracies, n_clips:
                  "made for the test" if len(accuracies) == 2 else None)


def test_only_the_schedule_sets_a_learning_rate(tones, tmp_path, monkeypatch):
    """In a run with a warm-up, an interruption, a resume and a rollback."""
    factors = []
    prepare = both(record_writers, check_rates(factors), diverge_once)
    flags = ["--epochs", 3, "--warmup-epochs", 1, "--on-divergence", "rollback"]
    code = program(monkeypatch, tmp_path, *flags, data=tones, prepare=both(prepare, stop_at(3)))
    assert code == 143
    assert RecordedGroup.writers == {str(ROOT / "sched" / "__init__.py")}
    assert program(monkeypatch, tmp_path, "--resume", prepare=prepare) == 0
    assert "rollback" in (tmp_path / "run" / "events.csv").read_text()
    assert len(factors) == 18
    assert factors[:6] == pytest.approx([(step + 1) / 6 for step in range(6)])


def test_control_other_writer_of_a_learning_rate_is_detected(tones, tmp_path, monkeypatch):
    def set_rate(patch):
        real_step = train.train_step

        def train_step(learner, *rest):
            learner.optimizer.param_groups[0]["lr"] = 1e-3
            return real_step(learner, *rest)
        patch.setattr(train, "train_step", train_step)
    program(monkeypatch, tmp_path, data=tones,
            prepare=both(record_writers, set_rate, stop_at(2)))
    assert __file__ in RecordedGroup.writers
