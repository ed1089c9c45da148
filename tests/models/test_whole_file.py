"""A file appears only when it is whole."""

import pytest
from turnaround.models.whole_file import whole_file


def test_it_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "a.bin"
    with whole_file(path) as partial:
        partial.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_of_what_fails_and_what_was_there_stays(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError), whole_file(path) as partial:
        partial.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
