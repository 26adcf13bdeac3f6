"""The input of a batch: what each format means, and every mistake told with its line before anything is done."""

from __future__ import annotations

import json

import pytest

import tilewise
from tilewise.pipelines.batch.input import InputError, read_input, read_rows
from tilewise.pipelines.generation.settings import MAX_PROMPT


def rows_of(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(row.line, row.fields) for row in read_rows(path)]


def refusal(tmp_path, name, content) -> str:
    with pytest.raises(InputError) as caught:
        rows_of(tmp_path, name, content)
    assert name in str(caught.value)
    return str(caught.value)


def test_txt(tmp_path):
    content = "\ufeff# a comment\n\na red circle, moving\r\n  円 é \n#x\nlast"
    assert rows_of(tmp_path, "a.txt", content) == [
        (3, {"prompt": "a red circle, moving"}),
        (4, {"prompt": "円 é"}),
        (6, {"prompt": "last"}),
    ]


def test_csv_cells_have_their_types_and_empty_ones_are_not_given(tmp_path):
    content = 'id,prompt,steps,density,window\na,"one, two",3,0.5,\n\nb,"two\nlines",,,"1,2,3"\n,plain,,,\n'
    assert rows_of(tmp_path, "a.CSV", content) == [
        (2, {"id": "a", "prompt": "one, two", "steps": 3, "density": 0.5}),
        (4, {"id": "b", "prompt": "two\nlines", "window": "1,2,3"}),
        (6, {"prompt": "plain"}),
    ]


def test_jsonl(tmp_path):
    method = tilewise.presets()["sta-fast"].to_dict()
    lines = [
        {"prompt": "x", "id": 7, "window": [1, 2, 3], "seed": 2**62, "guidance": None},
        {"prompt": "y", "method": method, "fps": 8, "dtype": "float32", "negative": ""},
    ]
    assert rows_of(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n") == [
        (1, {"prompt": "x", "id": "7", "window": "1,2,3", "seed": 2**62}),
        (2, {"prompt": "y", "method": method, "fps": 8, "dtype": "float32", "negative": ""}),
    ]


def test_all_mistakes_are_told_at_once(tmp_path):
    lines = [
        '{"prompt": "fine"}',
        '{"prompt": "x", "sede": 1}',
        '{"prompt": ',
        "[1]",
        '{"seed": 1}',
        '{"prompt": "x", "steps": "3"}',
        '{"prompt": "x", "steps": true, "density": "much"}',
        '{"prompt": " "}',
        '{"prompt": "x", "seed": 1, "seed": 2}',
        '{"prompt": "x", "guidance": NaN}',
        '{"prompt": "x", "out": "/etc/passwd"}',
        '{"prompt": "x", "device": "cpu"}',
        '{"prompt": 5}',
        '{"prompt": "x", "window": [1, true, 2]}',
        '{"prompt": "x", "id": ""}',
        '{"id": "same", "prompt": "x"}',
        '{"id": "same", "prompt": "x"}',
        "[" * 100_000,
    ]
    told = refusal(tmp_path, "a.jsonl", "\n".join(lines))
    for line, words in {
        2: "unknown field 'sede'. Did you mean 'seed'?",
        3: "malformed JSON",
        4: "a JSON object",
        5: "there is no prompt",
        6: "steps must be a whole number, not '3'",
        8: "the prompt is empty",
        9: "'seed' is given twice",
        10: "NaN is no number",
        11: "'out' is for the whole batch: give --out",
        12: "give --device",
        13: "prompt must be text",
        14: "window must be",
        15: "an id has 1 to",
        17: "the id 'same' is taken by line 16",
        18: "malformed JSON",
    }.items():
        assert any(row.startswith(f"  line {line}: ") and words in row for row in told.splitlines()), (line, told)
    assert told.count("line 7:") == 2
    assert "line 1:" not in told


def test_the_same_mistake_is_told_once(tmp_path):
    told = refusal(tmp_path, "a.jsonl", '{"prompt": "x", "sede": 1}\n' * 1000)
    assert told.count("sede") == 1
    assert "lines 1, 2, 3" in told
    assert "and 990 more" in told
    assert len(told) < 1000


def test_what_is_not_utf8_is_told_by_line(tmp_path):
    told = refusal(tmp_path, "a.txt", b"one\ncaf\xe9\nthree\n\xff\xfe")
    assert "line 2: not UTF-8 (byte 0xe9 at position 4)" in told
    assert "line 4: not UTF-8 (byte 0xff at position 1)" in told


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_a_prompt_of_ten_megabytes_is_told_by_its_size(tmp_path, name):
    long = "word " * 2_000_000
    content = {"a.txt": long, "a.csv": f"prompt\n{long}\n", "a.jsonl": json.dumps({"prompt": long})}[name]
    told = refusal(tmp_path, name, content)
    assert "line 2" in told if name == "a.csv" else "line 1" in told
    assert "limit" in told if name == "a.csv" else f"at most {MAX_PROMPT:,}" in told
    assert len(told) < 500


@pytest.mark.parametrize("content", ["", "\n\n", "# only a comment\n"])
def test_no_prompts(tmp_path, content):
    assert "holds no prompts" in refusal(tmp_path, "a.txt", content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("propmt\nx\n", "'propmt'. Did you mean 'prompt'"),
        ("id,seed\n1,2\n", "no column 'prompt'"),
        ("prompt,prompt\na,b\n", "names 'prompt' twice"),
        ("prompt,seed\nx,1\ny\nz,1,2\n", "lines 3"),
        ("prompt;seed\nx;1;2\n", "3 cells where the header has 2, separated by ';'"),
        ("prompts;seed\nx;1\n", "cells are separated by one of , ; a tab |"),
        ("prompt,seed\nx,one\n", "seed must be a whole number, not 'one'"),
        ("prompt,seed\nx,1.5\n", "seed must be a whole number, not '1.5'"),
        ('prompt,seed\n"x,1\n', "line 2: malformed CSV"),
        ("prompt,seed\n,1\n", "line 2: there is no prompt"),
    ],
)
def test_bad_csv(tmp_path, content, words):
    told = refusal(tmp_path, "a.csv", content)
    assert words.replace("lines 3", "line 3: 1 cells where the header has 2") in told


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_of_any_delimiter(tmp_path, delimiter):
    content = f'"prompt"{delimiter}set.recall{delimiter}set.density\n"a; b, c|d\te"{delimiter}0.9{delimiter}\n'
    assert rows_of(tmp_path, "a.csv", content) == [(2, {"prompt": "a; b, c|d\te", "set.recall": "0.9"})]


def test_all_malformed_lines_of_a_table_are_told_at_once(tmp_path):
    content = 'prompt,seed\nfine,1\n"x"y,2\nfine,3\n"open,4\nfine,5,6\nfine,two\n'
    told = refusal(tmp_path, "a.csv", content)
    for line, words in {3: "malformed CSV", 5: "malformed CSV", 6: "3 cells", 7: "seed must be"}.items():
        assert any(row.startswith(f"  line {line}: ") and words in row for row in told.splitlines()), (line, told)
    assert len(told.splitlines()) == 5
    rows, problems = read_input(tmp_path / "a.csv")
    assert [(row.line, row.fields["seed"]) for row in rows] == [(2, 1), (4, 3)]
    assert len(problems.found) >= 3


def test_rows_below_a_header_with_an_unknown_field_are_told_too(tmp_path):
    told = refusal(tmp_path, "a.csv", "prompt,seed,sede\nfine,1,2\nfine,two,\nfine,3\n")
    lines = {1: "unknown field 'sede'. Did you mean 'seed'?", 3: "seed must be a whole number", 4: "2 cells where"}
    assert all(f"  line {line}: {words}" in told for line, words in lines.items()) and len(told.splitlines()) == 4


def test_a_table_that_is_malformed_throughout_is_read_in_no_time(tmp_path):
    told = refusal(tmp_path, "a.csv", "prompt\n" + '"x"y\n' * 20_000)
    assert "and 40 more" in told


def test_files_that_cannot_be_read(tmp_path):
    for name, words in {"a.yaml": r"\.txt, \.csv, \.jsonl", "a": "suffix", "absent.txt": "No such file"}.items():
        with pytest.raises(tilewise.ConfigError, match=words):
            read_rows(tmp_path / name)
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(tilewise.ConfigError, match="directory"):
        read_rows(tmp_path / "folder.txt")
