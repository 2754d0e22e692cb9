from pathlib import Path

import pytest

from ssod_imwa.papers.tables import (
    METRICS,
    Row,
    Run,
    TableError,
    choose_rows,
    needed_runs,
    read_table,
    shown_runs,
)

TABLES = Path(__file__).parents[2] / "configs/tables"
MFW_TABLES = {"tiny_imagenet": 2, "tiered_imagenet": 3, "table5": 5}

GOOD = """
title: Two stages
metrics: [top1, h_mean]
overrides: {SOLVER.MAX_ITER: 5, DATASETS.TEST: [a, b]}
runs:
  second: {config: recipe.yaml, after: first, overrides: {CLS.LOSS.NAME: gml}}
  first: {config: recipe.yaml}
  alone: {config: [recipe.yaml, recipe.yaml]}
rows:
  - {label: one, run: first, paper: {top1: 71.1}, source: "MFW, Table 2"}
  - {label: two, run: second, against: one}
  - {label: member, run: first, member: 2, model: student}
  - {label: lawa, run: first, lawa: true}
  - {label: other, paper: {top1: 79.4}, source: "MFW, Table 2"}
"""


@pytest.fixture
def write(tmp_path):
    (tmp_path / "recipe.yaml").write_text("# empty\n")

    def write(text, **replaced):
        for old, new in replaced.items():
            assert old in text, old
            text = text.replace(old, new)
        path = tmp_path / "table.yaml"
        path.write_text(text)
        return path

    return write


def test_a_table_is_read_as_it_is_written(write, tmp_path):
    table = read_table(write(GOOD))
    assert (table.title, table.metrics) == ("Two stages", ("top1", "h_mean"))
    assert list(table.runs) == ["second", "first", "alone"]
    common = ("SOLVER.MAX_ITER", "5", "DATASETS.TEST", "['a', 'b']")
    assert table.runs["second"] == Run(
        "second", (tmp_path / "recipe.yaml",), (*common, "CLS.LOSS.NAME", "gml"), "first"
    )
    assert table.runs["first"] == Run("first", (tmp_path / "recipe.yaml",), common)
    pair = (tmp_path / "recipe.yaml", tmp_path / "recipe.yaml")
    assert table.runs["alone"] == Run("alone", pair, common)
    assert table.rows == (
        Row("one", "first", {"top1": 71.1}, "MFW, Table 2"),
        Row("two", "second", against="one"),
        Row("member", "first", model="student", member=2),
        Row("lawa", "first", lawa=True),
        Row("other", None, {"top1": 79.4}, "MFW, Table 2"),
    )


def test_without_metrics_there_are_the_usual_seven(write):
    text = GOOD.replace("metrics: [top1, h_mean]\n", "")
    assert read_table(write(text)).metrics == METRICS
    assert len(METRICS) == 7


def test_rows_are_chosen_in_the_tables_order(write):
    table = read_table(write(GOOD))
    assert [row.label for row in choose_rows(table, None)] == [
        "one",
        "two",
        "member",
        "lawa",
        "other",
    ]
    assert [row.label for row in choose_rows(table, ["member", "one"])] == ["one", "member"]
    with pytest.raises(TableError, match=r"--rows: 'tow' is not a row; did you mean 'two'\?$"):
        choose_rows(table, ["tow"])


def test_a_run_comes_once_and_after_the_one_it_starts_from(write):
    table = read_table(write(GOOD))

    def names(*labels):
        return [run.name for run in needed_runs(table, choose_rows(table, labels))]

    assert names("two") == ["first", "second"]
    assert names("one", "two", "member") == ["first", "second"]
    assert names("one") == ["first"]
    assert names("other") == []
    assert [run.name for run in shown_runs(table, table.rows)] == ["first", "second"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: Two stages", "titel: x", "titel: 'titel' is not a key of a table; did you mean"),
        ("title: Two stages", "title:", "title is missing"),
        ("[top1, h_mean]", "[top1, hmean]", "metrics: 'hmean' is not a metric; did you mean 'h_"),
        ("[top1, h_mean]", "top1", "metrics = 'top1' is not allowed (must be a list)"),
        ("after: first", "after: frist", "runs.second.after: 'frist' is not a run; did you mean"),
        ("  first: {", "  first: {after: second, ", "runs wait for each other by `after`: second"),
        ("  alone: {config", "  alone: {konfig", "runs.alone.konfig: 'konfig' is not a key"),
        ("  first: {config: recipe", "  first: {config: other", "other.yaml does not exist"),
        ("config: [recipe.yaml, recipe", "config: [recipe.yaml, x", "x.yaml does not exist"),
        ("config: [recipe.yaml, recipe.yaml]", "config: []", "must be at least one file"),
        ("config: [recipe.yaml, recipe.yaml]", f"config: {'x' * 300}", "xxx does not exist"),
        ("  alone:", "  a/b:", "runs.a/b: 'a/b' is not allowed (a run's name is a folder's)"),
        ("  first: {config: recipe.yaml}", "  first: 3", "runs.first must hold keys and values"),
        ("run: second", "run: third", "rows[1].run: 'third' is not a run"),
        ("top1: 71.1", "top1: seventy", "rows[0].paper.top1 = 'seventy' is not allowed (must be"),
        ("top1: 71.1", "top1: True", "rows[0].paper.top1 = True is not allowed"),
        ("top1: 71.1", "few: 1", "rows[0].paper: 'few' is not one of the table's metrics"),
        (', source: "MFW, Table 2"', "", "rows[0] has numbers of a paper but no source"),
        ("label: two", "label: one", "rows[1].label: 'one' stands twice"),
        (
            "against: one",
            "against: onne",
            "rows[1].against: 'onne' is not a row with a run; did you mean 'one'",
        ),
        ("against: one", "against: other", "rows[1].against: 'other' is not a row with a run"),
        ("label: other, paper: {top1: 79.4}", "label: other", "rows[4] has no run (it may have"),
        ("label: other,", "label: other, member: 1,", "rows[4] has no run (it may have label,"),
        ("label: other,", "label: other, against: one,", "rows[4] has no run (it may have label,"),
        ("member: 2", "member: 0", "rows[2].member = 0 is not allowed (counted from 1)"),
        ("lawa: true", "lawa: 1", "rows[3].lawa = 1 is not allowed (must be true or false)"),
        ("lawa: true", "lawa: true, member: 1", "rows[3] has a member and lawa (it shows one"),
        ("model: student", "model: pupil", "rows[2].model: 'pupil' is not a model"),
        ("  alone:", "  first:", "is not valid YAML (first stands twice"),
        ("rows:\n", "rows: [\n", "is not valid YAML"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_file_and_the_place(write, old, new, message):
    path = write(GOOD, **{old: new})
    with pytest.raises(TableError) as caught:
        read_table(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert message in text
    assert "\n" not in text


def test_an_empty_or_missing_file_is_one_line(write, tmp_path):
    with pytest.raises(TableError, match="must hold title, runs and rows, not a NoneType"):
        read_table(write("# nothing\n"))
    with pytest.raises(TableError, match=r"rows = .* is not allowed"):
        read_table(write("title: x\nruns: {}\nrows: []\n"))
    with pytest.raises(TableError, match="cannot be read"):
        read_table(tmp_path / "none.yaml")


def test_metrics_of_experts_classes_and_test_sets_are_known(write):
    names = ["expert1/top1", "experts/top1", "recall-cat", "cifar10_test/few", "AP50", "VOC/AP"]
    text = GOOD.replace("[top1, h_mean]", f"[top1, {', '.join(names)}]")
    assert read_table(write(text)).metrics == ("top1", *names)
    with pytest.raises(TableError, match="metrics: 'topp' is not a metric"):
        read_table(write(text.replace("expert1/top1", "expert1/topp")))


def test_the_example_in_the_documentation_is_a_table(tmp_path):
    from ssod_imwa.papers import tables as paper_tables

    example = paper_tables.__doc__.split("::\n\n")[1].split("\n\n`config`")[0]
    folder = tmp_path / "cifar10_lt"
    folder.mkdir()
    for name in ("cross_entropy", "crt"):
        (folder / f"{name}.yaml").write_text("")
    for name in ("tables", "averaging"):
        (tmp_path / name).mkdir()
    (tmp_path / "averaging" / "imwa.yaml").write_text("")
    path = Path(tmp_path / "tables" / "t.yaml")
    path.write_text(example)
    assert [row.label for row in read_table(path).rows] == ["CE", "cRT", "CDT"]


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_mfws_numbers_are_of_the_table_of_their_data_set(path):
    """Its first table is CIFAR's, the second Tiny-ImageNet's, the third Tiered-ImageNet's."""
    number = next((n for name, n in MFW_TABLES.items() if name in path.stem), 1)
    sources = {row.source for row in read_table(path).rows if row.source.startswith("MFW, Table")}
    assert sources <= {f"MFW, Table {number}"}
    assert sources or not (path.stem.startswith("mfw") and "inaturalist" not in path.stem)
