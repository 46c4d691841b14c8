"""Export a checkpoint for use elsewhere: python export.py --ckpt best.pt --to hf

    --to hf      a folder for transformers: AutoModelForAudioClassification and, where the front end is AudioSet's,
                 AutoFeatureExtractor; train.py --weights takes it, too
    --to onnx    one file for onnxruntime: waveform in, probabilities out, the front end inside
    --to torch   the same as a torch.export program (.pt2), which needs torch and nothing of this program

What is exported is what evaluate.py evaluates: the averaged weights where the run kept some. For onnx and torch the
waveform is (batch, samples) float32 in [-1, 1], mono, at the sample rate and of the length of a training clip, since the
positions are fitted to that length and evaluation hears tiles of it alone. Resampling, cutting a longer recording into
such tiles and averaging their probabilities stay with the caller. All that is written is read back and compared with the
checkpoint before it takes its place.
"""
import argparse
import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads stall on a shared CPU
import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from core.checkpoint import CheckpointError, load_checkpoint, reading, sync
from core.guard import NumbersError
from data.manifest import Manifest
from evaluate import calibration_of, escape_names, fail, find_checkpoint, multi_label_of, restore
from model.ast import AST
from model.frontend import Fbank, FrontendConfig
from model.pretrained import load_pretrained, to_hub
from report.card import model_card

OUT = {"hf": "hf", "onnx": "model.onnx", "torch": "model.pt2"}  # in the run folder, by default
HF_FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
ONNX = "onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0"  # asked for by --to onnx alone; tests/requirements.txt has them
ONNX_LIMIT = 2**31 - 2**24  # bytes of weights: what protobuf holds in one file, less the graph
MARK = "warble"  # in whatever is written, so that it is known again
TOLERANCE = 1e-4


class ExportError(ValueError):
    """What cannot be exported or written: one line that says why and the mend."""


INPUT_ERRORS = (CheckpointError, ExportError)


class Scorer(nn.Module):
    """(B, samples) -> (B, classes): the probabilities that evaluate() gives a tile, at the calibrated temperature."""

    def __init__(self, model, frontend, temperature, multi_label):
        super().__init__()
        self.frontend, self.model, self.temperature, self.multi_label = frontend, model, temperature, multi_label

    def forward(self, waveform):
        logits = self.model(self.frontend(waveform)) / self.temperature
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=1)


def details(state):
    """What a user of the exported model has to know, in plain types."""
    calibration, multi_label = calibration_of(state), multi_label_of(state)
    with reading(state.path):
        return {"classes": [str(name) for name in state["classes"]], "sample_rate": state["frontend"]["sample_rate"],
                "samples": state["clip"]["samples"], "short": state["clip"]["short"], **calibration, "multi_label": multi_label,
                "frontend": state["frontend"], "epoch": state["progress"]["epoch"]}


def made_waves(samples, rate):
    """(4, samples) float32: noise; a tone that fades; a sweep with harmonics, between silences; clicks; all over the noise
    that a recording of 16 bits has at least."""
    rng, t = np.random.default_rng(0), np.arange(samples) / rate
    cycles = np.cumsum(np.linspace(500, rate / 8, samples)) / rate
    sweep = sum(np.sin(2 * np.pi * k * cycles) / k for k in (1, 2, 3)) * (np.sin(2 * np.pi * 1.5 * t) > 0)
    waves = np.stack([0.1 * rng.standard_normal(samples), 0.5 * np.exp(-3 * t) * np.sin(2 * np.pi * 440 * t), 0.2 * sweep,
                      0.9 * (rng.random(samples) < 20 / samples)])
    return torch.from_numpy(np.clip(waves + 2**-15 * rng.standard_normal(waves.shape), -1, 1)).float()


def compare(what, pairs):
    """Say the largest difference between pairs of arrays; raises NumbersError where it is above the tolerance."""
    worst = max(float((torch.as_tensor(ours) - torch.as_tensor(theirs)).abs().max()) for ours, theirs in pairs)
    if not worst <= TOLERANCE:
        raise NumbersError(f"{what} differ by {worst:.1e}, more than {TOLERANCE:g}; nothing was written")
    print(f"checked: {what} differ by at most {worst:.1e}")


# --- where to ---

@contextlib.contextmanager
def writing(out):
    """Around all that is done at `out`: where the disk or a folder refuses, one line says so."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"{out}: cannot be written ({error.strerror}); free some space, permit writing or give another "
                          "place") from None


def check_target(out, kind):
    """Raise ExportError for a place where something lies that this script did not write."""
    mend = "remove it or give another place"
    if any("\udc80" <= c <= "\udcff" for c in os.path.realpath(out)):
        raise ExportError(f"{out}: its path is not UTF-8, which these formats' writers need; give another place")
    if kind == "hf" and out.is_dir():
        names = {entry.name for entry in out.iterdir()}
        others = names - HF_FILES if is_ours(out / "config.json", kind) else names
        if others:
            raise ExportError(f"{out}: holds {min(others)}, which export.py did not write; {mend}")
    elif out.exists() and (kind == "hf" or not is_ours(out, kind)):
        raise ExportError(f"{out}: exists, and is nothing that export.py --to {kind} wrote; {mend}")


def is_ours(path, kind):
    try:
        if kind == "hf":
            return MARK in json.loads(path.read_text(encoding="utf-8"))
        if kind == "onnx":
            import onnx
            return MARK in {entry.key for entry in onnx.load(path, load_external_data=False).metadata_props}
        with zipfile.ZipFile(path) as file:
            return any(name.endswith(f"/extra/{MARK}") for name in file.namelist())
    except Exception:  # the readers raise what they like on the files of others
        return False


@contextlib.contextmanager
def staged(out):
    """A path to write to, beside `out`, which takes its place if all goes well; else nothing is left of it."""
    out = Path(os.path.realpath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent, ignore_cleanup_errors=True) as folder:
        new, old = Path(folder) / out.name, Path(folder) / "before"
        yield new
        for path in [*new.iterdir(), new] if new.is_dir() else [new]:
            sync(path)
        if out.is_dir():  # no folder can be put over one that holds something
            os.replace(out, old)
        try:
            os.replace(new, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise
        sync(out.parent)


# --- the three formats ---

def write_hf(folder, state, info, model, frontend):
    """The folder for transformers: config.json, model.safetensors, README.md and, where it has the front end,
    preprocessor_config.json."""
    frames, classes = frontend.config.frames(info["samples"]), info["classes"]
    geometry, tensors = to_hub(model.state_dict(), model.config, frames)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    write_ascii(folder / "config.json", {
        "architectures": ["ASTForAudioClassification"], "model_type": "audio-spectrogram-transformer", **geometry,
        "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
        "problem_type": f"{'multi' if info['multi_label'] else 'single'}_label_classification",
        "id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)},
        MARK: {key: value for key, value in info.items() if key != "classes"}})
    if is_audioset(frontend.config):
        write_ascii(folder / "preprocessor_config.json", {
            "feature_extractor_type": "ASTFeatureExtractor", "sampling_rate": frontend.config.sample_rate,
            "num_mel_bins": frontend.config.n_mels, "max_length": frames, "do_normalize": True, "mean": Fbank.mean,
            "std": Fbank.std, "feature_size": 1, "padding_value": 0.0, "padding_side": "right", "return_attention_mask": False})
    else:
        c = frontend.config
        own = "logmel" if c.kind == "logmel" else f"fbank of {c.fmin:g} to {c.fmax:g} Hz"
        print(f"no preprocessor_config.json: transformers has no feature extractor for {own}; README.md has the lines of Python "
              "that make the model's input")
    print(f"the temperature {info['temperature']:g} is in config.json; transformers does not apply it, README.md shows how")
    with reading(state.path):
        manifest = Manifest.from_dict(state["manifest"])
        clips = manifest.select(manifest.rows("train")).counts().tolist()
        source = state["weights"].split(",")[0].split(" ")[0]
    metrics, why = metrics_beside(state.path)
    print(f"model card: {why}")
    card = model_card(classes, clips, metrics, source, usage(info, frontend.config))
    (folder / "README.md").write_text(card, encoding="utf-8")
    waves = made_waves(info["samples"], info["sample_rate"])
    with torch.inference_mode():
        spec = frontend(waves)
        compare("logits, computed as transformers does from what was written,", [(model(spec), read_back(folder, model)(spec))])


def is_audioset(config):
    return config == FrontendConfig.of("fbank")


def read_back(folder, model):
    """The model that the folder holds, with one eps for all norms as in transformers."""
    other = AST(replace(model.config, drop_path=0.0)).eval()
    load_pretrained(other, folder, keep_head=True)
    for module in other.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    return other


def write_ascii(path, value):
    """JSON in ASCII, which carries any class name, one in bytes that are not UTF-8 too."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="ascii")


def metrics_beside(path):
    """The figures of the test beside a best.pt, or None, and a word on them."""
    file = path.parent / "test" / "metrics.json"
    if path.name != "best.pt":
        return None, f"without test figures: those in {file.parent} are of best.pt"
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
        figures = {"n": int(metrics["n"])}
        for key in ("accuracy", "macro_f1", "map"):
            low, high = metrics[f"{key}_ci95"]
            figures[key] = float(metrics[key]), float(low), float(high)
        return figures, f"with the figures in {file}"
    except (OSError, ValueError, KeyError, TypeError):
        return None, f"without test figures: there are none in {file}; make them with evaluate.py"


def usage(info, c):
    """Python that goes from a recording to probabilities with what --to hf writes. c: a FrontendConfig."""
    n, rate, frames = info["samples"], info["sample_rate"], c.frames(info["samples"])
    short = f"np.resize(wave, {n})" if info["short"] == "repeat" else f"np.pad(wave, (0, {n} - len(wave)))"
    scores = "sigmoid()" if info["multi_label"] else "softmax(dim=1)"
    if is_audioset(c):
        imports = "from transformers import AutoFeatureExtractor, AutoModelForAudioClassification"
        features = f'''extractor = AutoFeatureExtractor.from_pretrained(folder)
x = extractor(wave, sampling_rate={rate}, return_tensors="pt")["input_values"]'''
    elif c.kind == "fbank":
        imports = "import torchaudio\nfrom transformers import AutoModelForAudioClassification"
        features = f'''x = torchaudio.compliance.kaldi.fbank(
    torch.from_numpy(wave)[None], sample_frequency={rate}, window_type="hanning", num_mel_bins={c.n_mels}, use_energy=False,
    htk_compat=True, dither=0.0, frame_length={1000 * c.win_length / rate:g}, frame_shift={1000 * c.hop_length / rate:g}, \
low_freq={c.fmin}, high_freq={c.fmax})
x = (x[None] - {Fbank.mean}) / (2 * {Fbank.std})'''
    else:
        imports = "from transformers import AutoModelForAudioClassification"
        features = f'''mel = librosa.feature.melspectrogram(y=wave, sr={rate}, n_fft={c.n_fft}, win_length={c.win_length}, \
hop_length={c.hop_length},
                                     n_mels={c.n_mels}, fmin={c.fmin}, fmax={c.fmax})
db = librosa.power_to_db(mel, ref=np.max)
x = torch.from_numpy((db - db.mean()) / (db.std() + 1e-6)).float().T[None]'''
    return f'''import librosa
import numpy as np
import torch
{imports}

folder = "."  # this folder, or its name on the hub
model = AutoModelForAudioClassification.from_pretrained(folder).eval()
wave, _ = librosa.load("recording.wav", sr={rate}, mono=True)
wave = {short} if len(wave) < {n} else wave[:{n}]
{features}  # (1, {frames}, {c.n_mels})
with torch.no_grad():
    probabilities = (model(x).logits / {info["temperature"]}).{scores}[0]
for i in probabilities.argsort(descending=True)[:5].tolist():
    print(f"{{probabilities[i]:.3f}} {{model.config.id2label[i]}}")
'''


def need_onnx():
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f"--to onnx: needs {error.name}, which is not installed: pip install {ONNX}") from None


def write_onnx(path, scorer, info, waves):
    """One .onnx file, opset 18: "waveform" (batch, samples) -> "probabilities" (batch, classes); `info` is in its metadata,
    each value as JSON."""
    import onnxruntime
    size = sum(value.nbytes for value in scorer.state_dict().values())
    if size > ONNX_LIMIT:
        raise ExportError(f"--to onnx: {size / 1e9:.1f} GB of weights do not fit one .onnx file, which holds 2; use --to torch")
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it tells what it does not simplify
    try:
        with warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(scorer, (waves[:2],), dynamo=True, opset_version=18, verbose=False,
                                        dynamic_shapes=({0: "batch"},), input_names=["waveform"],
                                        output_names=["probabilities"])
    except Exception as error:  # other versions of these packages than those tried: in a hundred ways
        raise ExportError(f"--to onnx: the exporter fails ({type(error).__name__}: {str(error).strip().splitlines()[0][:100]}); "
                          f"pip install torch==2.11.0 {ONNX}") from None
    for node in program.model.graph:
        node.metadata_props.clear()  # lines and folders of this machine
    program.model.metadata_props.update({key: json.dumps(value) for key, value in {MARK: 1, **info}.items()})
    program.save(path, external_data=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    compare("probabilities of torch and onnxruntime", [
        (scorer(batch), session.run(["probabilities"], {"waveform": batch.numpy()})[0]) for batch in (waves[:1], waves[1:])])


def write_torch(path, scorer, info, waves):
    """A torch.export program: (batch, samples) -> (batch, classes); `info` as JSON in its extra file MARK."""
    program = torch.export.export(scorer, (waves[:2].clone(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for part in program.graph_module.modules():
        for node in part.graph.nodes:
            node.meta.pop("stack_trace", None)  # lines and folders of this machine
    with warnings.catch_warnings(action="ignore"):  # of a window that is a view, of buffers that are read only
        file = io.BytesIO()  # a full disk is then an OSError
        torch.export.save(program, file, extra_files={MARK: json.dumps(info)})
        path.write_bytes(file.getbuffer())
        other = torch.export.load(path).module()
    compare("probabilities of the checkpoint and of the program read back", [
        (scorer(batch), other(batch)) for batch in (waves[:1], waves[1:])])


def parse(argv=None):
    parser = argparse.ArgumentParser(prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(fail(f"{message} (see --help)"))
    add = parser.add_argument
    add("--ckpt", required=True, help="a checkpoint; a bare name is looked up in the newest run under runs/")
    add("--to", required=True, choices=tuple(OUT), help="the format")
    add("out", nargs="?", help="folder (hf) or file to write; what export.py wrote there before is replaced (default: hf, "
        "model.onnx or model.pt2 in the run folder)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if args.to == "onnx":
        need_onnx()
    path = find_checkpoint(args.ckpt)
    out = Path(args.out) if args.out else path.parent / OUT[args.to]
    with writing(out):
        check_target(out, args.to)
    print(f"checkpoint: {path}")
    state = load_checkpoint(path)
    model, frontend = restore(state, torch.device("cpu"))
    model.eval().requires_grad_(False)
    info = details(state)
    print(f"input: {info['samples']} samples at {info['sample_rate']} Hz, mono; {len(info['classes'])} classes; "
          f"temperature {info['temperature']:g}")
    with writing(out), staged(out) as new:
        if args.to == "hf":
            write_hf(new, state, info, model, frontend)
        else:
            write = write_onnx if args.to == "onnx" else write_torch
            with torch.no_grad():
                write(new, Scorer(model, frontend, info["temperature"], info["multi_label"]).eval(), info,
                      made_waves(info["samples"], info["sample_rate"]))
    size = sum(file.stat().st_size for file in out.iterdir()) if out.is_dir() else out.stat().st_size
    print(f"written: {out} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    escape_names()
    try:
        main()
    except INPUT_ERRORS as error:
        sys.exit(fail(error))
    except NumbersError as error:
        sys.exit(fail(error, 3))
