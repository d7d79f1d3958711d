import readme


def test_the_page_and_its_plots_are_those_of_the_results() -> None:
    for name, content in readme.made().items():
        assert (readme.HERE / name).read_text() == content, f"{name}: python bench/readme.py"
