"""Do the pretrained weights' front end, the native clip length and the right axes matter?

    python experiments/pretrain.py --frontend fbank
    python experiments/frontend.py

Pretrains on one front end and fine-tunes on the same or the other. Also tries two faults of an
earlier system, which are only in this file: swapped axes of the spectrogram, and zero padding from
173 to 1024 frames. Padding costs several times as much, so it has a table of its own, on the first
fold.
"""

import argparse
from unittest import mock

import torch
import torch.nn.functional as F
from common import START, rates, study, study_parser
from pretrain import pretrained

from model.ast import AST
from model.frontend import LogMel

PADDED_FRAMES = 1024


class SwappedConv2d(torch.nn.Conv2d):
    """Patches of the transposed spectrogram: the same number, in another order."""

    def forward(self, x):
        x = super().forward(x.transpose(2, 3))  # (B, dim, columns, rows)
        return x.flatten(2).unflatten(2, (x.shape[3], x.shape[2]))


def swapped_axes():
    """Make every AST read time as frequency, within a `with` block.

    As a model does that is given (B, frames, n_mels) instead of (B, n_mels, frames).
    """
    original = AST.__init__

    def build(self, config):
        original(self, config)
        self.patch_embed.__class__ = SwappedConv2d

    return mock.patch.object(AST, "__init__", build)


def padded_frames():
    """Make LogMel return 1024 frames, zeros after those of the clip, within a `with` block."""
    original = LogMel.forward

    def forward(self, wave):
        spec = original(self, wave)  # (B, n_mels, frames)
        return F.pad(spec, (0, PADDED_FRAMES - spec.shape[2]))

    return mock.patch.object(LogMel, "forward", forward)


CLAIM = ("Weights do best on the front end that they were trained with; with swapped axes they are "
         "worth less.")
ARMS = {
    "LogMel, from LogMel": [],
    "LogMel, from Fbank": ["--weights", pretrained("fbank")],
    "Fbank, from Fbank": ["--frontend", "fbank", "--weights", pretrained("fbank")],
    "Fbank, from LogMel": ["--frontend", "fbank"],
    "LogMel, axes swapped": ([], swapped_axes),
}
ARMS_FOR_OTHER_WEIGHTS = {
    "Fbank": ["--frontend", "fbank"],
    "LogMel": [],
    "LogMel, axes swapped": ([], swapped_axes),
}
LENGTH_CLAIM = "Padding 173 frames to 1024 gains nothing and costs several times the time."
LENGTH_ARMS = {"173 frames": [], "padded to 1024": ([], padded_frames)}

if __name__ == "__main__":
    parser = study_parser(__doc__)
    parser.set_defaults(epochs=10)
    args = parser.parse_args()
    arms = ARMS if args.weights == str(START) else ARMS_FOR_OTHER_WEIGHTS
    study("frontend", CLAIM, arms, args, rates(args))
    first_fold = argparse.Namespace(**vars(args) | {"folds": args.folds[:1]})
    study("length", LENGTH_CLAIM, LENGTH_ARMS, first_fold, rates(args))
