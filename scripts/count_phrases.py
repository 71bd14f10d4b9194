"""Counts words and phrases that the project's texts should not use, in the pages and in the source.

    python scripts/count_phrases.py                  this tree
    python scripts/count_phrases.py ../old --lines   another tree, and where each phrase is

Reads README.md, CONTRIBUTING.md, CHANGELOG.md, docs/**/*.md and the .py, .yaml and .j2 files of src: prose, comments,
docstrings, messages and identifiers alike. A phrase may go over the end of a line. Some uses are correct English (a
table "has no column"), so a count is to be compared with another tree's, not with 0.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md")
SOURCES = ("src/**/*.py", "src/**/*.yaml", "src/**/*.j2")

# "three images a class": what is counted, and by what
_COUNTED = (
    "bytes?|bits?|images?|classes|parameters?|numbers?|coefficients?|values?|entries|keys?|seeds?|points?|runs?|rows?"
    "|files?|lines?|steps?|epochs?|seconds?|samples?|products?|scales?|passes|pass|process|processes|times|one|once"
    "|twice|[0-9]+"
)
_BY = (
    "bit|byte|image|class|parameter|number|coefficient|entry|key|seed|point|run|row|file|line|step|epoch|second|minute"
    "|sample|layer|slot|fold|method|group|weight|head|batch|cell|split|gpu|part|stored|channel|repeat|sweep|process"
)

# What is counted, and its regular expression. Case is ignored unless `(?-i:...)` says otherwise; a word is whole where
# no letter is next to it, so that `num_slots` and `SlotQueue` have the word slot.
PHRASES = {
    "is/are/has no X": r"(?<!there )(is|are|has) no\b(?! (longer|more|less|fewer)\b)",
    # not "there is none", the value `none` in quotes or of a key, and Jinja's `none`
    "none / nothing / nobody": (
        r"""(?<!["'`|:] )(?<!["'`:])(?<!there is )(?-i:none|[Nn]othing|[Nn]obody)\b(?!["'`]| (else|and|%\}))"""
    ),
    "slot": r"(?<!__)slots?\b(?!=True)",
    "says / said / told / tells": r"(says?|said|told|tells?)\b",
    "images a class, one a layer": rf"({_COUNTED}) an? ({_BY})\b",
    "held": r"held\b(?![ _-]out)",
    "beneath": r"beneath\b",
    "lost": r"lost\b",
    "of its own / of our own": r"of (its|our|their|his|one's|your) own\b",
    "beside(s)": r"besides?\b",
    "beat": r"beats?\b",
    "picture": r"pictures?\b",
    "anew": r"anew\b",
    "a process is at a run": r"(is|are) at (a|an|the|its|their|it|them)\b(?! (end|most|least))",
    "X for one": r"for one\b(?=[,;:.])(?!, [a-z_]+ in)",
    "stands for": r"(stands?|stood|standing) for\b",
    "goes on": r"(goes|go|went|gone|going) on\b",
    "trained numbers, stored numbers": r"(trained|stored) numbers?\b",
    "mend": r"mend(s|ed|ing)?\b",
    "laid over": r"(laid|lays?|lies) over\b",
    "for ever": r"for ?ever\b",
    "made again": r"((made|makes?|making)( [a-z]+)? again|remade|remakes?)\b",
    "heed": r"heed(s|ed|ing|less)?\b",
    "at hand, taken for, cannot be had, whence, shall, alike, slip, spoilt, dear": (
        r"(at hand|taken for|(cannot|can|could not) be had|whence|shall|alike|slips?|spoil[ts]?|spoiled|dear)\b"
    ),
    "less lora-r4 [95 %]": r"less ([\w.-]+-r[0-9]+|BEST|\{\w[\w.()]*\}) ?(\\?\[|\()",
}


def plain(text: str) -> str:
    """A text on one line, without the marks of comments, and with the words of identifiers apart."""
    text = re.sub(r"\s*\n[ \t]*(?:# ?|f?[\"'])?", " ", text)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text)


def texts(root: Path) -> Iterator[tuple[Path, str]]:
    """Each file that is read, and what is in it."""
    for pattern in (*PAGES, *SOURCES):
        for path in sorted(root.glob(pattern)):
            if path.is_file():
                yield path.relative_to(root), plain(path.read_text(encoding="utf-8"))


def found(root: Path) -> Iterator[tuple[str, Path, str]]:
    """Each use of a phrase: the phrase, the file, and the words around it."""
    patterns = {
        phrase: re.compile("(?<![a-z])(?:" + pattern.replace(r"\b", "(?![a-z])") + ")", re.IGNORECASE)
        for phrase, pattern in PHRASES.items()
    }
    for path, text in texts(root):
        for phrase, pattern in patterns.items():
            for match in pattern.finditer(text):
                yield phrase, path, text[max(0, match.start() - 40) : match.end() + 30]


def main() -> None:
    """Prints the counts as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--lines", action="store_true", help="print each use too")
    arguments = parser.parse_args()
    uses = list(found(arguments.root))
    print("| phrase | count |\n| --- | ---: |")
    for phrase in PHRASES:
        print(f"| {phrase} | {sum(phrase == one for one, _, _ in uses)} |")
    print(f"| total | {len(uses)} |")
    if arguments.lines:
        for phrase, path, words in uses:
            print(f"{phrase}\t{path}\t{words}")


if __name__ == "__main__":
    main()
