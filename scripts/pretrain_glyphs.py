"""Pretrain `vit_glyph_patch4_32` from scratch on rendered glyphs, on a CPU, in about an hour.

    nice -n 5 python scripts/pretrain_glyphs.py --minutes 74 --seed 0 --fonts /usr/share/fonts

The task is to classify letters and signs of many scripts, independent of font, slant, stroke, blur and resolution.
Digits and other characters with a numeric value are excluded. Some of the classes and fonts are held out and evaluated
under the same distortions. Settings were chosen on the speed and loss of trials of a few minutes, on those held-out
figures and on a look at the training images; digits were not rendered or read.

The run stops by wall-clock time, so a second run is not bit-identical. The log records the number of
images seen: `--images N` stops there instead (threads and library versions still move the last bits).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import subprocess
import tempfile
import time
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from timm import create_model

import nola_vision.models.zoo.glyph_vit  # noqa: F401  (registers the model)

HERE = Path(__file__).parent
SIDE = 48  # side of a cached glyph
INK = 40  # its longer side, in those pixels
FONTS_PER_CLASS = 64

# ---------------------------------------------------------------------------------------------------------- characters

# (first, last, keep every n-th): whole alphabets, and samples of the large syllabaries.
# fmt: off
RANGES = [
    (0x21, 0x7E, 1), (0xA1, 0xFF, 1), (0x180, 0x1BF, 4), (0x1DD, 0x1DD, 1), (0x220, 0x2AF, 4),  # Latin, IPA
    (0x370, 0x3FF, 1), (0x400, 0x45F, 1), (0x460, 0x4FF, 4),  # Greek, Cyrillic
    (0x531, 0x587, 1), (0x5BE, 0x5F4, 1),  # Armenian, Hebrew
    (0x60C, 0x6D5, 2), (0x710, 0x72F, 2), (0x780, 0x7A5, 4), (0x7C0, 0x7FA, 2),  # Arabic Syriac Thaana N'Ko
    (0x904, 0x970, 1), (0x985, 0x9B9, 2), (0xA05, 0xA39, 2), (0xA85, 0xAB9, 2),  # Devanagari Bengali Gurmukhi Gujarati
    (0xB05, 0xB39, 2), (0xB83, 0xBB9, 2), (0xC05, 0xC39, 2), (0xC85, 0xCB9, 2),  # Oriya Tamil Telugu Kannada
    (0xD05, 0xD39, 2), (0xD85, 0xDC6, 2), (0xE01, 0xE5B, 1), (0xE81, 0xEDF, 2),  # Malayalam Sinhala Thai Lao
    (0xF40, 0xF6C, 2), (0x1000, 0x102A, 2), (0x10A0, 0x10FF, 2),  # Tibetan Myanmar Georgian
    (0x1100, 0x1112, 1), (0x1161, 0x1175, 2), (0x1200, 0x1357, 10), (0x13A0, 0x13F4, 4),  # Jamo Ethiopic Cherokee
    (0x1401, 0x1676, 16), (0x1681, 0x169A, 4), (0x16A0, 0x16EA, 1), (0x1780, 0x17B3, 2),  # Canadian Ogham Runic Khmer
    (0x1820, 0x1842, 4), (0x1950, 0x1974, 4), (0x1B05, 0x1B33, 4),  # Mongolian, Tai Le, Balinese
    (0x2010, 0x205E, 2), (0x20A0, 0x20BF, 1), (0x2190, 0x21FF, 6), (0x2200, 0x22FF, 6),  # signs, arrows, mathematics
    (0x2300, 0x23CF, 12), (0x25A0, 0x25FF, 8), (0x2600, 0x26FF, 10), (0x2701, 0x2767, 10),
    (0x2C00, 0x2C5F, 4), (0x2C80, 0x2CE4, 2), (0x2D30, 0x2D6F, 1),  # Glagolitic Coptic Tifinagh
    (0x3005, 0x301C, 2), (0x3041, 0x3094, 1), (0x30A1, 0x30FA, 2), (0x3105, 0x3129, 1),  # kana, Bopomofo
    (0xA000, 0xA48C, 40), (0xA490, 0xA4C6, 6), (0xA4D0, 0xA4F7, 4), (0xA500, 0xA60C, 8), (0xA6A0, 0xA6E5, 6),  # Yi Vai
    (0xA984, 0xA9B2, 4), (0xAA80, 0xAAAF, 4), (0xAC00, 0xD7A3, 331),  # Javanese, Tai Viet, Hangul syllables
    (0x10280, 0x1029C, 4), (0x10330, 0x10349, 2), (0x10380, 0x1039D, 4), (0x10400, 0x1044F, 6),  # Gothic ... Deseret
    (0x10480, 0x1049D, 4), (0x10800, 0x10835, 6), (0x10900, 0x10915, 4), (0x10A10, 0x10A33, 4),
]
# fmt: on
SIMPLE_HAN = (
    "人口日月木水火土山川田力刀女子大小中上下左右天王玉石目耳手足心犬虫車雨門金魚鳥馬羊牛米竹糸衣西見言谷走身里白立穴矢皮示禾"
    "文方止父片斤毛氏気空花林森青音夕入出半友外古台市本正母用由申電回多会光先同合名安字寺早年休交今元内公分切"
)
# A few signs without a numeric value are derived from a digit; their names contain it.
NUMBER_WORD = re.compile(
    r"\b(DIGITS?|NUMBER|NUMERAL|NUMERIC|NUMERO|ZERO|ONE|TWO|THREE|FOUR|FIVE|SIX|SEVEN|EIGHT|NINE|TEN|HUNDRED|THOUSAND"
    r"|HALF|QUARTER|THIRDS?|TRESILLO|CUATRILLO|VULGAR|FRACTION NUMERATOR)\b"
)
# Letters that look like a digit from 2 to 9, by Unicode's security data (UTS 39, confusables) or by eye. Letters that
# look like 0 or 1 (O, l, I, |) are too common to exclude.
DIGIT_LIKE = set("ƧƨꝚꝛϨϩꙄꙅᒿꛯꞫɜЗзӠӡҘҙƷʒƸƹȜȝꝪꝫⳌⳍՅվვƐᏎƼƽⳒⳓбᏮȢȣଃⳊⳋ𐌚𐑂𐐢")


def is_numeric(char: str) -> bool:
    """Whether a character, or any part of its compatibility decomposition, has a numeric value."""
    parts = char + unicodedata.normalize("NFKD", char)
    return any(unicodedata.numeric(c, None) is not None or c.isdigit() for c in parts)


def characters() -> list[str]:
    """Letters, punctuation and symbols to learn: one code point each, none numeric, none with an accent."""
    chars = [chr(i) for first, last, step in RANGES for i in range(first, last + 1, step)] + list(SIMPLE_HAN)
    keep = []
    for c in dict.fromkeys(chars):
        hangul = 0xAC00 <= ord(c) <= 0xD7A3
        if unicodedata.category(c)[0] not in "LPS" or (unicodedata.decomposition(c) and not hangul):
            continue
        if c not in DIGIT_LIKE and not is_numeric(c) and not NUMBER_WORD.search(unicodedata.name(c, "")):
            keep.append(c)
    return keep


# --------------------------------------------------------------------------------------------------------------- fonts

OFL, OFL10 = "OFL-1.1", "OFL-1.0"
GPL_FONT = "GPL with font exception"
# Debian packages whose licence was read in /usr/share/doc/PACKAGE/copyright; fonts of other packages are not used.
LICENCES = {
    "fonts-averia-gwf": OFL, "fonts-breip": OFL10, "fonts-bwht": OFL, "fonts-cabinsketch": OFL,
    "fonts-comfortaa": OFL, "fonts-comic-neue": OFL, "fonts-dancingscript": OFL, "fonts-dejavu-core": "Bitstream Vera",
    "fonts-dejavu-extra": "Bitstream Vera", "fonts-dkg-handwriting": OFL, "fonts-ecolier-court": OFL,
    "fonts-freefont-ttf": f"{GPL_FONT} (GPL-3+)", "fonts-gfs-gazis": OFL, "fonts-humor-sans": OFL,
    "fonts-joscelyn": OFL, "fonts-kalapi": OFL, "fonts-kaushanscript": OFL, "fonts-kiloji": "BSD-3-Clause",
    "fonts-klee": OFL, "fonts-kristi": OFL, "fonts-leckerli-one": OFL,
    "fonts-linuxlibertine": f"OFL-1.1 and {GPL_FONT} (GPL-2+)", "fonts-lobster": OFL, "fonts-nanum-extra": OFL,
    "fonts-navilu": OFL, "fonts-noto-cjk": OFL, "fonts-noto-core": OFL, "fonts-oldstandard": OFL10,
    "fonts-rufscript": f"{GPL_FONT} (GPL-3+)", "fonts-seto": OFL, "fonts-sil-abyssinica": OFL,
    "fonts-sil-andika": OFL, "fonts-sil-charis": OFL, "fonts-sil-ezra": "OFL-1.1 (layout tables: MIT)",
    "fonts-sil-gentium": OFL, "fonts-sil-padauk": OFL, "fonts-sjfonts": f"{GPL_FONT} (GPL-2)",
    "fonts-smc-chilanka": OFL, "fonts-smc-gayathri": OFL, "fonts-tlwg-purisa-ttf": f"{GPL_FONT} (GPL-2+)",
    "fonts-tomsontalks": OFL,
}  # fmt: skip
HELD_OUT_FONTS = ("Humor-Sans", "Purisa.ttf", "Kalapi", "KleeOne-Regular", "NotoSerif-Bold.ttf",
                  "DejaVuSerifCondensed.ttf", "BecauseWeLearn", "NotoSerifEthiopic")  # fmt: skip


@dataclass
class FontFile:
    """An installed font file with the Debian package it came in."""

    path: Path
    package: str
    version: str

    @property
    def held_out(self) -> bool:
        return any(part in self.path.name for part in HELD_OUT_FONTS)


def run(*command: str) -> str:
    """Standard output of a command; empty if it does not find anything."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def find_fonts(root: Path) -> list[FontFile]:
    """Font files of packages with a known free licence, without slanted variants of upright families."""
    fonts = []
    for package in LICENCES:
        version = run("dpkg-query", "-W", "-f", "${Version}", package)
        for line in run("dpkg-query", "-L", package).splitlines():
            path = Path(line)
            slanted = re.search(r"BoldItalic|BoldOblique|Slanted|Mono.*(Italic|Oblique)|LightItalic|RBI|RZI", path.name)
            if path.suffix in {".ttf", ".otf", ".ttc"} and path.is_file() and path.is_relative_to(root) and not slanted:
                fonts.append(FontFile(path, package, version))
    return sorted(fonts, key=lambda f: f.path)


def render(font: ImageFont.FreeTypeFont, char: str) -> np.ndarray | None:
    """The glyph in white on black, scaled to fit a square of INK pixels; None if it is empty."""
    left, top, right, bottom = font.getbbox(char)
    if right - left < 2 or bottom - top < 2 or max(right - left, bottom - top) > 600:
        return None
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), char, fill=255, font=font)
    box = image.getbbox()
    if box is None:
        return None
    image = image.crop(box)
    scale = INK / max(image.size)
    size = (max(2, round(image.width * scale)), max(2, round(image.height * scale)))
    out = Image.new("L", (SIDE, SIDE))
    out.paste(image.resize(size, Image.Resampling.BICUBIC), ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return np.asarray(out)


@dataclass
class Glyphs:
    """Rendered glyphs: images (N, SIDE, SIDE) uint8, and the index of the character and font of each."""

    images: np.ndarray
    char: np.ndarray
    font: np.ndarray
    chars: list[str]
    fonts: list[FontFile]


def render_all(chars: list[str], fonts: list[FontFile]) -> Glyphs:
    """Every character in every font whose character map contains it."""
    number = {c: i for i, c in enumerate(chars)}
    images, char_ids, font_ids = [], [], []
    for font_id, entry in enumerate(fonts):
        cmap = TTFont(entry.path, fontNumber=0, lazy=True).getBestCmap() or {}
        try:
            font = ImageFont.truetype(str(entry.path), 72, layout_engine=ImageFont.Layout.BASIC)
        except OSError:
            continue
        seen: dict[bytes, list[int]] = defaultdict(list)
        drawn = {}
        for char in chars:
            if cmap.get(ord(char), ".notdef") != ".notdef" and (image := render(font, char)) is not None:
                drawn[number[char]] = image
                seen[image.tobytes()].append(number[char])
        # The same image for many characters is a placeholder, not a letter.
        placeholder = {i for ids in seen.values() if len(ids) > 8 for i in ids}
        for i in drawn.keys() - placeholder:
            images.append(drawn[i])
            char_ids.append(i)
            font_ids.append(font_id)
    return Glyphs(np.stack(images), np.array(char_ids), np.array(font_ids), chars, fonts)


def merge_lookalikes(glyphs: Glyphs, same: float = 0.95, same_case: float = 0.85) -> list[int]:
    """For each character the lowest character that looks the same: Latin A, Greek Alpha, Cyrillic A are one class.

    Two characters are one class if, in most of the fonts that contain both, their images correlate above `same`.
    For the two cases of a letter (C and c, which differ only in size) `same_case` is enough. Noto has a separate
    file for each script; its regular sans files count as one font.
    """
    family = {}
    for i, font in enumerate(glyphs.fonts):
        noto = re.fullmatch(r"NotoSans\w*-Regular\.tt[fc]", font.path.name)
        family[i] = "noto" if noto else str(i)
    members: dict[str, list[int]] = defaultdict(list)
    for row, font_id in enumerate(glyphs.font):
        members[family[font_id]].append(row)
    n = len(glyphs.chars)
    lower = np.array([c.lower() for c in glyphs.chars])
    needed = torch.from_numpy(np.where(lower[:, None] == lower, same_case, same).astype(np.float32))
    both = np.zeros((n, n), np.uint16)
    alike = np.zeros((n, n), np.uint16)
    for rows in members.values():
        small = torch.from_numpy(glyphs.images[rows]).float()[:, None]
        small = F.avg_pool2d(small, 2).flatten(1)
        small = F.normalize(small - small.mean(1, keepdim=True), dim=1)
        ids = glyphs.char[rows]
        close = (small @ small.T > needed[ids][:, ids]).numpy()
        both[np.ix_(ids, ids)] += 1
        alike[np.ix_(ids, ids)] += close.astype(np.uint16)
    group = list(range(n))
    for i, j in zip(*np.nonzero(np.triu((alike * 2 >= both) & (both > 0), 1)), strict=True):
        a, b = group[i], group[j]
        if a != b:
            low, high = min(a, b), max(a, b)
            group = [low if g == high else g for g in group]
    return group


# -------------------------------------------------------------------------------------------------------- augmentation


def uniform(g: torch.Generator, n: int, low: float, high: float) -> torch.Tensor:
    return torch.rand(n, generator=g) * (high - low) + low


def augment(glyphs: torch.Tensor, g: torch.Generator, strength: float = 1.0) -> torch.Tensor:
    """Turn cached glyphs (N, SIDE, SIDE) uint8 into distorted 32x32 inputs (N, 3, 32, 32), normalised to -1..1.

    A `strength` below 1 distorts less: strong distortions slow down the first steps.
    """
    n = len(glyphs)
    x = glyphs[:, None].float() / 255

    # Stroke width: towards the minimum or the maximum of the neighbourhood, the latter up to twice.
    t = uniform(g, n, -0.7 * strength, 2.0 * strength).view(-1, 1, 1, 1)
    thin, thick = -F.max_pool2d(-x, 3, 1, 1), F.max_pool2d(x, 3, 1, 1)
    x = torch.where(t < 0, torch.lerp(x, thin, -t), torch.lerp(x, thick, t.clamp(0, 1)))
    x = torch.lerp(x, F.max_pool2d(x, 3, 1, 1), (t - 1).clamp(min=0))

    # Place: the matrix maps output to glyph coordinates, so a factor above 1 makes the glyph smaller.
    angle = uniform(g, n, -1, 1) * math.radians(20) * strength
    size, aspect, shear = uniform(g, n, 0.82, 1.35), uniform(g, n, -0.2, 0.2).exp(), uniform(g, n, -0.3, 0.3)
    size, shear, shift = (size - 1) * strength + 1, shear * strength, 0.12 * strength
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [
            torch.stack([cos * size * aspect, (shear * cos - sin) * size * aspect, uniform(g, n, -shift, shift)], 1),
            torch.stack([sin * size / aspect, (shear * sin + cos) * size / aspect, uniform(g, n, -shift, shift)], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [n, 1, 32, 32], align_corners=False)
    # Handwriting: smooth random displacement, coarse and fine.
    for cells, amount in ((3, 0.14), (6, 0.05)):
        wobble = torch.randn(n, 2, cells, cells, generator=g) * uniform(g, n, 0, amount * strength).view(-1, 1, 1, 1)
        grid = grid + F.interpolate(wobble, (32, 32), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    # Blur, then tone.
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, soft, uniform(g, n, -0.3, 1).clamp(min=0).view(-1, 1, 1, 1))
    x = x.clamp(1e-4, 1) ** uniform(g, n, -0.6, 0.6).exp().view(-1, 1, 1, 1)

    # Low resolution: of each batch a third keeps 32 pixels, a third has 12 to 25, a third 8 to 16; the glyphs come
    # in random order, so slices are as good as a draw for each.
    parts = list(x.tensor_split(6))
    for i in range(2, 6):
        low, high = (8, 16) if i > 3 else (12, 25)
        side = int(torch.randint(low, high + 1, (), generator=g))
        if torch.rand((), generator=g) > strength:
            continue
        small = F.adaptive_avg_pool2d(parts[i], side)
        small = small + torch.randn(small.shape, generator=g) * uniform(g, len(small), 0, 0.08).view(-1, 1, 1, 1)
        mode = "bilinear" if torch.rand((), generator=g) < 0.6 else "bicubic"
        parts[i] = F.interpolate(small, (32, 32), mode=mode, align_corners=False)
    x = torch.cat(parts)

    noise = uniform(g, n, -0.04, 0.08 * strength).clamp(min=0).view(-1, 1, 1, 1)
    gain, floor = uniform(g, n, 0.55, 1.1).view(-1, 1, 1, 1), uniform(g, n, -0.15, 0.15).clamp(min=0).view(-1, 1, 1, 1)
    x = x * gain + floor + torch.randn(x.shape, generator=g) * noise
    x = x.clamp(0, 1)
    x = torch.where(uniform(g, n, 0, 1).view(-1, 1, 1, 1) < 0.25 * strength, 1 - x, x)
    return ((x - 0.5) / 0.5).expand(-1, 3, -1, -1)


# ------------------------------------------------------------------------------------------------------------- judging


class HeldOut:
    """Few-shot tasks on glyph classes that were never trained on: one fixed set of distorted images."""

    shots, queries = 5, 10

    def __init__(self, images: torch.Tensor, pools: list[np.ndarray], seed: int) -> None:
        g, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        rows, self.labels = [], []
        for label, pool in enumerate(pools):
            per_class = self.shots + self.queries
            rounds = [rng.permutation(pool) for _ in range(math.ceil(per_class / len(pool)))]
            rows += list(np.concatenate(rounds)[:per_class])
            self.labels += [label] * per_class
        order = torch.from_numpy(rng.permutation(len(rows)))  # augment() picks the resolution by place in the batch
        self.images = torch.empty(len(rows), 3, 32, 32)
        self.images[order] = torch.cat([augment(images[torch.tensor(rows)[c]], g) for c in order.split(240)])
        self.labels = torch.tensor(self.labels)
        self.classes = len(pools)

    @torch.no_grad()
    def features(self, model: torch.nn.Module) -> torch.Tensor:
        parts = [model.forward_head(model.forward_features(c), pre_logits=True) for c in self.images.split(250)]
        return torch.cat(parts)

    def score(self, model: torch.nn.Module, episodes: int = 3) -> dict[str, float]:
        """Mean accuracy of 1-nearest-neighbour (cosine) and of a linear probe, 5 examples per class."""
        feats = self.features(model).float()
        feats = feats.view(self.classes, -1, feats.shape[-1])
        knn, probe = [], []
        for episode in range(episodes):
            order = torch.randperm(feats.shape[1], generator=torch.Generator().manual_seed(episode))
            support, query = feats[:, order[: self.shots]], feats[:, order[self.shots :]]
            s, q = support.flatten(0, 1), query.flatten(0, 1)
            sy = torch.arange(self.classes).repeat_interleave(self.shots)
            qy = torch.arange(self.classes).repeat_interleave(query.shape[1])
            nearest = (F.normalize(q, dim=1) @ F.normalize(s, dim=1).T).argmax(1)
            knn.append((sy[nearest] == qy).float().mean().item())
            mean, std = s.mean(0), s.std(0) + 1e-5
            linear = torch.nn.Linear(s.shape[1], self.classes)
            torch.nn.init.zeros_(linear.weight)
            optimiser = torch.optim.LBFGS(linear.parameters(), max_iter=60)

            def closure(x=(s - mean) / std, y=sy, linear=linear, optimiser=optimiser) -> torch.Tensor:
                optimiser.zero_grad()
                loss = F.cross_entropy(linear(x), y) + 2e-3 * linear.weight.square().sum()
                loss.backward()
                return loss

            optimiser.step(closure)
            probe.append((linear((q - mean) / std).argmax(1) == qy).float().mean().item())
        return {"knn_5shot": round(float(np.mean(knn)), 4), "probe_5shot": round(float(np.mean(probe)), 4)}


# ------------------------------------------------------------------------------------------------------------ training


def write_lists(glyphs: Glyphs, group: list[int], held: set[int], used: set[int]) -> None:
    """Write the characters and the fonts down, next to this script."""
    lines = ["# code point, character, name; '=' names the class it shares; 'held out' was never trained on"]
    for i, c in enumerate(glyphs.chars):
        if i in used:
            note = f"\t= U+{ord(glyphs.chars[group[i]]):04X}" if group[i] != i else ""
            note += "\theld out" if group[i] in held else ""
            lines.append(f"U+{ord(c):04X}\t{c}\t{unicodedata.name(c, '?')}{note}")
    (HERE / "pretrain_glyphs_classes.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = ["# package, version, file, licence; 'held out' was never trained on"]
    for i in sorted(set(glyphs.font.tolist())):
        font = glyphs.fonts[i]
        note = "\theld out" if font.held_out else ""
        lines.append(f"{font.package}\t{font.version}\t{font.path}\t{LICENCES[font.package]}{note}")
    (HERE / "pretrain_glyphs_fonts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def export(model: torch.nn.Module, path: Path) -> str:
    """Save the weights without the head as float16; returns the file's sha256."""
    state = {k: v.half().contiguous() for k, v in model.state_dict().items() if not k.startswith("head.")}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(state, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors writes files that only their owner may read
    partial.replace(path)  # never a half-written file under the final name
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contact_sheet(images: torch.Tensor, path: Path, columns: int = 24) -> None:
    """Write inputs side by side as one PNG, to look at."""
    tiles = ((images[:, 0] * 0.5 + 0.5) * 255).byte().numpy()
    rows = [np.concatenate(list(tiles[i : i + columns]), 1) for i in range(0, len(tiles) - columns + 1, columns)]
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(path)


def average_over_workers(model: torch.nn.Module, *numbers: float) -> list[float]:
    """Replace each gradient by its mean over the workers; return the mean of each number too."""
    grads = [p.grad for p in model.parameters()]
    flat = torch.cat([*(grad.flatten() for grad in grads), torch.tensor(numbers)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([*(grad.numel() for grad in grads), len(numbers)])
    for grad, part in zip(grads, parts, strict=False):
        grad.copy_(part.view_as(grad))
    return parts[-1].tolist()


def main() -> None:
    """Read the options and start one single-threaded process for each core.

    Threads of one process wait for each other at every operation, which is slow if other programs use the cores too;
    processes wait once per step.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    weights = HERE.parent / "src/nola_vision/models/zoo/weights/vit_glyph_patch4_32.safetensors"
    parser.add_argument("--minutes", type=float, default=74, help="wall-clock time, set-up included")
    parser.add_argument("--images", type=int, help="stop after this many images instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=weights)
    parser.add_argument("--log", type=Path, default=HERE / "pretrain_glyphs.log.jsonl")
    parser.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts"), help="only fonts under this folder")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--patch-drop", type=float, default=0.5, help="share of patches dropped until the last quarter")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of training inputs here")
    args = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(pretrain, (args, f"file://{folder}/meet"), nprocs=args.workers)


def pretrain(worker: int, args: argparse.Namespace, meet: str) -> None:
    """The whole run, in one of the workers; the first also evaluates, logs and saves."""
    start = time.monotonic()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meet, rank=worker, world_size=args.workers)
    torch.manual_seed(args.seed)
    rng, g = np.random.default_rng(args.seed), torch.Generator().manual_seed(args.seed * args.workers + worker)
    first = worker == 0

    # Glyphs, and classes of glyphs.
    chars = characters()
    assert not any(is_numeric(c) for c in chars), "a character with a numeric value among the classes"
    glyphs = render_all(chars, find_fonts(args.fonts))
    group = merge_lookalikes(glyphs)
    images = torch.from_numpy(glyphs.images)
    pools: dict[int, list[int]] = defaultdict(list)
    for row, char_id in enumerate(glyphs.char):
        pools[group[char_id]].append(row)
    used = set(glyphs.char.tolist())
    font_held = np.array([f.held_out for f in glyphs.fonts])[glyphs.font]
    several = sorted(c for c, rows in pools.items() if len(set(glyphs.font[rows])) >= 3)
    held = set(rng.permutation(several)[:80].tolist())
    train = {c: [r for r in rows if not font_held[r]] for c, rows in sorted(pools.items()) if c not in held}
    train = {c: rng.permutation(rows)[:FONTS_PER_CLASS] for c, rows in train.items() if rows}
    label_of = {c: i for i, c in enumerate(train)}
    rows = torch.from_numpy(np.concatenate(list(train.values())))
    labels = torch.cat([torch.full((len(r),), label_of[c]) for c, r in train.items()])
    # Classes in many fonts are sampled more often than those in few, but less than proportionally.
    chance = torch.cat([torch.full((len(r),), len(r) ** -0.6) for r in train.values()])
    new_class_tasks = HeldOut(images, [np.array(pools[c]) for c in sorted(held)], seed=1)
    font_pools = {c: np.array([r for r in pools[c] if font_held[r]]) for c in train}
    new_font_rows = torch.from_numpy(np.concatenate([p for p in font_pools.values() if len(p)])[:1500])
    new_font_labels = torch.tensor([label_of[group[c]] for c in glyphs.char[new_font_rows.numpy()].tolist()])
    order = torch.from_numpy(np.random.default_rng(2).permutation(len(new_font_rows)))
    new_font_rows, new_font_labels = new_font_rows[order], new_font_labels[order]
    new_font_images = augment(images[new_font_rows], torch.Generator().manual_seed(2))
    if first:
        write_lists(glyphs, group, held, used)

    shape = {"in_chans": 3, "num_classes": len(train)}
    model = create_model("vit_glyph_patch4_32", **shape, patch_drop_rate=args.patch_drop, drop_path_rate=0.05)
    average = create_model("vit_glyph_patch4_32", **shape).eval()
    average.load_state_dict(model.state_dict())
    # Muon for the blocks' matrices, AdamW for the rest. (Compared with AdamW alone only for minutes.)
    matrices = [p for k, p in model.named_parameters() if k.startswith("blocks.") and p.ndim == 2]
    rest = [p for k, p in model.named_parameters() if not (k.startswith("blocks.") and p.ndim == 2)]
    optimisers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02, fused=True),
    ]

    if first:
        args.log.parent.mkdir(parents=True, exist_ok=True)
        args.log.write_text("")

    def log(**entry: object) -> None:
        if not first:
            return
        entry = {"minutes": round((time.monotonic() - start) / 60, 2), **entry}
        with args.log.open("a") as f:
            f.write(json.dumps(entry) + "\n")
        print(json.dumps(entry), flush=True)

    def report(**entry: object) -> None:
        if not first:
            return
        with torch.no_grad():
            hits = torch.cat([average(c).argmax(1) for c in new_font_images.split(250)]) == new_font_labels
        log(**entry, **new_class_tasks.score(average), new_fonts_top1=round(hits.float().mean().item(), 4))

    settings = {f"arg_{k}": str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    log(event="start", **settings, characters=len(used), classes=len(train) + len(held), trained_classes=len(train),
        held_out_classes=len(held), font_files=len(set(glyphs.font.tolist())),
        held_out_fonts=len(set(glyphs.font[font_held].tolist())), trained_glyphs=len(rows),
        parameters=sum(p.numel() for k, p in average.named_parameters() if not k.startswith("head.")),
        torch=torch.__version__)  # fmt: skip
    if args.sheet and first:
        contact_sheet(augment(images[rows[torch.multinomial(chance, 480, True, generator=g)]], g), args.sheet)

    report(images=0)
    seen, step, running, done, next_report, warm_up = 0, 0, 0.0, 0.0, 10.0, 0.02
    torch.manual_seed(args.seed * args.workers + worker)  # from here on the workers draw different numbers
    train_start = time.monotonic() - start
    # Reserve time for the last report and the export.
    budget = args.minutes * 60 - train_start - min(25.0, args.minutes * 6)
    model.train()
    while done < 1:
        if done > 0.75 and model.patch_drop.prob:
            model.patch_drop.prob = 0.0  # whole images at the end, as in use
            log(event="whole images", images=seen)
        rate = args.lr * min(done / warm_up, 0.5 + 0.5 * math.cos(math.pi * max(0.0, done - warm_up) / (1 - warm_up)))
        for part in (part for optimiser in optimisers for part in optimiser.param_groups):
            part["lr"] = rate
        pick = torch.multinomial(chance, args.batch // args.workers, True, generator=g)
        inputs = augment(images[rows[pick]], g, strength=min(1.0, 0.2 + 3.2 * done))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs)
        loss = F.cross_entropy(logits.float(), labels[pick], label_smoothing=0.1)
        model.zero_grad()
        loss.backward()
        # Workers also agree on the elapsed time, so that they all stop at the same step.
        elapsed = (time.monotonic() - start - train_start) / budget
        value, done = average_over_workers(model, loss.item(), elapsed)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        step, seen = step + 1, seen + args.batch
        keep = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        running = value if step == 1 else 0.98 * running + 0.02 * value
        if args.images:
            done = seen / args.images
        if step % 100 == 0:
            log(images=seen, loss=round(running, 4), lr=round(rate, 7))
        if first and (time.monotonic() - start) / 60 >= next_report:
            export(average, args.out)
            report(images=seen, loss=round(running, 4))
            next_report += 10
    if not first:
        return
    sha256 = export(average, args.out)  # before the report, so that the file exists even if the run is killed in it
    report(event="end", images=seen, steps=step, loss=round(running, 4), bytes=args.out.stat().st_size, sha256=sha256)
    print(f"sha256 {sha256}  {args.out}")


if __name__ == "__main__":
    main()
