"""Site and start time of a recording from the file names that field recorders give."""
import re
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import NamedTuple

# 20240501_053000, 20240501T053000, 20240501$053000 (SM3 with GPS), 2024-05-01_05-30-00, and with
# a word between date and time (BirdNET-Pi: 2024-05-01-birdnet-05:30:00).
DATE_TIME = re.compile(
    r"(?<!\d)(\d{4})([-_.]?)(\d\d)\2(\d\d)(?:[-_T $]|-birdnet-)(\d\d)([-_.:]?)(\d\d)\6(\d\d)(?!\d)")
SOUNDTRAP = re.compile(r"(\d+)\.(\d{12})")  # serial number and 240501053000
# Hexadecimal seconds since 1970, by the first AudioMoths. Capitals, so not a hash.
HEXADECIMAL = re.compile(r"[0-9A-F]{8}")
CHANNELS = re.compile(r"[-_ ](0\+1|0)$")  # of a Song Meter; _1 may be the number of a site
# Folders that recorders make on their card, and folders by day: they are no sites.
NO_SITE = re.compile(r"data|audio|wav|flac|recordings?|\d{8}|\d{4}-\d\d-\d\d|card ?[ab]?", re.I)
FIRST_YEAR, LAST_YEAR = 1990, 2099  # a clock that was never set gives 1970 or 1980
FIRST_AUDIOMOTH, LAST_AUDIOMOTH = 2016, 2035


class NamedRecording(NamedTuple):
    """site: of the file name, else of its folder, "" if neither has one. start: None if unknown."""
    site: str
    start: datetime | None


def parse_recorder_name(path: str) -> NamedRecording:
    """Read site and start of a recording from its path, as field recorders name files.

    Known are AudioMoth (`20240501_053000.WAV`, with `T` or a device ID; `5E90A4D4.WAV`), Song Meter
    (`SITE_20240501_053000.wav`, `SITE_0+1_20240501_053000.wav`), BAR (`20240501T053000+1000_REC`),
    SoundTrap (`5146.240501053000.wav`), and other names with a date and time of day to the second.

    The time is as the name has it, without a time zone: recorders use local time or UTC, as set.
    Hexadecimal names are UTC. A date that does not exist gives None.
    """
    path = PurePosixPath(str(path).replace("\\", "/"))
    name = path.name
    stem = name[:-len(path.suffix)] if re.fullmatch(r"\.[A-Za-z]\w*", path.suffix) else name
    prefix, start = "", None
    if match := DATE_TIME.search(stem):
        year, _, month, day, hour, _, minute, second = match.groups()
        start = _date(year, month, day, hour, minute, second)
        prefix = stem[:match.start()]
    elif match := SOUNDTRAP.fullmatch(stem):
        prefix, digits = match.groups()
        start = _date("20" + digits[:2], *re.findall("..", digits[2:]))
    elif HEXADECIMAL.fullmatch(stem) and (path.suffix == ".WAV" or not stem.isdecimal()):
        start = datetime.fromtimestamp(int(stem, 16), UTC).replace(tzinfo=None)
        if not FIRST_AUDIOMOTH <= start.year <= LAST_AUDIOMOTH:
            start = None
    if start is None:
        prefix = ""
    site = CHANNELS.sub("", prefix.rstrip("-_ .")).rstrip("-_ .")
    return NamedRecording(site or _folder_site(path), start)


def _folder_site(path):
    """The nearest folder that may be a site, "" if none."""
    for folder in path.parent.parts[::-1]:
        if folder not in ("/", ".", "..") and not NO_SITE.fullmatch(folder):
            return folder
    return ""


def _date(*fields):
    """Year, month, day, hour, minute and second as text -> datetime, None if there is no such."""
    try:
        date = datetime(*map(int, fields))
    except ValueError:
        return None
    return date if FIRST_YEAR <= date.year <= LAST_YEAR else None
