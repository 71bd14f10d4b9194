"""A run's confusion matrix, as text and back, and what is worked out from it."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nola_vision.common.errors import NolaVisionError
from nola_vision.evaluation.confusion import confusion_csv
from nola_vision.reports.confusion import class_accuracy, class_differences, read_confusion


def test_the_text_keeps_order_names_and_counts(tmp_path: Path) -> None:
    """Names that look like numbers or like nothing, and a class that no image is of or taken for."""
    names = ["10", "9", "nan", 'a "b", c', ""]
    counts = np.random.default_rng(0).integers(0, 3, (5, 5))
    counts[2] = counts[:, 2] = 0
    path = tmp_path / "confusion.csv"
    path.write_text(confusion_csv(counts, names), encoding="utf-8")
    read = read_confusion(path)
    assert list(read.index) == list(read.columns) == names
    assert (read.to_numpy() == counts).all()
    path.write_text(confusion_csv(counts, ["crane", "owl", "crane", "a", "b"]), encoding="utf-8")
    assert list(read_confusion(path).index) == ["crane (0)", "owl", "crane (2)", "a", "b"]
    path.write_text(confusion_csv(counts, ["crane", "crane", "crane (0)", "=cmd()", "caf\udce9\n"]), encoding="utf-8")
    expected = ["crane (0)", "crane (1)", "crane (0) (2)", "'=cmd() (3)", "caf\\xe9\\n (4)"]
    assert list(read_confusion(path).index) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "true,predicted\na,a\n",
        "true,predicted,count\na,a,many\n",
        "true,predicted,count\na,a,1\na,a,2\n",
        "true,predicted,count\na,a,-1\n",
        "true,predicted,count\na,a,1.5\n",
        "true,predicted,count\na,a,1e300\n",
        "true,predicted,count\na,a,9223372036854775807\n",
        "true,predicted,count\na,a,\n",
        "true,predicted,count\na,a,1,2\n",
        "true,predicted,count\na,b,1\n",
        "true,predicted,count" + "," * 100_000,
        "true,predicted,count\n" + "".join(f"{i},{i},1\n" for i in range(2001)),  # 32 MB as a matrix
        "true,predicted,count\n\udcff,\udcff,1\n",
    ],
    ids=lambda text: text[-20:].encode("unicode_escape").decode(),
)
def test_other_texts_are_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "confusion.csv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(NolaVisionError, match="is not a confusion matrix: delete it"):
        read_confusion(tmp_path / "confusion.csv")


def test_class_accuracies_by_hand() -> None:
    a = pd.DataFrame([[3, 1, 0], [0, 0, 0], [1, 1, 2]], index=list("xyz"), columns=list("xyz"))
    b = pd.DataFrame([[4, 0, 0], [0, 0, 0], [0, 3, 1]], index=list("xyz"), columns=list("xyz"))
    assert class_accuracy(a).tolist() == pytest.approx([75, np.nan, 50], nan_ok=True)
    found = class_differences({"a": {0: a, 1: b, 2: a}, "b": {0: b, 2: b, 3: a}, "c": {3: a}}, than="a")
    assert list(found) == ["b"] and found["b"][0] == 2
    assert found["b"][1].tolist() == pytest.approx([25, np.nan, -25], nan_ok=True)
