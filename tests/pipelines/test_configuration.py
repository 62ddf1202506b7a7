"""The YAML of a run: read strictly, written whole, errors placed."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.errors import UserError
from pipelines import configuration
from pipelines.configuration import RunConfig

SOURCES = "sources: [{as: pool, folder: images}]\n"


def loaded(tmp_path: Path, text: str) -> RunConfig:
    (tmp_path / "run.yaml").write_text(text)
    return configuration.load(str(tmp_path / "run.yaml"))


def test_what_is_written_reads_back_equal(tmp_path: Path) -> None:
    config = loaded(tmp_path, f"run: r\n{SOURCES}cluster: {{levels: [9, 3]}}\nbalance: {{target: 5}}\nseed: 3\n")
    assert loaded(tmp_path, configuration.dump(config)) == config
    without = loaded(tmp_path, f"run: r\n{SOURCES}cluster: null\nretrieve: null\n")
    assert loaded(tmp_path, configuration.dump(without)) == without and without.cluster is None


def test_empty_block_takes_its_defaults_and_null_leaves_the_stage_out(tmp_path: Path) -> None:
    empty = loaded(tmp_path, f"run: r\n{SOURCES}cluster:\n  # levels: [9]\ndedup:\n")
    assert empty.cluster is not None and empty.dedup.threshold == 0.6
    assert loaded(tmp_path, f"run: r\n{SOURCES}cluster: null\n").cluster is None
    with pytest.raises(UserError, match=r"balance.target: missing"):
        loaded(tmp_path, f"run: r\n{SOURCES}balance:\n")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("run: r\nsources:\n  - as: pool\n    folders: x\n", r"sources.0.folders: .*did you mean `folder`.* line 4"),
        (f"run: r\n{SOURCES}retrieve:\n  seed_sets:\n    a: {{mod: none}}\n", r"did you mean `mode`\? .*line 5"),
        (f"run: r\n{SOURCES}retrieve:\n  seed_sets:\n    a: {{mode: nearest}}\n", r"retrieve.seed_sets.a.mode.*line 5"),
        (f"run: r\n{SOURCES}resources: {{memory_per_worker: 1KiB}}\n", r"memory_per_worker.*64MiB.*line 3"),
        (f"run: r\n{SOURCES}cluster: {{levels: [3, 9]}}\n", r"cluster.levels.*fewer clusters.*line 3"),
        (f"run: r\n{SOURCES}seed: x\ncluster: {{levels: []}}\n", r"\(and 1 more\)"),
        ("run: r\nsources:\n  - {as: pool, folder: a, folder: b}\n", r"line 3.*'folder' is written twice"),
    ],
)
def test_error_names_the_key_the_line_and_what_was_meant(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        loaded(tmp_path, text)


@given(st.text(alphabet=":-{}[]#&*!|>'\"%@` abc\n\t0", max_size=60))
def test_any_text_is_read_or_refused_with_a_sentence(text: str) -> None:
    from curation import storage

    path = "memory://configuration/run.yaml"
    storage.write_whole(path, text.encode())
    with pytest.raises(UserError):
        configuration.load(path)


def laughs(levels: int) -> str:
    """A few lines whose aliases mean 10 ** levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\nrun: r\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (laughs(9), "aliases mean more than 100,000 values"),
        ("run: r\na: &a {x: 1}\n" + "".join(f"b{n}: {{<<: [*a, *a]}}\n" for n in range(3)), "not valid YAML"),
        ("run: &a [*a]\n", "line 1: an alias that contains itself"),
        ("run: r\ndedup: &b {threshold: *b}\n", "line 2: an alias that contains itself"),
        ("run: " + "[" * 60 + "]" * 60, "nested deeper than 50 levels"),
        ("[" * 2000, "nested too deep"),
        ("run: r\n#" + "x" * 300_000, "larger than 256 KiB"),
        ("run: !!python/object/apply:os.system ['touch owned']\n", "line 1: not valid YAML"),
        ("run: !!python/name:os.system\n", "line 1: not valid YAML"),
        ("run: !anything x\n", "line 1: not valid YAML"),
        ("run: r\nseed: " + "9" * 5000, "not valid YAML"),
        ("run: 2024-13-45\n", "not valid YAML"),
        ("run: !!bool maybe\n", "not valid YAML"),
        ("run: !!timestamp x\n", "not valid YAML"),
        ("? [a]\n: b\n", "line 1: not valid YAML .a key that is no plain word"),
    ],
)
def test_bombs_tags_and_values_that_cannot_be_are_refused_with_a_sentence(
    tmp_path: Path, text: str, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        loaded(tmp_path, text)
    assert not Path("owned").exists()


def test_aliases_of_honest_size_are_followed(tmp_path: Path) -> None:
    text = f"run: r\n{SOURCES}download: {{allow_hosts: &hosts [a.example, b.example]}}\nseed: &seed 7\n"
    assert loaded(tmp_path, text).download.allow_hosts == ["a.example", "b.example"]
