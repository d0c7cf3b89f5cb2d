"""tables.py: values come from code and environments; what differs from the paper is marked."""

import sys
from dataclasses import fields

import pytest
from analysis import tables
from conftest import check_error, succeed

COMMANDS = "".join(
    f"python sparse_zoo/{agent}_simba_sparse.py --width-scale {width} --depth-scale {depth}"
    " --sparsity 0 --seed 1\n"
    for agent in ("sac", "ddpg")
    for width, depth in ((0.5, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (2, 2), (2, 3), (2, 4))
)


@pytest.fixture
def table(main, tmp_path):
    """The rows (what, here, paper, mark) of a table."""

    def run(number: int, commands: str = COMMANDS):
        flags = ("--table", number, "--output", ".")
        out = succeed(main(tables.__file__, *flags, stdin=commands))
        lines = (tmp_path / "table.md").read_text().splitlines()
        # A value with a bar in it would break the table
        assert len({line.count("|") for line in lines}) == 1
        assert out.startswith(f"Table {number}\n\n{lines[0]}\n")
        return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[2:]]

    return run


def test_table_1_marks_the_papers_wrong_number(table):
    rows = table(1)
    assert ("Dog Run, observation dim", "223", "223", "") in rows
    assert [row for row in rows if row[3]] == [
        (f"Humanoid {task}, action dim", "21", "24", "differs") for task in ("Run", "Stand", "Walk")
    ]
    assert len(rows) == 12


@pytest.mark.parametrize(
    "number,count,marked", [(2, 19, ["Target entropy"]), (3, 17, []), (4, 15, []), (5, 23, [])]
)
def test_tables_2_to_5(table, number, count, marked):
    rows = table(number)
    assert len(rows) == count and not any("missing" in row for row in rows)
    assert [row[0] for row in rows if row[3]] == marked
    if number == 2:
        assert ("Target entropy", "-dim(A)/2", "dim(A)/2", "differs") in rows


def test_values_follow_the_code(table, monkeypatch):
    """Other defaults, other sweeps: another table."""
    import ddpg_simba_sparse as ddpg

    names = [field.name for field in fields(ddpg.Args)]
    defaults = list(ddpg.Args.__init__.__defaults__)
    changes = {
        "tau": 0.01,
        "exploration_noise": 0.3,
        "learning_rate": 2e-4,
        "gamma": 0.9,
        "batch_size": 7,
    }
    for name, value in changes.items():
        defaults[names.index(name)] = value
    monkeypatch.setattr(ddpg.Args.__init__, "__defaults__", tuple(defaults))
    monkeypatch.setitem(sys.modules, "ddpg_simba_sparse", ddpg)
    rows = {
        row[0]: row[1:]
        for row in table(3, COMMANDS.replace("--width-scale 5 ", "--width-scale 6 "))
    }
    assert rows["Target critic momentum (tau)"] == ("0.01", "0.005", "differs")
    assert (
        rows["Exploration noise"][0] == "N(0, 0.3^2)" and rows["Actor learning rate"][0] == "0.0002"
    )
    assert rows["Discount"] == ("0.9", "heuristic", "differs") and rows["Batch size"][0] == "7"
    assert rows["Critic hidden dim"] == (
        "256, 512, 1024, 1536, 2048, 3072",
        "256, 512, 1024, 1536, 2048, 2560",
        "differs",
    )


def test_no_commands(main):
    ended = main(tables.__file__, "--table", "2")
    check_error(ended, "error: no command of sac_simba_sparse.py")
