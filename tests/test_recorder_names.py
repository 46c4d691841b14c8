"""Site and time in the file names of field recorders, each form as its maker documents it."""
from datetime import datetime

import pytest

from data.recorder_names import parse_recorder_name

MAY = datetime(2024, 5, 1, 5, 30)


@pytest.mark.parametrize("path, site, start", [
    # AudioMoth
    ("20240501_053000.WAV", "", MAY),
    ("plot7/20240501_053000.WAV", "plot7", MAY),
    ("plot7/20240501/20240501_053000.WAV", "plot7", MAY),  # daily folders
    ("plot7/Data/20240501_053000.WAV", "plot7", MAY),
    ("plot7/20240501_053000T.WAV", "plot7", MAY),  # triggered
    ("24F31901603CC8B6_20240501_053000.WAV", "24F31901603CC8B6", MAY),  # with device ID
    ("plot7/5E90A4D4.WAV", "plot7", datetime(2020, 4, 10, 16, 54, 44)),
    ("plot7/5E90A4D4.flac", "plot7", datetime(2020, 4, 10, 16, 54, 44)),
    ("58912345.WAV", "", datetime(2017, 1, 31, 23, 52, 37)),
    # Song Meter
    ("SITE_20240501_053000.wav", "SITE", MAY),
    ("card/Data/SITE_20240501_053000.wav", "SITE", MAY),
    ("SM4-01_0+1_20240501_053000.wav", "SM4-01", MAY),
    ("SM4-01_0_20240501_053000.wav", "SM4-01", MAY),
    ("PLOT_1_20240501_053000.wav", "PLOT_1", MAY),  # another site than PLOT_2
    ("ARIZONA-1_20161023$195550.wac", "ARIZONA-1", datetime(2016, 10, 23, 19, 55, 50)),
    ("S4U09523_20240501_053000_000.wav", "S4U09523", MAY),  # a part of a longer recording
    ("2MM01234_20240501_053000_123456.wav", "2MM01234", MAY),  # microseconds
    # Others
    ("20240501T053000+1000_REC.flac", "", MAY),  # BAR
    ("dry_A/20240501T053000+1000_REC_[-27.3+152.7].flac", "dry_A", MAY),
    ("5146.240501053000.wav", "5146", MAY),  # SoundTrap
    ("ICLISTENHF1251_20130101T000000.000Z.wav", "ICLISTENHF1251", datetime(2013, 1, 1)),
    ("S1089_20240501_053000Z.wav", "S1089", MAY),
    ("Turdus_merula-95-2024-05-01-birdnet-05:30:00.mp3", "Turdus_merula-95", MAY),
    ("2024-05-01_05-30-00.wav", "", MAY),
    ("north ridge 20240501 053000.wav", "north ridge", MAY),
    ("C:\\audio\\plot7\\20240501_053000.WAV", "plot7", MAY),
    ("SITE_20240501_053000", "SITE", MAY),  # without suffix
    ("20191219_123300.WAV", "", datetime(2019, 12, 19, 12, 33)),
    ("5DFB6DFC.WAV", "", datetime(2019, 12, 19, 12, 33)),  # the same second in hexadecimal
])
def test_names_of_recorders(path, site, start):
    assert parse_recorder_name(path) == (site, start)


@pytest.mark.parametrize("path, site", [
    ("class_a/blackbird 3.wav", "class_a"),
    ("XC123456.mp3", ""),
    ("plot7/1-100032-A-0.wav", "plot7"),
    ("plot7/20241350_053000.wav", "plot7"),  # month 13
    ("plot7/20240501_250000.wav", "plot7"),  # hour 25
    ("plot7/19700101_000000.WAV", "plot7"),  # the clock was never set
    ("plot7/20240501.wav", "plot7"),  # a day without a time
    ("plot7/20240501_0530.wav", "plot7"),  # may be a number
    ("plot7/120240501_053000.wav", "plot7"),
    ("plot7/20240501_0530001.wav", "plot7"),
    ("5e90a4d4.wav", ""),  # a hash
    ("5E90A4D4A.WAV", ""),
    ("10160435.wav", ""),  # Batlogger: device and number
    ("58912345.wav", ""),
    ("FFFFFFFF.WAV", ""),
    ("4E90A4D4.WAV", ""),  # 2011: before there were AudioMoths
    ("plot7/2024-0501_053000.wav", "plot7"),
    ("plot7/X_20240230_053000.wav", "plot7"),  # 30 February
    ("/data/audio.wav", ""),
    ("", ""),
])
def test_names_without_a_time(path, site):
    assert parse_recorder_name(path) == (site, None)


def test_sites_and_days_of_a_deployment():
    names = [f"{site}/Data/{site}_0+1_202405{day:02}_{hour:02}0000.wav"
             for site in ("N1", "N2") for day in (1, 2, 3) for hour in (4, 5, 22)]
    parsed = [parse_recorder_name(name) for name in names]
    assert len({(row.site, row.start.date()) for row in parsed}) == 6
    assert {row.start.hour for row in parsed} == {4, 5, 22}
