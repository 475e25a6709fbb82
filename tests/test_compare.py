"""Runs side by side: what is read of them, and what the table says."""

import json

import numpy as np
import pytest
from PIL import Image

import cli
from analysis import compare


@pytest.fixture
def runs(tmp_path):
    """Ours with metrics, of which the last line is cut; ours with a log alone; one of DiT's."""
    one, two, dit = (tmp_path / name for name in ("000-one", "001-two", "dit"))
    for folder in (one, two, dit):
        folder.mkdir()
    rows = [{"step": 10 * i, "loss": 1 / i, "load_cv": [0.1 * i, 0.3 * i]} for i in range(1, 9)]
    rows.insert(4, {"step": 40, "metrics/fid": 7.5})
    (one / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 90, "lo')
    lines = [
        f"2026-01-01 00:00:00 step {10 * i}/50  loss {i:.4f}  balance 1.005  load max 1.12  entropy 0.71"
        f"  aligned -0.250  grad 0.254  lr 4.00e-03  472.9 img/s  data 23%  mem 0.9 GB\n"
        for i in range(1, 6)
    ]
    (two / "log.txt").write_text("started\n" + "".join(lines))
    (dit / "log.txt").write_text("[time] (step=0000050) Train Loss: 0.1700, Train Steps/Sec: 1.23\n")
    return [one, two, dit]


def run(*words) -> None:
    compare.main(compare.get_parser().parse_args(list(map(str, words))))


def test_runs_are_compared_at_the_last_step_that_all_have(runs, tmp_path, capsys):
    run(*runs, "--average", 2, "--output", tmp_path / "x.png")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[:5]]
    names = ("loss", "balance_loss", "alignment", "grad_norm", "images_per_second", "metrics/fid")
    assert rows[0] == ["run", "last step", *(f"{name} at 50" for name in names)]
    assert rows[2] == ["000-one", "80", f"{(1 / 4 + 1 / 5) / 2:.5g}", "", "", "", "", "7.5"]
    assert rows[3] == ["001-two", "50", "4.5", "1.005", "-0.25", "0.254", "472.9", ""]
    assert rows[4] == ["dit", "50", "0.17", "", "", "", "", ""]
    assert np.asarray(Image.open(tmp_path / "x.png")).std() > 1


def test_what_is_asked_for_and_runs_of_one_name(runs, tmp_path, capsys):
    run(runs[0], runs[0], "--of", "load_cv", "--average", 1, "--output", tmp_path / "x.pdf")
    out = capsys.readouterr().out
    assert "| 000-one (1) | 80 | 1.6 |" in out and "| 000-one (2) | 80 | 1.6 |" in out  # the mean over layers
    assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")


def test_means_of_the_last_lines():
    values = np.array([1.0, 2.0, 6.0, 3.0])
    assert compare.averaged(values, 2).tolist() == [1.0, 1.5, 4.0, 4.5]
    assert compare.averaged(values, 9).tolist() == [1.0, 1.5, 3.0, 3.0]


def test_wrong_runs_get_one_line(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "log.txt").write_text("nothing yet\n")
    for words, message in {
        (tmp_path / "nowhere",): "nowhere cannot be read: No such file",
        (tmp_path / "empty",): "is no run: it has neither metrics.jsonl nor log.txt",
        (tmp_path / "log.txt",): "has no line of a training step",
        (runs[0], "--of", "los"): "unknown quantity 'los'; did you mean loss",
        (runs[0], "--output", "x.gif"): "expected a name that ends with .png",
    }.items():
        with pytest.raises(cli.UsageError, match=message):
            run(*words)
