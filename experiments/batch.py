"""Is an effective batch of 32 better than one of 4, and must the learning rates change with it?

    python experiments/batch.py
"""

from common import study, study_parser

CLAIM = ("In as many epochs, an effective batch of 4 with rates divided by the root of 8 learns as "
         "much as one of 32; with the rates of 32 it learns faster, but less reliably.")
ARMS = {
    "32, rates as given": ["--effective-batch", 32],
    "4, rates as given": ["--effective-batch", 4],
    "4, rates / sqrt(8)": [
        "--effective-batch", 4, "--lr-backbone", 5e-5 / 8**0.5, "--lr-head", 1e-3 / 8**0.5],
}

if __name__ == "__main__":
    study("batch", CLAIM, ARMS, study_parser(__doc__).parse_args())
