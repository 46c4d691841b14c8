"""Export a checkpoint for use elsewhere: python export.py --ckpt best.pt --to hf

    --to hf      a folder for transformers: AutoModelForAudioClassification and, if the front end
                 is AudioSet's, AutoFeatureExtractor; `train.py --weights FOLDER` reads it, too
    --to onnx    one file for onnxruntime: waveform in, probabilities out, front end included
    --to torch   the same as a torch.export program (.pt2), which needs torch only

The exported weights are those that evaluate.py uses. For onnx and torch the waveform is (batch,
samples) float32 in [-1, 1], mono, at the model's sample rate and of the length of a training clip.
Resample, cut longer recordings into such clips and average their probabilities yourself. Every
export is read back and compared with the checkpoint before it replaces an older one.
"""
import argparse
import contextlib
import io
import json
import logging
import os
import tempfile
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads must not spin
from util import require_working_directory

require_working_directory()
import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from core.divergence import TrainingError
from core.exits import parse_args, run_script
from core.run.checkpoint import Checkpoint, as_checkpoint_error, load_checkpoint
from core.scoring import calibration_of, find_checkpoint, is_multi_label, restore
from data.manifest import Manifest
from model.ast import AST
from model.frontend import Fbank, FrontendConfig
from model.pretrained import load_pretrained, to_hub
from report.card import DESCRIBED, model_card, usage_code
from util import InputError, fsync_path, read_regular

DEFAULT_OUT = {"hf": "hf", "onnx": "model.onnx", "torch": "model.pt2"}  # in the run folder
HF_FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
ONNX_PACKAGES = "onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0"  # as in tests/requirements.txt
ONNX_MAX_BYTES = 2**31 - 2**24  # of weights: what protobuf holds in one file, less the graph
MARK = "warble"  # in every exported file, so that it is recognised later
TOLERANCE = 1e-4  # between the checkpoint's outputs and the export's


class ExportError(InputError):
    """What cannot be exported or written."""


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.to == "onnx":
        require_onnx()
    path = find_checkpoint(args.ckpt)
    out = Path(args.out) if args.out else path.parent / DEFAULT_OUT[args.to]
    with disk_errors(out):
        check_target(out, args.to)
    print(f"checkpoint: {path}")
    checkpoint = load_checkpoint(path)
    model, frontend = restore(checkpoint, torch.device("cpu"))
    model.eval().requires_grad_(False)
    info = description(checkpoint)
    print(f"input: {info['samples']} samples at {info['sample_rate']} Hz, mono; "
          f"{len(info['classes'])} classes; temperature {info['temperature']:g}")
    with disk_errors(out), replacing(out) as new:
        if args.to == "hf":
            write_hf(new, checkpoint, info, model, frontend)
        else:
            scorer = WaveformScorer(model, frontend, info["temperature"], info["multi_label"])
            waves = probe_waves(info["samples"], info["sample_rate"])
            write = write_onnx if args.to == "onnx" else write_torch
            with torch.no_grad():
                write(new, scorer.eval(), info, waves)
    files = out.iterdir() if out.is_dir() else [out]
    n_bytes = sum(file.stat().st_size for file in files)
    print(f"written: {out} ({n_bytes / 1e6:.1f} MB)")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="export.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    parser.add_argument("--ckpt", required=True, help="checkpoint; a bare name is looked up in the "
                        "newest run under runs/")
    parser.add_argument("--to", required=True, choices=list(DEFAULT_OUT), help="format")
    parser.add_argument("out", nargs="?", help="folder (hf) or file to write; an older export "
                        "there is replaced (default: hf, model.onnx, model.pt2 in the run folder)")
    return parse_args(parser, argv)


# --- what is exported ---

class WaveformScorer(nn.Module):
    """Waveforms (B, samples) -> calibrated probabilities (B, classes)."""

    def __init__(self, model: AST, frontend: nn.Module, temperature: float, multi_label: bool):
        super().__init__()
        self.frontend, self.model = frontend, model
        self.temperature, self.multi_label = temperature, multi_label

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        logits = self.model(self.frontend(waveform)) / self.temperature
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=1)


def description(checkpoint: Checkpoint) -> dict:
    """What a user of the exported model has to know, in plain types."""
    calibration, multi_label = calibration_of(checkpoint), is_multi_label(checkpoint)
    with as_checkpoint_error(checkpoint.path):
        return {
            "classes": [str(name) for name in checkpoint["classes"]],
            "sample_rate": checkpoint["frontend"]["sample_rate"],
            "samples": checkpoint["clip"]["samples"],
            "short": checkpoint["clip"]["short"],
            **calibration,
            "multi_label": multi_label,
            "frontend": checkpoint["frontend"],
            "epoch": checkpoint["progress"]["epoch"],
        }


def probe_waves(n_samples: int, rate: int) -> torch.Tensor:
    """(4, samples) float32: noise, a fading tone, a sweep with pauses, clicks.

    All have noise at the level of 16-bit rounding, as recordings do.
    """
    rng, t = np.random.default_rng(0), np.arange(n_samples) / rate
    cycles = np.cumsum(np.linspace(500, rate / 8, n_samples)) / rate
    is_on = np.sin(2 * np.pi * 1.5 * t) > 0
    sweep = sum(np.sin(2 * np.pi * k * cycles) / k for k in (1, 2, 3)) * is_on
    waves = np.stack([
        0.1 * rng.standard_normal(n_samples),
        0.5 * np.exp(-3 * t) * np.sin(2 * np.pi * 440 * t),
        0.2 * sweep,
        0.9 * (rng.random(n_samples) < 20 / n_samples),
    ])
    waves += 2**-15 * rng.standard_normal(waves.shape)
    return torch.from_numpy(np.clip(waves, -1, 1)).float()


def compare(what: str, pairs: list[tuple]) -> None:
    """Print the largest difference between pairs of arrays; TrainingError above the tolerance."""
    worst = max(float((torch.as_tensor(ours) - torch.as_tensor(theirs)).abs().max())
                for ours, theirs in pairs)
    if not worst <= TOLERANCE:  # also true for nan
        raise TrainingError(f"{what} differ by {worst:.1e}, more than {TOLERANCE:g}; nothing was "
                            "written")
    print(f"checked: {what} differ by at most {worst:.1e}")


# --- where it is written ---

@contextlib.contextmanager
def disk_errors(out):
    """Turn errors of the disk at `out` into one line."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"{out}: cannot be written ({error.strerror}); free some space, permit "
                          "writing or give another place") from None


def check_target(out: Path, kind: str) -> None:
    """Raise ExportError if something is at `out` that this script did not write."""
    advice = "remove it or give another place"
    if any("\udc80" <= c <= "\udcff" for c in os.path.realpath(out)):
        raise ExportError(f"{out}: its path is not UTF-8, which the writers of these formats need; "
                          "give another place")
    if kind == "hf" and out.is_dir():
        names = {entry.name for entry in out.iterdir()}
        foreign = names - HF_FILES if is_own_export(out / "config.json", kind) else names
        if foreign:
            raise ExportError(f"{out}: holds {min(foreign)}, which export.py did not write; "
                              f"{advice}")
    elif out.exists() and (kind == "hf" or not is_own_export(out, kind)):
        raise ExportError(f"{out}: exists, but export.py --to {kind} did not write it; {advice}")


def is_own_export(path: Path, kind: str) -> bool:
    """Whether a file bears this script's mark."""
    try:
        if kind == "hf":
            return MARK in json.loads(read_regular(path))
        if kind == "onnx":
            import onnx
            properties = onnx.load(path, load_external_data=False).metadata_props
            return MARK in {entry.key for entry in properties}
        with zipfile.ZipFile(path) as file:
            return any(name.endswith(f"/extra/{MARK}") for name in file.namelist())
    except Exception:  # readers raise many types for foreign files
        return False


@contextlib.contextmanager
def replacing(out):
    """A path to write to, beside `out`, which replaces `out` if the block ends without an error."""
    out = Path(os.path.realpath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent,
                                     ignore_cleanup_errors=True) as folder:
        new, old = Path(folder) / out.name, Path(folder) / "before"
        yield new
        written = [*new.iterdir(), new] if new.is_dir() else [new]
        for path in written:
            fsync_path(path)
        if out.is_dir():  # a folder cannot replace one that is not empty
            os.replace(out, old)
        try:
            os.replace(new, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise
        fsync_path(out.parent)


# --- hf ---

def write_hf(folder: Path, checkpoint: Checkpoint, info: dict, model: AST, frontend: nn.Module
             ) -> None:
    """Write config.json, model.safetensors, README.md, and preprocessor_config.json if possible."""
    config = frontend.config
    geometry, tensors = to_hub(model.state_dict(), model.config, config.frames(info["samples"]))
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    write_ascii_json(folder / "config.json", hf_config(info, geometry))
    if is_audioset(config):
        write_ascii_json(folder / "preprocessor_config.json", hf_preprocessor(config, info))
    else:
        advice = "README.md has the Python lines that compute the model's input"
        if config.kind not in DESCRIBED:
            advice = "README.md cannot describe it; --to onnx and --to torch include it"
        print("no preprocessor_config.json: transformers has no feature extractor for this front "
              f"end ({config.kind}, {config.fmin:g} to {config.fmax:g} Hz); {advice}")
    print(f"the temperature {info['temperature']:g} is in config.json; transformers does not apply "
          "it, README.md shows how")
    with as_checkpoint_error(checkpoint.path):
        manifest = Manifest.from_dict(checkpoint["manifest"])
        n_train = manifest.select(manifest.rows("train")).counts().tolist()
        source = checkpoint["weights"].split(",")[0].split(" ")[0]
    metrics, note = stored_metrics(checkpoint.path)
    print(f"model card: {note}")
    usage = usage_code(info, config, config.frames(info["samples"]), is_audioset(config),
                       (Fbank.mean, Fbank.std))
    card = model_card(info["classes"], n_train, metrics, source, usage)
    (folder / "README.md").write_text(card, encoding="utf-8")
    with torch.inference_mode():
        spec = frontend(probe_waves(info["samples"], info["sample_rate"]))
        compare("logits of the checkpoint and of the written files, computed as transformers does,",
                [(model(spec), read_back(folder, model)(spec))])


def hf_config(info, geometry):
    classes = info["classes"]
    problem = "multi_label_classification" if info["multi_label"] else "single_label_classification"
    return {
        "architectures": ["ASTForAudioClassification"],
        "model_type": "audio-spectrogram-transformer",
        **geometry,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "problem_type": problem,
        "id2label": dict(enumerate(classes)),
        "label2id": {name: i for i, name in enumerate(classes)},
        MARK: {key: value for key, value in info.items() if key != "classes"},
    }


def hf_preprocessor(config, info):
    return {
        "feature_extractor_type": "ASTFeatureExtractor", "sampling_rate": config.sample_rate,
        "num_mel_bins": config.n_mels, "max_length": config.frames(info["samples"]),
        "do_normalize": True, "mean": Fbank.mean, "std": Fbank.std, "feature_size": 1,
        "padding_value": 0.0, "padding_side": "right", "return_attention_mask": False,
    }


def is_audioset(config: FrontendConfig) -> bool:
    """Whether it is the front end of AST's AudioSet weights, which transformers has, too."""
    return config == FrontendConfig.of("fbank")


def read_back(folder: Path, model: AST) -> AST:
    """The model in the folder, with one eps for all norms as in transformers."""
    loaded = AST(replace(model.config, drop_path=0.0)).eval()
    load_pretrained(loaded, folder, keep_head=True)
    for module in loaded.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    return loaded


def write_ascii_json(path: Path, value: dict) -> None:
    """Write JSON in ASCII, which holds any class name, also one that is not UTF-8."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="ascii")


def stored_metrics(checkpoint: Path) -> tuple[dict | None, str]:
    """The test metrics beside a best.pt, or None, and a note to print."""
    file = checkpoint.parent / "test" / "metrics.json"
    if checkpoint.name != "best.pt":
        return None, f"without test metrics: those in {file.parent} are of best.pt"
    try:
        stored = json.loads(read_regular(file))
        metrics = {"n": int(stored["n"])}
        for key in ("accuracy", "macro_f1", "map"):
            low, high = stored[f"{key}_ci95"]
            metrics[key] = float(stored[key]), float(low), float(high)
        return metrics, f"with the metrics in {file}"
    except (OSError, ValueError, KeyError, TypeError):
        return None, f"without test metrics: {file} has none; run evaluate.py"


# --- onnx and torch ---

def require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f"--to onnx: needs {error.name}, which is not installed: pip install "
                          f"{ONNX_PACKAGES}") from None


def write_onnx(path: Path, scorer: WaveformScorer, info: dict, waves: torch.Tensor) -> None:
    """One .onnx file: "waveform" (batch, samples) -> "probabilities" (batch, classes).

    Its metadata hold `info`, each value as JSON.
    """
    import onnxruntime
    n_bytes = sum(value.nbytes for value in scorer.state_dict().values())
    if n_bytes > ONNX_MAX_BYTES:
        raise ExportError(f"--to onnx: {n_bytes / 1e9:.1f} GB of weights do not fit one .onnx "
                          "file, which holds 2 GB; use --to torch")
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it lists what it does not simplify
    try:
        with warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                scorer, (waves[:2],), dynamo=True, opset_version=18, verbose=False,
                dynamic_shapes=({0: "batch"},), input_names=["waveform"],
                output_names=["probabilities"])
    except Exception as error:  # other versions of these packages fail in many ways
        reason = str(error).strip().splitlines() or [""]
        raise ExportError(
            f"--to onnx: the exporter fails ({type(error).__name__}: {reason[0][:100]}); "
            f"pip install torch==2.11.0 {ONNX_PACKAGES}") from None
    for node in program.model.graph:
        node.metadata_props.clear()  # source lines and folders of this machine
    properties = {MARK: 1, **info}
    program.model.metadata_props.update(
        {key: json.dumps(value) for key, value in properties.items()})
    program.save(path, external_data=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(batch):
        return session.run(["probabilities"], {"waveform": batch.numpy()})[0]

    compare("probabilities of torch and onnxruntime",
            [(scorer(batch), run(batch)) for batch in (waves[:1], waves[1:])])


def write_torch(path: Path, scorer: WaveformScorer, info: dict, waves: torch.Tensor) -> None:
    """A torch.export program (batch, samples) -> (batch, classes), with `info` in a JSON file."""
    batch_size = torch.export.Dim("batch")
    program = torch.export.export(scorer, (waves[:2].clone(),), dynamic_shapes=({0: batch_size},))
    for module in program.graph_module.modules():
        for node in module.graph.nodes:
            node.meta.pop("stack_trace", None)  # source lines and folders of this machine
    with warnings.catch_warnings(action="ignore"):  # about views and read-only buffers
        buffer = io.BytesIO()  # so that a full disk raises OSError
        torch.export.save(program, buffer, extra_files={MARK: json.dumps(info)})
        path.write_bytes(buffer.getbuffer())
        loaded = torch.export.load(path).module()
    compare("probabilities of the checkpoint and of the program read back",
            [(scorer(batch), loaded(batch)) for batch in (waves[:1], waves[1:])])


if __name__ == "__main__":
    run_script(main)
