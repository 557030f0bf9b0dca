from gptforge.report.format import markdown_table


def test_names_do_not_break_a_table() -> None:
    table = markdown_table([["run", "steps"], ["a|b\n\x1b[1m", 3]])
    assert table.split("\n") == [
        r"| run          | steps |",
        r"| ------------ | ----- |",
        r"| a\|b \x1b[1m | 3     |",
    ]
