"""Prepared records: stored once, keyed by the content of the files, of any length and width."""

import numpy as np
import pytest

from cmamba_jax.data import records
from cmamba_jax.data.checks import DataError


class CmambaTestSequences(records.SequenceBuilder):
    MODALITIES = ("a", "b")
    OTHERS = {"label": np.int64}  # noqa: RUF012 (as the base class)


def content(value):
    for i in range(3):
        inputs = {"a": np.full((i + 1, 2), value, np.float32), "b": np.zeros((2, i + 1), np.float32)}
        yield {**inputs, "label": i, "id": f"sample {i}"}


@pytest.fixture
def prepare(tmp_path):
    def prepare(value, text="x"):
        path = tmp_path / "source.txt"
        path.write_text(text)
        return records.prepared_from(
            CmambaTestSequences, [path], lambda: {"train": content(value)}, name="n", data_dir=str(tmp_path / "cache")
        )

    return prepare


def test_any_length_and_width_comes_back(prepare, capfd):
    samples = records.Records(prepare(7), "train", lambda record: record, rows=[2, 0])
    assert [record["id"] for record in samples] == ["sample 2", "sample 0"]
    np.testing.assert_array_equal(samples[0]["a"], np.full((3, 2), 7))
    assert samples[0]["b"].shape == (2, 3) and samples[1]["b"].shape == (2, 1)
    assert capfd.readouterr() == ("", ""), "TFDS is quiet"


def test_content_of_the_source_decides(prepare):
    def first(builder):
        return records.Records(builder, "train", lambda record: record)[0]["a"][0, 0]

    assert first(prepare(1)) == 1
    assert first(prepare(2)) == 1, "the same file is not read again"
    assert first(prepare(2, text="y")) == 2


def test_fingerprint_of_large_files_reads_blocks(tmp_path, monkeypatch):
    path = tmp_path / "large"
    monkeypatch.setattr(records, "_HASHED_WHOLE", 100)
    monkeypatch.setattr(records, "_BLOCK", 10)
    values = bytearray(range(200)) * 40
    path.write_bytes(values)
    before = records.fingerprint([path])
    for place in (0, len(values) - 1):  # The first and the last block always count.
        changed = bytearray(values)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert records.fingerprint([path]) != before
    path.write_bytes(values)
    assert records.fingerprint([path]) == before
    path.write_bytes(values[:-1])
    assert records.fingerprint([path]) != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2\n3\n", "no table of numbers .*get the file again"),
        ("1,two\n", "no table of numbers"),
        ('"1.5","nan"\n', "row 0, column 1 is nan"),
    ],
)
def test_faults_of_a_table(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=f"t.csv.*{message}"):
        records.read_numbers(tmp_path / "t.csv")


def test_quotes_are_read(tmp_path):
    (tmp_path / "t.csv").write_text('"1.5","2"\n3,"-4e-1"\n')
    np.testing.assert_array_equal(records.read_numbers(tmp_path / "t.csv"), [[1.5, 2], [3, -0.4]])
