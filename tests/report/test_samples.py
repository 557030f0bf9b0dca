from gptforge.report.samples import read_samples


def test_samples_are_read_back(tmp_path) -> None:
    path = tmp_path / "samples.md"
    assert read_samples(path) == []
    text = "# Samples: run\n\n## After 5 steps\n\n~~~text\n\n a\n~~~\n"
    tildes = "\n## After 10 steps\n\n~~~~text\nb\n~~~\n## After 7 steps\n~~~~\n"
    path.write_text(text + tildes)
    samples = [(5, " a"), (10, "b\n~~~\n## After 7 steps")]
    assert read_samples(path) == samples
    path.write_text(text + tildes + "\n## After 20 steps\n\n~~~text\ncut o")
    assert read_samples(path) == samples


def test_a_hostile_file_is_read_in_linear_time(tmp_path) -> None:
    path = tmp_path / "samples.md"
    path.write_text("## After 1 steps\n\n~~~text\n" * 100_000)
    assert read_samples(path) == []
    path.write_text(f"## After {'9' * 5000} steps\n\n~~~text\na\n~~~\n")
    assert read_samples(path) == []
