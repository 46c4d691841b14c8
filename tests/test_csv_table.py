"""Tables as people save them: comments, quotes, encodings, no header."""
import pytest
from recordings import assert_not_loaded, label_of, touch, write_table

from data.csv_table import column_name, read_table
from data.load import load_manifest

ABCD = ["a.wav", "b.wav", "c.wav", "d.wav"]


@pytest.mark.parametrize("text", [
    "sep=;\r\npath;label\r\na.wav;x\r\nb.wav;y\r\n",
    '"sep=,"\npath,label\na.wav,x\nb.wav,y\n',
    "# made by hand\n#, 2024, v1\npath,label\na.wav,x\nb.wav,y\n",
    "# path,label\na.wav,x\nb.wav,y\n",
    "path|label\na.wav|x\nb.wav|y\n",
])
def test_lines_above_the_header(tmp_path, text):
    touch(tmp_path, *ABCD[:2])
    assert label_of(load_manifest(write_table(tmp_path, text))) == {"a.wav": "x", "b.wav": "y"}


def test_numbers_of_rows_count_the_lines_above_the_header(tmp_path):
    table = read_table(write_table(tmp_path, "# one\n# two\npath,label\na.wav,x\nb.wav,y\n"))
    assert table.numbers == [4, 5]
    tabs = read_table(write_table(tmp_path, "# one\npath\tlabel\na.wav\tx\n\nb.wav\ty\n"))
    assert tabs.numbers == [3, 5]


def test_header_of_audioset_is_its_last_comment(tmp_path):
    touch(tmp_path, "abc.wav", "-d e.wav")
    table = write_table(tmp_path, (
        "# Segments csv created Sun Mar 5 2017\n# num_ytids=2, num_segs=2\n"
        "# YTID, start_seconds, end_seconds, positive_labels\n"
        'abc, 30.000, 40.000, "/m/09x0r,/t/dd00088"\n-d e, 0.000, 10.000, "/m/09x0r"\n'))
    manifest = load_manifest(table)
    assert manifest.paths == ["-d e.wav", "abc.wav"]
    assert manifest.start.tolist() == [0, 30] and manifest.end.tolist() == [10, 40]
    assert manifest.label_text(1) == "/m/09x0r; /t/dd00088"


def test_quotes_within_a_table_with_tabs_are_ordinary(tmp_path):
    touch(tmp_path, *ABCD)
    table = write_table(tmp_path, (
        'path\tsentence\tlabel\na.wav\t"Hello, he said\tx\nb.wav\tsaid "x\ty\n'
        'c.wav\t"a ""quoted"" one"\t"x"\nd.wav\t"tab\tinside"\ty\n'), "c.tsv")
    assert label_of(load_manifest(table)) == {
        "a.wav": "x", "b.wav": "y", "c.wav": "x", "d.wav": "y"}
    assert read_table(table).rows[2][1] == 'a "quoted" one'


@pytest.mark.parametrize("text, row", [
    ('path,label\na.wav,"x\nb.wav,y\nc.wav,x\n', 2),  # never closed
    ('path,label\na.wav,x\nb.wav,"y\nc.wav,x"\nd.wav,y\n', 3),  # closed two lines later
    ('path,label\na.wav,x\nb.wav,y\nc.wav,"x"z\nd.wav,y\n', 4),
    ('path,label\na.wav,"x\nb.wav,"y\nc.wav,x\n', 2),
])
def test_a_stray_quote_is_named_with_its_row(tmp_path, text, row):
    touch(tmp_path, *ABCD)
    assert_not_loaded(f"clips.csv row {row}: a quote", "remove it", write_table(tmp_path, text))


def test_quotes_that_are_fine(tmp_path):
    touch(tmp_path, *ABCD[:3])
    text = 'path,label\na.wav,5" pipe\n"b.wav","say ""x"", y"\nc.wav,"two\nlines"\n'
    assert load_manifest(write_table(tmp_path, text)).classes == [
        '5" pipe', 'say "x", y', "two\\nlines"]
    text = '"path" ,"label"  \n"a.wav" , "x"\n"b.wav" ,"y, z"\n'
    assert load_manifest(write_table(tmp_path, text)).classes == ["x", "y, z"]


def test_encodings_other_than_western_ones_are_refused(tmp_path):
    touch(tmp_path, *ABCD[:2])
    for encoding, name in (("cp1251", "Синица"), ("shift-jis", "カッコウ"), ("gbk", "杜鹃鸟")):
        (tmp_path / "c.csv").write_bytes(f"path,label\na.wav,{name}\nb.wav,y\n".encode(encoding))
        assert_not_loaded("c.csv: label", "in UTF-8", tmp_path / "c.csv")
    (tmp_path / "c.csv").write_text("path,label\na.wav,Синица\nb.wav,杜鹃鸟\n", encoding="utf-8")
    assert load_manifest(tmp_path / "c.csv").classes == ["Синица", "杜鹃鸟"]


def test_a_table_without_header_is_refused(tmp_path):
    touch(tmp_path, *ABCD)
    assert_not_loaded("has no header: its first line is a clip (a.wav)", "path,label",
                      write_table(tmp_path, "a.wav,x\nb.wav,y\nc.wav,x\n"))


@pytest.mark.parametrize("text, name", [
    ("Begin Time (s)", "begin_time_s"), ("beginTime", "begin_time"), (" File-Name ", "file_name"),
    ("secondary.labels", "secondary_labels"), ("fsID", "fsid"), ("AUTO ID*", "auto_id")])
def test_column_name(text, name):
    assert column_name(text) == name
