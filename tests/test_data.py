"""Text: where it is found, how it is split, and batches that are the same on any number of ranks."""

import dataclasses
import tracemalloc
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from tsp_ref.errors import UserError
from tsp_ref.grid.grid import folded
from tsp_ref.model.config import Config, make_config
from tsp_ref.model.model import Model
from tsp_ref.training.data import TRAINING, VALIDATION, Text, batch, load_text

CONFIG = make_config("tiny")


@pytest.fixture(scope="module")
def library() -> Text:
    return load_text(None, CONFIG)


@pytest.fixture
def text(tmp_path: Path) -> Text:
    return load_text([str(random_file(tmp_path / "text", 5000))], CONFIG)


def random_file(path: Path, size: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).tobytes())
    return path


def whole(text: Text) -> bytes:
    return text.training.tobytes() + text.validation.tobytes()


def refusal(paths: list[Path], config: Config = CONFIG) -> str:
    with pytest.raises(UserError) as caught:
        load_text([str(path) for path in paths], config)
    return str(caught.value)


def assembled(text: Text, size: int, part: int, number: int, config: Config = CONFIG) -> np.ndarray:
    """[2, B, S], tokens and targets put together from the slots of all ranks."""
    found = np.full((2, config.batch_size, config.seq_len), -1, dtype=np.int64)
    for rank in range(size):
        model = Model(config, np, *folded(rank, size))
        for kind, tiles in enumerate(batch(model, text, part, number)):
            assert tiles.shape == (len(model.grid.slots), config.batch_size, config.tile_len)
            assert tiles.dtype == np.int64
            for slot, tile in zip(model.grid.slots, tiles):
                found[kind, :, model.grid.tokens(slot)] = tile
    assert found.min() >= 0
    return found


@pytest.mark.parametrize("part", [TRAINING, VALIDATION])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_batch_is_the_same_text_on_any_number_of_ranks(text: Text, size: int, part: int) -> None:
    for number in range(3):
        assert np.array_equal(assembled(text, size, part, number), assembled(text, 1, part, number))


def test_targets_are_the_tokens_shifted_by_one(text: Text) -> None:
    for number in range(3):
        tokens, targets = assembled(text, 1, TRAINING, number)
        assert np.array_equal(tokens[:, 1:], targets[:, :-1])
        for row in range(CONFIG.batch_size):
            passage = np.append(tokens[row], targets[row, -1]).astype(np.uint8).tobytes()
            assert passage in text.training.tobytes()


def test_every_sequence_of_every_batch_is_another_passage(text: Text) -> None:
    rows = [row.tobytes() for number in range(10) for row in assembled(text, 1, TRAINING, number)[0]]
    assert len(set(rows)) == 10 * CONFIG.batch_size


def test_another_seed_gives_other_batches(text: Text) -> None:
    other = make_config("tiny", seed=1)
    assert not np.array_equal(assembled(text, 1, TRAINING, 0), assembled(text, 1, TRAINING, 0, other))


def test_training_and_validation_share_out_the_text(tmp_path: Path) -> None:
    file = random_file(tmp_path / "text", 5000)
    text = load_text([str(file)], CONFIG)
    assert whole(text) == file.read_bytes()
    assert len(text.validation) == 250
    assert text.training.dtype == text.validation.dtype == np.uint8


def test_no_batch_reads_beyond_its_part(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(b"a" * 1900 + b"b" * 100)
    text = load_text([str(file)], CONFIG)
    for number in range(50):
        assert set(assembled(text, 1, TRAINING, number).ravel()) == {ord("a")}
        assert set(assembled(text, 1, VALIDATION, number).ravel()) == {ord("b")}


def test_the_shortest_text_gives_one_sequence_in_each_part(tmp_path: Path) -> None:
    text = load_text([str(random_file(tmp_path / "text", 2 * (CONFIG.seq_len + 1)))], CONFIG)
    for part, source in ((TRAINING, text.training), (VALIDATION, text.validation)):
        tokens, targets = assembled(text, 1, part, 0)
        assert np.append(tokens[0], targets[0, -1]).tolist() == source.tolist()


def test_the_last_byte_of_a_part_is_a_target_sooner_or_later(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(b"a" * 65 + b"z" + b"b" * 65)
    text = load_text([str(file)], CONFIG)
    assert len(text.training) == 66
    assert any(ord("z") in assembled(text, 1, TRAINING, number)[1] for number in range(20))


def test_the_standard_library_is_found(library: Text) -> None:
    assert library.source == "the source of Python's standard library"
    assert len(library.training) > 1_000_000
    assert Path(dataclasses.__file__).read_bytes() in whole(library)


def test_files_are_read_in_the_order_given(tmp_path: Path) -> None:
    files = [random_file(tmp_path / name, 300, seed) for seed, name in enumerate(["b", "a"])]
    text = load_text([str(file) for file in files], CONFIG)
    assert whole(text) == files[0].read_bytes() + files[1].read_bytes()
    assert text.source == f"{files[0]}, {files[1]}"


def test_a_folder_is_read_whole_sorted_and_without_what_is_hidden(tmp_path: Path) -> None:
    names = ["z.txt", "inner/deep/b.md", "inner/a.py", ".hidden", ".git/config", "inner/.cache/c"]
    for seed, name in enumerate(names):
        random_file(tmp_path / "folder" / name, 200, seed)
    text = load_text([str(tmp_path / "folder")], CONFIG)
    shown = ["inner/a.py", "inner/deep/b.md", "z.txt"]
    assert whole(text) == b"".join((tmp_path / "folder" / name).read_bytes() for name in shown)


def test_a_hidden_file_or_folder_is_read_when_it_is_named(tmp_path: Path) -> None:
    file, inner = random_file(tmp_path / ".file", 200), random_file(tmp_path / ".folder" / "a", 200, 1)
    text = load_text([str(file), str(inner.parent)], CONFIG)
    assert whole(text) == file.read_bytes() + inner.read_bytes()


def test_a_fingerprint_is_that_of_the_bytes(tmp_path: Path) -> None:
    one, same, other = (random_file(tmp_path / name, 400, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    prints = [load_text([str(file)], CONFIG).fingerprint for file in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]


def test_a_fingerprint_is_one_of_both_lengths_and_all_bytes(tmp_path: Path) -> None:
    file = random_file(tmp_path / "text", 400)
    assert load_text([str(file)], CONFIG).fingerprint == sha256(b"335 65 " + file.read_bytes()).hexdigest()


SIZE = 32 << 20


def peak_of_loading(paths: list[Path]) -> int:
    """The most bytes that Python and NumPy held while a text was found and its fingerprint taken."""
    tracemalloc.start()
    try:
        text = load_text([str(path) for path in paths], CONFIG)
        assert len(text.training) + len(text.validation) >= SIZE and len(text.fingerprint) == 64
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_large_file_is_not_in_memory_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "large"
    with file.open("wb") as sparse:
        sparse.truncate(SIZE)
    assert peak_of_loading([file]) < SIZE // 16


def test_many_files_are_in_memory_once(tmp_path: Path) -> None:
    for number in range(16):
        (tmp_path / str(number)).write_bytes(bytes(SIZE // 16))
    assert peak_of_loading([tmp_path]) < 1.5 * SIZE


def test_a_mapped_text_trains_on_the_bytes_of_a_read_one(tmp_path: Path) -> None:
    file, empty = random_file(tmp_path / "text", 3000), random_file(tmp_path / "empty", 0)
    mapped, read = load_text([str(file)], CONFIG), load_text([str(file), str(empty)], CONFIG)
    assert mapped.fingerprint == read.fingerprint
    for part in (TRAINING, VALIDATION):
        assert np.array_equal(assembled(mapped, 2, part, 0), assembled(read, 2, part, 0))


def test_a_text_cannot_be_changed(tmp_path: Path) -> None:
    files = [random_file(tmp_path / name, 300) for name in "ab"]
    for paths in (files[:1], files):
        text = load_text([str(path) for path in paths], CONFIG)
        assert not text.training.flags.writeable and not text.validation.flags.writeable


def test_an_empty_path_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_file(tmp_path / "text", 500)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--text '' names no file"):
        load_text([""], CONFIG)
    with pytest.raises(UserError, match="--text '' names no file"):
        load_text(["text", ""], CONFIG)
    assert len(whole(load_text(["."], CONFIG))) == 500


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    random_file(tmp_path / "there", 500)
    assert refusal([tmp_path / "there", tmp_path / "not"]).startswith(
        f"--text {tmp_path / 'not'} is neither a file nor a folder: give paths that exist")


def test_a_path_that_the_system_cannot_look_up_is_refused() -> None:
    name = "x" * 300
    assert f"--text {name}" in refusal([Path(name)])


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = random_file(tmp_path / "secret", 500)

    def deny(path: Path, *mode: str) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", deny)
    monkeypatch.setattr(Path, "read_bytes", deny)
    assert refusal([file]) == f"--text {file} cannot be read: Permission denied"


@pytest.mark.parametrize("size", [0, 1, 129])
def test_a_text_too_short_is_refused_with_the_length_it_needs(tmp_path: Path, size: int) -> None:
    file = random_file(tmp_path / "short", size)
    message = refusal([file])
    assert f"--text {file} holds {size} bytes: a sequence of seq_len=64 needs at least 130" in message
    load_text([str(random_file(file, 130))], CONFIG)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert f"--text {tmp_path} holds 0 bytes" in refusal([tmp_path])


def test_a_vocabulary_smaller_than_a_byte_is_refused(tmp_path: Path) -> None:
    file = random_file(tmp_path / "text", 500)
    message = refusal([file], make_config("tiny", vocab_size=248))
    assert message == "vocab_size=248 is too small to train on bytes: use 256 or more"
    load_text([str(file)], make_config("tiny", vocab_size=256))
