"""The user's files: only regular ones of a sane size are read, and what is remembered of them is never stale."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from nola_vision.common import local_files
from nola_vision.common.files import write_file, write_whole
from nola_vision.common.local_files import file_digest, open_regular, read_file, remembered
from nola_vision.data.datasets.registry import get_dataset


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache that trusts files which are only just written; its folder."""
    monkeypatch.setattr(local_files, "RACY_NS", -(10**12))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def counted() -> tuple[list[str], object]:
    """The names of the files that were read, and the function that reads them."""
    read: list[str] = []
    return read, lambda path: read.append(path.name) or path.read_text()


def files(folder: Path, *contents: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for number, content in enumerate(contents):
        (folder / str(number)).write_text(content)
    return [folder / str(number) for number in range(len(contents))]


def next_process() -> None:
    """Only the cache folder outlives a process."""
    local_files._in_process.clear()


def test_an_unchanged_file_is_read_once(settled: Path, counted: tuple, tmp_path: Path) -> None:
    read, compute = counted
    paths = files(tmp_path / "data", "a", "b", "c")
    assert remembered("x", tmp_path, paths, compute) == ["a", "b", "c"] and sorted(read) == ["0", "1", "2"]
    assert remembered("x", tmp_path, paths[1:], compute) == ["b", "c"] and len(read) == 3
    next_process()
    assert remembered("x", tmp_path, paths[1:], compute) == ["b", "c"] and len(read) == 3
    times = paths[1].stat()
    paths[1].write_text("B")
    os.utime(paths[1], ns=(times.st_atime_ns, times.st_mtime_ns))  # size and mtime as before
    assert remembered("x", tmp_path, paths, compute) == ["a", "B", "c"] and read[3:] == ["1"]
    assert remembered("y", tmp_path, paths, lambda path: None) == [None] * 3  # another fact, and one not to remember
    assert remembered("y", tmp_path, paths, compute) == ["a", "B", "c"]


def test_a_file_that_has_just_changed_is_not_trusted(
    counted: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may change again within the resolution of its times."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read, compute = counted
    paths = files(tmp_path / "data", "a")
    for _ in range(2):
        assert remembered("x", tmp_path, paths, compute) == ["a"]
    assert read == ["0", "0"] and not (tmp_path / "cache").exists()


def test_without_a_cache_folder_a_process_reads_each_file_once(
    settled: Path, counted: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    monkeypatch.setattr(local_files, "_warned", False)
    read, compute = counted
    paths = files(tmp_path / "data", "a", "b")
    for kind in ("x", "x", "y"):
        assert remembered(kind, tmp_path, paths, compute) == ["a", "b"]
    assert sorted(read) == ["0", "0", "1", "1"]
    (warning,) = caplog.messages
    assert warning.startswith("the cache cannot be written (/dev/null/nola-vision/files: Not a directory)")
    paths[0].write_text("A")
    assert remembered("x", tmp_path, paths, compute) == ["A", "b"] and read[4:] == ["0"]


def test_a_warning_says_that_there_is_no_home_folder(
    settled: Path, counted: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(local_files, "_warned", False)
    assert remembered("x", tmp_path, files(tmp_path / "data", "a"), counted[1]) == ["a"]
    assert "(there is no home folder)" in caplog.text


def write_checked(path: Path, text: str) -> None:
    """A cache file whose checksum is right."""
    path.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


@pytest.mark.parametrize(
    "content", ["[]", '"x"', "null", "3", "[" * 100_000, '{"a":[]}', '{"a":["x",1]}', '{"a":[[],"x"]}']
)
def test_a_cache_of_another_form_is_empty(content: str, settled: Path, counted: tuple, tmp_path: Path) -> None:
    read, compute = counted
    paths = files(tmp_path / "data", "a")
    remembered("x", tmp_path, paths, compute)
    (cache,) = settled.rglob("*.json")
    write_checked(cache, content.replace('"a"', '"data/0"'))
    next_process()
    assert local_files.read_cache(cache) == {}
    assert remembered("x", tmp_path, paths, compute) == ["a"] and len(read) == 2


@pytest.mark.parametrize("damage", ["cut", "garbage", "changed", "nested", "a folder", "no cache"])
def test_a_damaged_cache_is_not_used(
    damage: str, settled: Path, counted: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, compute = counted
    paths = files(tmp_path / "data", "a", "b")
    remembered("x", tmp_path, paths, compute)
    (cache,) = settled.rglob("*.json")
    whole = cache.read_bytes()
    match damage:
        case "cut":
            cache.write_bytes(whole[:-9])
        case "garbage":
            cache.write_bytes(b"\xff" * 99)
        case "changed":
            cache.write_bytes(whole.replace(b'"a"', b'"z"'))
        case "nested":
            cache.write_bytes(b"[" * 100_000)
        case "a folder":
            cache.unlink()
            cache.mkdir()
        case "no cache":
            monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    next_process()
    assert remembered("x", tmp_path, paths, compute) == ["a", "b"] and len(read) == 4


def test_a_result_is_not_remembered_if_the_file_changed_meanwhile(
    settled: Path, counted: tuple, tmp_path: Path
) -> None:
    read, compute = counted
    paths, link = files(tmp_path / "data", "a", "b"), tmp_path / "link"
    link.symlink_to(paths[0])

    def replaced(path: Path) -> str:
        link.unlink()
        link.symlink_to(paths[1])
        return path.read_text()

    def rewritten(path: Path) -> str:
        content = path.read_text()
        path.write_text("c")
        return content

    assert remembered("x", tmp_path, [link], replaced) == ["b"]
    link.unlink()
    link.symlink_to(paths[0])  # its times and inode are again those from before `replaced`
    assert remembered("x", tmp_path, [link], rewritten) == ["a"]
    assert not settled.exists()
    assert remembered("x", tmp_path, [link], compute) == ["c"]


def test_only_regular_files_of_a_sane_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # opened in the usual way it waits for a writer
    with open(tmp_path / "large", "wb") as file:
        file.truncate(10 * 2**30)
    for path, reason in (
        (tmp_path / "fifo", "a FIFO, not a regular file"),
        (Path("/dev/zero"), "a device, not a regular file"),
        (tmp_path, "a folder, not a regular file"),
        (tmp_path / "large", "larger than 1 MiB"),
        (tmp_path / "none", "No such file"),
    ):
        with pytest.raises(OSError) as caught:
            read_file(path, 2**20)
        assert reason in (caught.value.strerror or "") and file_digest(path, 2**20) is None


@pytest.mark.parametrize(
    ("swapped", "reason"), [("fifo", "a FIFO, not a regular file"), ("large", "larger than 1 MiB")]
)
def test_a_file_that_is_replaced_before_it_is_opened_is_refused(
    swapped: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = tmp_path / "file", os.open
    path.write_text("a")

    def swap(name: Path, flags: int) -> int:
        path.unlink()
        if swapped == "fifo":
            os.mkfifo(path)
        else:
            path.write_bytes(bytes(2**21))
        assert flags & os.O_NONBLOCK  # or this test waits
        return opened(name, flags)

    monkeypatch.setattr(os, "open", swap)
    with pytest.raises(OSError) as caught, open_regular(path, 2**20):
        pass
    assert reason in (caught.value.strerror or "")


def test_the_contents_of_a_folder_are_in_its_hash(settled: Path, tmp_path: Path) -> None:
    for name in ("train/a/1", "train/b/1", "test/a/1", "test/b/1"):
        path = tmp_path / f"data/{name}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    entry, root = get_dataset("folder"), tmp_path / "data"
    before = entry.own_content(str(root))
    assert entry.own_content(str(root)) == before and before.count(b"\n") == 4
    (root / "raw").mkdir()
    Image.new("RGB", (4, 4)).save(root / "raw/unused.bmp")
    assert entry.own_content(str(root)) == before
    times = os.stat(root / "test/b/1.bmp")
    Image.new("RGB", (4, 4), (9, 9, 9)).save(root / "test/b/1.bmp")
    os.utime(root / "test/b/1.bmp", ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = entry.own_content(str(root))
    assert changed != before and len(changed) == len(before)
    (root / "test/b/1.bmp").unlink()
    os.mkfifo(root / "test/b/1.bmp")  # reported by the run; the digests of the others stay in the hash
    assert entry.own_content(str(root)) not in (before, changed)


def test_what_is_written_goes_through_links_and_into_pipes(tmp_path: Path) -> None:
    """A link keeps pointing to its file, and /dev/stdout is not replaced by a file."""
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_file(tmp_path / "pipe", b"sent")
    assert os.read(reader, 10) == b"sent" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "pipe"]

    code = (
        "import sys; from nola_vision.common.files import write_file; write_file(sys.argv[1], b'page'); print('table')"
    )
    for stream in ("/dev/stdout", "/dev/fd/1"):  # a file that stdout was redirected to keeps what it had
        with open(tmp_path / "file", "ab") as redirected:
            subprocess.run([sys.executable, "-c", code, stream], stdout=redirected, check=True)
    assert (tmp_path / "file").read_text() == "new" + 2 * "pagetable\n"
    local_files.write_cache(tmp_path / "link", {})  # no user chose its path: a link there is replaced
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text().startswith("new")


def test_a_run_writes_neither_into_a_device_nor_through_a_link(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        write_whole(tmp_path / "pipe", b"{}")
    (tmp_path / "file").write_text("precious")
    for name in ("pipe", "file", "nowhere"):
        (tmp_path / "row.json").unlink(missing_ok=True)
        (tmp_path / "row.json").symlink_to(tmp_path / name)
        write_whole(tmp_path / "row.json", b"{}")
        assert not (tmp_path / "row.json").is_symlink() and (tmp_path / "row.json").read_bytes() == b"{}"
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "file").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe", "row.json"]
