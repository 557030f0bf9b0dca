from gptforge.report.format import format_bytes, markdown_table


def test_names_do_not_break_a_table() -> None:
    table = markdown_table([["run", "steps"], ["a|b\n\x1b[1m", 3]])
    assert table.split("\n") == [
        r"| run          | steps |",
        r"| ------------ | ----- |",
        r"| a\|b \x1b[1m | 3     |",
    ]


def test_few_bytes_are_counted_in_full() -> None:
    assert [format_bytes(count) for count in (0, 1, 18, 999)] == [
        "0 bytes", "1 byte", "18 bytes", "999 bytes",
    ]  # fmt: skip
    assert [format_bytes(count) for count in (1000, 6228, 1_200_000_000)] == [
        "1 KB", "6.23 KB", "1.2 GB",
    ]  # fmt: skip
