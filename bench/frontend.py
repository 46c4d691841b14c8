"""Milliseconds per clip for the spectrogram: this program's front ends against the usual libraries.

    pip install -r bench/requirements.txt
    python bench/frontend.py

LogMel against librosa (one clip at a time) and torchaudio (MelSpectrogram and AmplitudeToDB,
batched). Fbank against torchaudio's Kaldi fbank (one clip at a time) and the hub's feature
extractor. Clips are 4 s of noise.
"""
import argparse

import librosa
import numpy as np
import torch
import torchaudio
from common import in_turn, report, spread
from transformers import ASTFeatureExtractor

from core.device.precision import pick_device
from model.frontend import Fbank, LogMel


def librosa_logmel(clips):
    for clip in clips:
        mel = librosa.feature.melspectrogram(y=clip, sr=22050, n_fft=2048, hop_length=512,
                                             n_mels=128)
        librosa.power_to_db(mel, ref=np.max)


def torchaudio_logmel(device):
    mel = torchaudio.transforms.MelSpectrogram(22050, 2048, hop_length=512, n_mels=128,
                                               norm="slaney", mel_scale="slaney")
    return torch.nn.Sequential(mel, torchaudio.transforms.AmplitudeToDB(top_db=80)).to(device)


def kaldi_fbank(wave):
    for clip in wave:
        torchaudio.compliance.kaldi.fbank(
            clip[None], htk_compat=True, sample_frequency=16000, use_energy=False,
            window_type="hanning", num_mel_bins=128, dither=0.0, frame_shift=10)


def logmel_sides(batch, generator, device):
    """{name: function}, ours first."""
    wave = 0.1 * torch.randn(batch, 88200, generator=generator)
    on_device, clips = wave.to(device), list(wave.numpy())
    ours, theirs = LogMel().to(device), torchaudio_logmel(device)
    return {
        "LogMel": lambda: ours(on_device),
        "librosa": lambda: librosa_logmel(clips),
        "torchaudio MelSpectrogram": lambda: theirs(on_device),
    }


def fbank_sides(batch, generator, device):
    """{name: function}, ours first."""
    wave = 0.1 * torch.randn(batch, 64000, generator=generator)
    on_device, clips = wave.to(device), list(wave.numpy())
    ours, extractor = Fbank().to(device), ASTFeatureExtractor(max_length=398)
    return {
        "Fbank": lambda: ours(on_device),
        "Kaldi fbank (torchaudio)": lambda: kaldi_fbank(wave),
        "hub's feature extractor":
            lambda: extractor(clips, sampling_rate=16000, return_tensors="np"),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto",
                        help="for the batched ones; librosa, Kaldi and the hub's use the CPU")
    parser.add_argument("--out", default="bench/results/frontend.jsonl")
    args = parser.parse_args()
    device = pick_device(args.device)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for batch in args.batches:
        for make_sides in (logmel_sides, fbank_sides):
            sides = make_sides(batch, generator, device)
            with torch.inference_mode():
                times = in_turn(sides, args.rounds, device)
            own = next(iter(times.values()))
            for name, seconds in times.items():
                milliseconds = spread([1000 * s / batch for s in seconds])
                ratio = spread([s / o for s, o in zip(seconds, own, strict=True)])
                cells = [f"{median:.2f} ({low:.2f} to {high:.2f})"
                         for median, low, high in (milliseconds, ratio)]
                rows.append([batch, name, *cells])
    columns = ["batch", "side", "ms a clip, median (range)", "ours is faster by"]
    note = (f"{torch.get_num_threads()} threads, {device}, {args.rounds} rounds in turn, "
            "4 s clips")
    report("frontend", vars(args), columns, rows, [note], device, args.out)


if __name__ == "__main__":
    main()
