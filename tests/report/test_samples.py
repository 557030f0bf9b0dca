from gptforge.report.samples import read_samples


def test_samples_are_read_back(tmp_path) -> None:
    path = tmp_path / "samples.md"
    assert read_samples(path) == []
    text = "# Samples: run\n\n## After 5 steps\n\n~~~text\n\n a\n~~~\n"
    tildes = "\n## After 10 steps\n\n~~~~text\nb\n~~~\n## After 7 steps\n~~~~\n"
    path.write_text(text + tildes)
    assert read_samples(path) == [(5, " a"), (10, "b\n~~~\n## After 7 steps")]
