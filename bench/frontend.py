"""Milliseconds a clip for the spectrogram, this project's front ends against the usual ways, on 4 s clips.

    pip install -r bench/requirements.txt
    python bench/frontend.py

LogMel against librosa (mel power spectrum, power to dB, one clip at a time) and torchaudio (MelSpectrogram and
AmplitudeToDB, batched); Fbank against torchaudio's Kaldi fbank (one clip at a time) and the hub's feature extractor.
"""
import argparse

import librosa
import numpy as np
import torch
import torchaudio
from common import in_turn, report, spread
from transformers import ASTFeatureExtractor

from core.precision import pick_device
from model.frontend import Fbank, LogMel


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto", help="of the batched ones; librosa, Kaldi and the hub work on the host")
    parser.add_argument("--out", default="bench/results/frontend.jsonl")
    args = parser.parse_args()
    device = pick_device(args.device)
    generator = torch.Generator().manual_seed(0)
    logmel, fbank = LogMel().to(device), Fbank().to(device)
    mel = torchaudio.transforms.MelSpectrogram(22050, 2048, hop_length=512, n_mels=128, norm="slaney",
                                               mel_scale="slaney").to(device)
    decibel = torchaudio.transforms.AmplitudeToDB(top_db=80).to(device)
    extractor = ASTFeatureExtractor(max_length=398)
    rows = []
    for batch in args.batches:
        wave22 = 0.1 * torch.randn(batch, 88200, generator=generator)
        wave16 = 0.1 * torch.randn(batch, 64000, generator=generator)
        here22, here16 = wave22.to(device), wave16.to(device)
        clips22, clips16 = list(wave22.numpy()), list(wave16.numpy())
        sides = {
            "LogMel": lambda: logmel(here22),
            "librosa": lambda: [librosa.power_to_db(librosa.feature.melspectrogram(
                y=clip, sr=22050, n_fft=2048, hop_length=512, n_mels=128), ref=np.max) for clip in clips22],
            "torchaudio MelSpectrogram": lambda: decibel(mel(here22)),
            "Fbank": lambda: fbank(here16),
            "Kaldi fbank (torchaudio)": lambda: [torchaudio.compliance.kaldi.fbank(
                clip[None], htk_compat=True, sample_frequency=16000, use_energy=False, window_type="hanning",
                num_mel_bins=128, dither=0.0, frame_shift=10) for clip in wave16],
            "hub's feature extractor": lambda: extractor(clips16, sampling_rate=16000, return_tensors="np"),
        }
        with torch.inference_mode():
            times = in_turn(sides, args.rounds, device)
        for name, seconds in times.items():
            own = times["LogMel" if name in list(sides)[:3] else "Fbank"]
            each, ratio = spread([1000 * s / batch for s in seconds]), spread([s / o for s, o in zip(seconds, own)])
            rows.append([batch, name, f"{each[0]:.2f} ({each[1]:.2f} to {each[2]:.2f})",
                         f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"])
    report("frontend", vars(args), ["batch", "side", "ms a clip, median (range)", "ours is faster by"], rows,
           [f"{torch.get_num_threads()} threads, {device}, {args.rounds} rounds in turn, 4 s clips"], device, args.out)


if __name__ == "__main__":
    main()
