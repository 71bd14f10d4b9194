"""The report page as text: what it states against the files of the runs, and that it is harmless."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import shlex
import sys
import time
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import safetensors.numpy
from sklearn.metrics import confusion_matrix, recall_score

from fake_runs import METHODS, write_runs
from nola_vision.cli import report
from nola_vision.cli.main import main
from nola_vision.evaluation.predictions import PREDICTIONS_FILE, Predictions, load_predictions
from nola_vision.reports.cell import Cell, cell_of, report_of
from nola_vision.reports.entries import Entry
from nola_vision.reports.entry_predictions import read_entry_predictions
from nola_vision.reports.html import confusions, gallery, section
from nola_vision.reports.html.page import html_page, isolated
from nola_vision.reports.html.runs import runs_view
from nola_vision.runs import store
from nola_vision.runs.record import Row
from nola_vision.runs.thumbnails import THUMBNAILS_FILE, load_thumbnails

NAMES = ["birds", "</script><script>alert(1)</script>", "$x_1$ & co", "a\x1b[31m\u202e", "{{ 7 * 7 }}", "x" * 300]
FEW = tuple(method for method in METHODS if method.name in ("logistic", "lora-r4", "nola"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("page")
    write_runs(folder, NAMES, FEW, side=32)
    write_runs(folder, ["a", "b"], FEW, splits=1, inits=1, images=30, cell="vit-folder.other-5shot-default", side=32)
    found, problems = store.read_rows(folder)
    assert not problems
    return found


class Tags(HTMLParser):
    """A page's tags, what it loads or links to, and its ids."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.links: list[str] = []
        self.ids: Counter[str] = Counter()
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[tag] += 1
        given = {name: value or "" for name, value in attrs}
        assert "style" not in given and not any(name.startswith("on") for name in given), given
        self.links += [given[name] for name in ("src", "href") if name in given]
        self.ids.update([given["id"]] if "id" in given else [])

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_and_loads_nothing(rows: list[Row]) -> None:
    page = html_page(report_of(rows), ["a\x07file is <broken>"])
    tags = Tags(page.text)
    assert tags.found["h1"] == 1 and tags.found["h2"] == 2 + 1 and page.text.count('<section class="cell"') == 2
    assert tags.found["script"] == tags.found["style"] == 1 and max(tags.ids.values()) == 1
    assert all(link.startswith(("data:", "#")) for link in tags.links)
    assert {link[1:] for link in tags.links if link.startswith("#cell")} <= set(tags.ids)
    text = " ".join(tags.text)
    assert "a\\x07file is <broken>" in text and "{{ 7 * 7 }}" in text and "$x_1$ & co" in text
    assert "</script><script>alert(1)</script>" in text and "a\\x1b[31m\\u202e" in text and "x" * 100 not in text
    assert not set(page.text) & set("\x00\x07\x1b\u202e") and len(page.text) < 2**20
    for name in ("style", "script"):  # the policy allows exactly these two
        (content,) = re.findall(rf"<{name}>(.*?)</{name}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name}-src &#39;sha256-{digest}&#39;" in page.text
    assert "default-src &#39;none&#39;" in page.text and "unsafe" not in page.text


def test_one_cell_has_the_pages_title(rows: list[Row]) -> None:
    one = [row for row in rows if "other" in row.cell]
    page = html_page(report_of(one))
    tags = Tags(page.text)
    title = re.search("<title>(.*)</title>", page.text)
    assert title and re.search(r'<h1 id="cell1-title">(.*)</h1>', page.text)[1] == title[1]
    assert tags.found["nav"] == 0 and tags.found["figure"] >= 1 == page.text.count(
        "roken lines: methods on frozen features."
    )


def test_rows_alone_make_a_page(rows: list[Row]) -> None:
    """Without their folders (rows of a database, of a test) only what files hold is missing."""
    page = html_page(report_of([replace(row, folder=None) for row in rows]))
    assert page.images == 0 and "Misclassified images</h" not in page.text and "Every run</h" in page.text
    failed = [replace(row, status="failed", error="out of <memory>", test_accuracy=None) for row in rows]
    page = html_page(report_of(failed))
    assert "Without a completed final run" in page.text and "out of &lt;memory&gt;" in page.text


def view(rows: list[Row], problems: list[str] | None = None) -> section.CellView:
    return section.cell_view(
        cell_of(rows, rows[0].cell), "title", "cell1", gallery.MOST_IMAGE_BYTES, [] if problems is None else problems
    )


def of(rows: list[Row], method: str) -> list[tuple[Row, Predictions]]:
    runs = [row for row in rows if row.method == method and "photos" in row.cell]
    return [(row, load_predictions(row.folder)) for row in runs]


def test_classes_and_confusions_are_those_of_scikit_learn(rows: list[Row]) -> None:
    cell = view([row for row in rows if "photos" in row.cell])
    own, frozen = (
        [np.concatenate([getattr(found, name) for _, found in of(rows, method)]) for name in ("label", "predicted")]
        for method in ("nola", "logistic")
    )
    recall, of_frozen = (100 * recall_score(*pair, average=None) for pair in (own, frozen))
    order = np.argsort(recall, kind="stable")
    assert [line.accuracy for line in cell.classes.shown] == [f"{recall[i]:.1f}" for i in order]
    assert [line.other for line in cell.classes.shown] == [f"{of_frozen[i]:.1f}" for i in order]
    assert [line.at for line in cell.classes.shown] == pytest.approx(recall[order], abs=0.051)
    assert [line.difference.lstrip("+") for line in cell.classes.shown] == [
        f"{recall[i] - of_frozen[i]:.1f}".replace("-0.0", "0.0") for i in order
    ]
    counts = confusion_matrix(*own)
    shares = 100 * counts / counts.sum(axis=1, keepdims=True)
    expected = [
        ["" if not n else f"{s:.0f}" for n, s in zip(*pair, strict=True)] for pair in zip(counts, shares, strict=True)
    ]
    assert [[heat.text for heat in line.cells] for line in cell.confusion.lines] == expected
    np.fill_diagonal(counts, 0)
    assert [int(pair.images) for pair in cell.confusion.pairs] == sorted(counts[counts > 0].tolist(), reverse=True)[:10]


def test_the_gallery_shows_each_image_once_most_confident_first(rows: list[Row]) -> None:
    cell = view([row for row in rows if "photos" in row.cell])
    best: dict[int, float] = {}
    wrong: Counter[int] = Counter()
    for row, found in of(rows, "nola"):
        thumbnails = load_thumbnails(row.folder)
        for index, probability in zip(
            found.index[~found.correct].tolist(), found.probability[~found.correct], strict=True
        ):
            wrong[index] += 1
            if index in thumbnails:
                best[index] = max(best.get(index, 0), float(probability))
    order = sorted(best, key=lambda index: -best[index])[:24]
    assert [photo.probability for photo in cell.gallery.photos] == [f"{100 * best[index]:.0f} %" for index in order]
    assert [photo.runs for photo in cell.gallery.photos] == [
        f"misclassified in {wrong[index]} of 4 runs" for index in order
    ]
    assert "not calibrated" in cell.gallery.note and f"of the {len(wrong)} images" in cell.gallery.note
    size = sum(len(photo.source) for photo in cell.gallery.photos[:3])
    small = gallery.gallery_view(read_entry_predictions(*_nola(rows), []), size, [])
    assert 0 < sum(len(photo.source) for photo in small.photos) <= size and len(small.photos) <= 4


def _nola(rows: list[Row]) -> Entry:
    cell = Cell("cell", [row for row in rows if "photos" in row.cell])
    assert cell.subject is not None and cell.subject.summary.method == "nola"
    return cell.subject


def test_probabilities_are_calibrated_where_every_run_has_a_temperature(rows: list[Row]) -> None:
    own = [replace(row, temperature=2.5) for row in rows if "photos" in row.cell]
    assert "Probabilities are calibrated." in view(own).gallery.note
    own = [replace(row, temperature=None) if (row.split, row.init) == (1, 1) else row for row in own]
    assert "Probabilities are not calibrated." in view(own).gallery.note


def test_classes_are_compared_on_shared_splits(rows: list[Row]) -> None:
    own = [row for row in rows if "photos" in row.cell and (row.method != "logistic" or row.split == 0)]
    classes = view(own).classes
    assert classes.note == "Over 2 of the 4 runs of nola and the run of logistic."
    parts = [found for row, found in of(own, "nola") if row.split == 0]
    label, predicted = (np.concatenate([getattr(part, name) for part in parts]) for name in ("label", "predicted"))
    recall = 100 * recall_score(label, predicted, average=None)
    assert [line.accuracy for line in classes.shown] == [f"{value:.1f}" for value in sorted(recall)]
    other = [replace(row, split=7) if row.method == "logistic" else row for row in own]
    assert view(other).classes.other is None and "the 4 runs of nola" in view(other).classes.note


def test_a_share_under_half_a_per_cent_is_not_none(rows: list[Row]) -> None:
    tested = read_entry_predictions(*_nola(rows), [])
    tested.__dict__["counts"] = np.array([[996, 4], [0, 5]])
    assert confusions.heat(tested, 0, 1) == confusions.Heat("<1", 1, False) and confusions.heat(tested, 1, 0).text == ""


def test_what_a_row_may_not_cost(tmp_path: Path) -> None:
    """A row of very many classes, and the folder that the runs are in."""
    write_runs(tmp_path / "secret" / "runs", NAMES, FEW[-1:], splits=1, inits=1, side=16)
    folder = tmp_path / "secret" / "runs"
    (row,) = store.read_rows(folder)[0]
    many = replace(row, data={**row.data, "class_names": [str(i) for i in range(100_000)]})
    page = html_page(report_of([many]), [f"{row.folder}/x is damaged"], folders=[folder])
    assert "has 100,000 classes" in page.text and f"{row.cell}/nola/{row.folder.name}/x is damaged" in page.text
    assert "secret" not in page.text and page.images == 0


def test_damaged_files_are_one_line_each_and_the_page_is_whole(tmp_path: Path) -> None:
    write_runs(tmp_path, NAMES, FEW, side=32)
    rows, _ = store.read_rows(tmp_path)
    own = [row.folder for row in rows if row.method == "nola"]
    (own[0] / PREDICTIONS_FILE).write_bytes(b"garbage")
    (own[1] / THUMBNAILS_FILE).write_bytes(safetensors.numpy.save({"0 x": np.zeros(9, np.uint8)}))
    (own[2] / THUMBNAILS_FILE).unlink()
    os.mkfifo(own[2] / THUMBNAILS_FILE)
    (own[3] / THUMBNAILS_FILE).unlink()
    problems: list[str] = []
    cell = view(rows, problems)
    assert [str(own[i]) in problem for i, problem in zip((0, 1, 2), problems, strict=True)] == [True] * 3
    assert cell.gallery is None and cell.classes and "3 of the 4 runs" in cell.classes.note
    assert html_page(report_of(rows)).text.count("<h2>Left out</h2>") == 1
    # the first run has other classes than most
    odd = [replace(row, data=row.data | {"class_names": NAMES[::-1]}) if row.folder == own[0] else row for row in rows]
    assert view(odd, problems := []).classes and f"{own[0]} has other classes than most runs of nola" in problems[0]


def test_many_classes_are_behind_a_fold(tmp_path: Path) -> None:
    write_runs(tmp_path, [f"class {i}" for i in range(60)], FEW, splits=1, inits=1, images=5, side=16)
    cell = view(store.read_rows(tmp_path)[0])
    assert (len(cell.classes.shown), len(cell.classes.rest)) == (20, 40)
    assert len(cell.confusion.lines) == 20 and len(cell.confusion.pairs) == 10
    shown = {line.name for line in cell.confusion.lines}
    assert all({pair.true, pair.predicted} <= shown for pair in cell.confusion.pairs)


def test_names_of_other_scripts_and_long_ones(tmp_path: Path) -> None:
    names = ["خيل", "שלום עולם", *(f"a class whose long name ends in {end}" for end in ("left", "right", "<b>"))]
    names += [f"/photographs/of/the/year/{end}" for end in ("2021", "2022")]
    write_runs(tmp_path, names, FEW, splits=1, inits=2, side=16)
    rows = store.read_rows(tmp_path)[0]
    lines = view(rows).confusion.lines
    assert [line.name for line in lines] == names and len({line.label for line in lines}) == len(names)
    ends = ("left", "right", "<b>", "2021", "2022")
    assert all(line.label.endswith(end) and len(line.label) < 22 for line, end in zip(lines[2:], ends, strict=True))
    page = html_page(report_of(rows)).text
    assert f'title="{names[2]}"' in page and f"<bdi>{lines[2].label}</bdi>" in page
    outside = re.sub("<bdi>.*?</bdi>|<title.*?</title>|<svg.*?</svg>|<[^>]*>", "", page, flags=re.DOTALL)
    assert "خيل" in page and not re.search("[\u0590-\u06ff]", outside)
    assert isolated("'خيل' <2>, שלום עולם, 3") == "&#39;<bdi>خيل</bdi>&#39; &lt;2&gt;, <bdi>שלום עולם</bdi>, 3"


def test_the_command(rows: list[Row], tmp_path: Path, monkeypatch, capsys) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or bool(len(opened) % 2))
    write_runs(tmp_path / "runs", ["a", "b"], FEW, splits=1, inits=1, side=16)
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "runs" / "report.html"
    assert main(["report", "--open"]) == 0
    said = capsys.readouterr()
    assert opened == [page.as_uri()] and page.read_text().startswith("<!doctype html>")
    images = page.read_text().count("data:image/jpeg")
    assert (
        f"runs/report.html: 1 cell, 3 runs; {images} images of the data are in it (--no-images leaves them out)"
        in said.err
    )
    assert images and "no browser was found" not in said.err and "nola" in said.out
    assert main(["report", "runs", "--open", "--html", "p.html", "--no-images"]) == 0
    said = capsys.readouterr()
    assert opened[1] == (tmp_path / "p.html").as_uri() and "data:image/jpeg" not in Path("p.html").read_text()
    assert "no image is in it" in said.err and "no browser was found: open p.html" in said.err
    for asked, problem in {
        ("--html", "no/p.html"): "cannot be written",
        ("--html", "runs/row.json"): "--html 'runs/row.json' is not a page's name: it must end in .html",
        ("--html", "p.html", "--out", "./p.html"): "--out './p.html' is the page's file",
    }.items():
        assert main(["report", "runs", *asked]) == 2
        assert problem in capsys.readouterr().err

    def slow(address: str) -> bool:
        assert "nola" in capsys.readouterr().out  # the tables come first
        time.sleep(60)
        return True

    monkeypatch.setattr("webbrowser.open", slow)
    monkeypatch.setattr(report, "_BROWSER_SECONDS", 0.2)
    assert main(["report", "--open"]) == 0 and capsys.readouterr() == ("", ANY)
    monkeypatch.setattr("webbrowser.open", lambda address: shlex.split("'"))
    assert main(["report", "--open"]) == 0 and "no browser was found" in capsys.readouterr().err
    with monkeypatch.context() as ascii_only:
        ascii_only.setattr("sys.stdout", io.TextIOWrapper(printed := io.BytesIO(), "ascii"))
        assert main(["report"]) == 0
        sys.stdout.flush()
        assert b"+----" in printed.getvalue() and b"\\u25" not in printed.getvalue()


def test_a_run_in_two_folders_counts_once_and_the_title_states_what_there_is(rows: list[Row]) -> None:
    own = [row for row in rows if "photos" in row.cell]
    page = html_page(report_of([*own, *(replace(row, folder=None) for row in own)]))
    assert page.runs == len(own) and f"<summary>{len(own)} runs: {len(own)} completed</summary>" in page.text
    method = {"class_path": "LoRA", "init_args": {"lr": 0.005, "c": 8.0}}
    config = {**own[0].config, "model": {"method": method}}
    view = runs_view([replace(own[0], learning_rate=0.005, config=config)])
    texts = dict(zip([column.name for column in view.columns], view.lines[0].texts, strict=True))
    assert (texts["lr"], texts["c"]) == ("0.005", "8")
    others = [replace(own[0], status="failed"), replace(own[1], stage="search"), replace(own[2], stage="search")]
    page = html_page(report_of(others))
    assert "<h1>No completed final run: " in page.text and page.cells == 0
    assert "2 search runs completed" in page.text and "1 final run failed" in page.text
