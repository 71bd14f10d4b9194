"""What a `fit` showed, in plain sentences: the adapter's accuracy, against frozen features, and what it confuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from nola_vision.predictions import Predictions
from nola_vision.results.estimates import Estimate, compare, wilson
from nola_vision.results.row import Row
from nola_vision.text import printable, shortened

Tested = tuple[Row, Predictions | None]
_MOST_NAMES = 3  # in one sentence
_MOST_CHARACTERS = 40  # of a name


@dataclass(frozen=True)
class _Accuracy:
    """A method's accuracy, a fraction, with its interval and how it was obtained."""

    correct: int
    images: int
    low: float
    high: float
    estimate: Estimate | None

    @property
    def value(self) -> float:
        return self.correct / self.images


def verdict(
    adapter: Tested | None, frozen: Sequence[Tested], class_names: Sequence[str], commands: Sequence[str] = ()
) -> list[str]:
    """The sentences to print after a `fit`, most important first.

    Args:
        adapter: the row of the adapter's final run and its predictions: of the test set, or of all folds of the first
            repeat. None if only frozen-feature methods were run.
        frozen: the same of each frozen-feature method.
        class_names: in the order of the labels.
        commands: what to type next, one line each.

    Raises:
        ValueError: a row's estimate is damaged, or predictions of two methods are of different data.
    """
    lines = []
    accuracies = [(row, predictions, found) for row, predictions in frozen if (found := _accuracy(row, predictions))]
    best = max(accuracies, key=lambda item: (item[2].value, _mean(item[2])), default=None)
    own = None if adapter is None else _accuracy(*adapter)
    if adapter is not None:
        row = adapter[0]
        if own is None:
            reason = "it was not tested" if row.status == "completed" else f"its run {_ended(row)}"
            lines.append(f"{_name(row.method)} has no estimate of its accuracy: {reason}.")
        else:
            lines += [_accuracy_line(row, own), *_chance_line(row, own)]
    if best is not None:
        row, predictions, found = best
        title = "Frozen features"
        if len(accuracies) > 1:
            title = f"Best of {len(accuracies)} frozen-feature methods (an optimistic choice)"
        lines.append(f"{title}: {_name(row.method)}, {100 * found.value:.1f} % ({_between(found)}).")
        lines += _chance_line(row, found)
        if adapter is not None and own is not None and adapter[1] is not None and predictions is not None:
            lines.append(_comparison_line(adapter[0], adapter[1], row, predictions))
    shown = own or (best[2] if best else None)
    if shown is not None and shown.estimate is not None:
        lines.append("The intervals leave out the variation of training sets; each fold trained on fewer images.")
    confused = adapter if own is not None and adapter is not None and adapter[1] is not None else best
    if confused is not None and confused[1] is not None:
        by = "" if adapter is not None and confused is adapter else f" by {_name(confused[0].method)}"
        lines.append(_confusion_line(confused[1], class_names, by))
    if shown is not None and shown.estimate is not None and shown.estimate.untested_classes:
        lines.append(_untested_line(shown.estimate.untested_classes))
    return lines + [f"Next: {command}" for command in commands]


def _accuracy(row: Row, predictions: Predictions | None) -> _Accuracy | None:
    """A run's accuracy; None if the run did not complete or was not tested."""
    if row.status != "completed":
        return None
    if row.estimate is not None:
        estimate = Estimate.from_dict(row.estimate)
        return _Accuracy(estimate.correct, estimate.images, estimate.low, estimate.high, estimate)
    images = (row.data.get("counts") or {}).get("test") if predictions is None else len(predictions.index)
    if row.test_accuracy is None or not images:
        return None
    correct = round(row.test_accuracy * images)
    return _Accuracy(correct, images, *wilson(correct, images), None)


def _mean(accuracy: _Accuracy) -> float:
    return accuracy.value if accuracy.estimate is None else accuracy.estimate.mean


def _accuracy_line(row: Row, found: _Accuracy) -> str:
    if found.estimate is not None:
        images = f"{_plural('image', found.images)}, {found.estimate.number_of_folds}-fold cross-validation"
    else:
        images = f"{row.data.get('test_name') or 'test'} {_plural('image', found.images)}"
    counts = f"{found.correct:,} of {found.images:,} {images}"
    return f"{_name(row.method)}: {100 * found.value:.1f} % right (95 % interval {_between(found)}; {counts})."


def _chance_line(row: Row, found: _Accuracy) -> list[str]:
    """A sentence where the accuracy is not shown to be above that of always answering the largest class."""
    share = row.data.get("majority_share")
    if not isinstance(share, int | float) or found.low > share:
        return []
    where = "is under chance" if found.high < share else "is not shown to be above chance"
    return [f"{_name(row.method)} {where}: always answering the largest class is right for {100 * share:.1f} %."]


def _comparison_line(adapter: Row, of_adapter: Predictions, frozen: Row, of_frozen: Predictions) -> str:
    found = compare(of_adapter, of_frozen)
    against = f"{_name(adapter.method)} against {_name(frozen.method)}, image by image"
    interval = f"{_signed(found.low)} to {_signed(found.high)}"
    if not found.shown:
        return f"{against}: no difference shown ({_signed(found.difference)} points, {interval})."
    word = "better" if found.difference > 0 else "worse"
    return f"{against}: {abs(found.difference):.1f} points {word} ({interval})."


def _confusion_line(predictions: Predictions, class_names: Sequence[str], by: str) -> str:
    """The two pairs of classes with the most images of one taken for the other, in either direction."""
    wrong = ~predictions.correct
    pairs = Counter(
        (min(pair), max(pair))
        for pair in zip(predictions.label[wrong].tolist(), predictions.predicted[wrong].tolist(), strict=True)
    )
    if not pairs:
        return f"No image was misclassified{by}."
    ranked = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(
        f"{_quoted(class_names[first])} and {_quoted(class_names[second])} ({count} {_plural('image', count)})"
        for (first, second), count in ranked[:2]
    )
    tied = sum(count == ranked[1][1] for _, count in ranked[2:]) if len(ranked) > 2 else 0
    more = f", and {tied} more {_plural('pair', tied)} with {ranked[1][1]}" if tied else ""
    return f"Most often confused{by}: {listed}{more}."


def _untested_line(names: Sequence[str]) -> str:
    listed = [_quoted(name) for name in names[:_MOST_NAMES]]
    if rest := len(names) - len(listed):
        listed.append(f"{rest} more {'class' if rest == 1 else 'classes'}")
    joined = listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"
    each = "has a single image" if len(names) == 1 else "have a single image each"
    return f"No estimate for {joined}: {'it' if len(names) == 1 else 'they'} {each}, which is always trained on."


def _between(found: _Accuracy) -> str:
    return f"{100 * found.low:.1f} to {100 * found.high:.1f}"


def _signed(points: float) -> str:
    text = f"{points:+.1f}"
    return text if float(text) else "0.0"


def _ended(row: Row) -> str:
    return "failed" if row.status == "failed" else "was interrupted"


def _name(method: str) -> str:
    return shortened(printable(method), _MOST_CHARACTERS)


def _quoted(name: str) -> str:
    return f"'{shortened(printable(name), _MOST_CHARACTERS)}'"


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"
