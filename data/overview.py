"""What a run prints about its data: the classes, what decided labels and splits, and warnings."""
import numpy as np

from util import plural, summarize

from .manifest import SPLITS, Manifest

MAX_CLASS_LINES = 20
SHARE_RANGE = (0.075, 0.30)  # of the clips, in val and in test; the aim is 0.15
MAX_CLASS_SHARE = 0.5  # of a class, in one group
MIN_CLASS_CLIPS = 5  # for the share of a group to say anything
MAX_UNEVENNESS = 20  # clips of the largest class over those of the smallest
ROLES = ("path", "label", "secondary label", "split", "fold", "group", "time")


def class_lines(manifest: Manifest) -> list[str]:
    """A table of the classes with clips, minutes and groups, largest first; at most 20 lines."""
    clips, classes = manifest.positives(np.arange(len(manifest)))
    n_classes = len(manifest.classes)
    counts = np.bincount(classes, minlength=n_classes)
    seconds = np.zeros(len(manifest)) if manifest.duration is None else manifest.duration
    minutes = np.bincount(classes, weights=seconds[clips], minlength=n_classes) / 60
    pairs = np.unique(np.stack([classes, manifest.group[clips]]), axis=1)
    groups = np.bincount(pairs[0], minlength=n_classes)
    order = np.argsort(-counts, kind="stable").tolist()

    width = min(40, max(map(len, manifest.classes)))
    if not manifest.has_label.all():
        width = max(width, 15)
    lines = [f"{'class':<{width}} {'clips':>7} {'minutes':>8} {'groups':>7}"]
    if n_classes <= MAX_CLASS_LINES - 1:
        shown, hidden = order, []
    else:
        n_top = (MAX_CLASS_LINES - 2) // 2
        shown, hidden = order[:n_top] + order[-n_top:], order[n_top:-n_top]
    for i, c in enumerate(shown):
        if hidden and i == len(shown) // 2:
            lines.append(f"... and {len(hidden)} more, {counts[hidden].min():,} to "
                         f"{counts[hidden].max():,} clips each")
        name = manifest.classes[c]
        name = name if len(name) <= width else name[:width - 3] + "..."
        lines.append(f"{name:<{width}} {counts[c]:>7,} {minutes[c]:>8.1f} {groups[c]:>7,}")
    for name, chosen in (("(none of them)", manifest.is_negative),
                         ("(one is absent)", ~manifest.has_label & ~manifest.is_negative)):
        if chosen.any():
            n_groups = len(np.unique(manifest.group[chosen]))
            lines.append(f"{name:<{width}} {chosen.sum():>7,} {seconds[chosen].sum() / 60:>8.1f} "
                         f"{n_groups:>7,}")
    return lines


def source_lines(manifest: Manifest) -> list[str]:
    """One line for each of label, split, group and time: which column or folder decided it."""
    sources = dict(manifest.sources)
    sources.setdefault("group", manifest.group_source)
    if "split" not in sources and manifest.fold is None:
        sources["split"] = "none given, so a new one is made"
    return [f"{role}: {sources[role]}" for role in ROLES if role in sources]


def warning_lines(manifest: Manifest, by_fold: bool = False) -> list[str]:
    """Warnings about the splits, groups that dominate a class, and uneven classes.

    by_fold: the splits are folds, whose share follows from their number.
    """
    lines = [] if by_fold else _uneven_splits(manifest)
    lines = [*lines, *_dominant_groups(manifest), *_uneven_classes(manifest)]
    return [f"WARNING: {line}" for line in lines]


def _uneven_splits(manifest):
    low, high = SHARE_RANGE
    n = int(manifest.has_label.sum())
    lines = []
    for split in SPLITS[1:]:
        n_split = int(manifest.has_label[manifest.rows(split)].sum())
        if n_split and n >= 20 and not low <= n_split / n <= high:
            n_groups = len(np.unique(manifest.group))
            lines.append(f"{split} has {n_split} of {n} clips, {n_split / n:.1%} where 15% is "
                         f"usual; {plural(n_groups, 'group')} ({manifest.group_source}) stay whole")
    return lines


def _dominant_groups(manifest):
    """Classes of which one group holds most, among those that have several groups."""
    clips, classes = manifest.positives(np.arange(len(manifest)))
    counts = np.bincount(classes, minlength=len(manifest.classes))
    pairs, n = np.unique(np.stack([classes, manifest.group[clips]]), axis=1, return_counts=True)
    found = {}
    for (c, group), n_clips in zip(pairs.T.tolist(), n.tolist()):
        if n_clips > MAX_CLASS_SHARE * counts[c] and counts[c] >= MIN_CLASS_CLIPS:
            row = clips[(classes == c) & (manifest.group[clips] == group)][0]
            found[manifest.classes[c]] = (n_clips, int(counts[c]), manifest.paths[row])
    if not found:
        return []
    names = [f"{name} ({n_clips} of {n_all} clips, e.g. {path})"
             for name, (n_clips, n_all, path) in found.items()]
    return [f"one group ({manifest.group_source}) holds most of a class: {summarize(names, 3)}; "
            "the test says little about other groups"]


def _uneven_classes(manifest):
    counts = manifest.counts()
    counts = counts[counts > 0]
    if len(counts) < 2 or counts.max() <= MAX_UNEVENNESS * counts.min():
        return []
    flags = "--sampler balanced"
    if not manifest.multi_label:
        flags = f"--logit-adjust 1 or {flags}"
    return [f"the largest class has {counts.max():,} clips, the smallest {counts.min():,}; "
            f"{flags} helps rare classes, --min-clips N leaves them out"]
