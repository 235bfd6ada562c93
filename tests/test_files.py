"""Files are whole or absent, whoever else writes them and whatever was killed."""

from pathlib import Path

from cil.files import replacing, write_bytes


def test_of_two_that_write_one_file_at_a_time_the_last_one_counts(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    with replacing(path) as first:
        first.write(b"of the first, ")
        with replacing(path) as second:
            second.write(b"of the second")
        assert path.read_bytes() == b"of the second"
        first.write(b"to its end")
    assert path.read_bytes() == b"of the first, to its end"
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    path, other = tmp_path / "results[1].csv", tmp_path / "other.csv.12345678.tmp"
    for left in (path.with_name(f"{path.name}.12345678.tmp"), other):
        left.write_bytes(b"half")
    write_bytes(path, b"whole")
    assert sorted(tmp_path.iterdir()) == [other, path]
