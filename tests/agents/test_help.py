"""--help of each agent, and flags that are yes or no."""

import ast
import dataclasses
import importlib
import re

import pytest
import sac_simba_sparse as sac
from conftest import AGENTS, ROOT, call, check_error, only_run, succeed

BY_AGENT = pytest.mark.parametrize(
    "agent", sorted(path.stem for path in AGENTS.glob("*.py")), ids=str
)
GROUPS = [
    "Experiment",
    "Environment",
    "Algorithm",
    "Size and sparsity",
    "Logging",
    "Checkpoints",
]


def read_help(agent: str, main) -> tuple[list[str], dict[str, str]]:
    """The groups, and the text of each flag, without line breaks."""
    out = succeed(main(AGENTS / f"{agent}.py", "--help"))
    assert max(map(len, out.splitlines())) <= 100
    groups = re.findall(r"^([A-Z][^\n]*)\n  --", out, re.M)
    entries = re.findall(r"^  --([a-z0-9-]+)[^\n]*\n((?: {8}[^\n]+\n)+)", out, re.M)
    return groups, {name: " ".join(text.split()) for name, text in entries}


@BY_AGENT
def test_groups_are_those_of_the_file(agent, main):
    groups, texts = read_help(agent, main)
    names = [group.partition(" (")[0] for group in groups]
    assert [name for name in names if name != "Topology"][:6] == GROUPS
    assert ("Topology" in names) == (agent == "sac_simba_dynamic")
    fields = [field.name for field in dataclasses.fields(importlib.import_module(agent).Args)]
    assert [name.replace("-", "_") for name in texts] == fields


@BY_AGENT
def test_a_flag_has_one_default_and_a_text_of_its_own(agent, main):
    args = importlib.import_module(agent).Args
    _, texts = read_help(agent, main)
    optional = {"run-dir", "init-from", "env-kwargs"}  # without them nothing happens
    for name, text in texts.items():
        assert text.count("default: ") == (name not in optional), f"{name}: {text}"
        default = getattr(args, name.replace("-", "_"))
        if isinstance(default, bool):
            assert text.endswith(f"(default: {'yes' if default else 'no'})")
        elif default is not None:
            assert text.endswith(f"(default: {default})")
    assert len(set(texts.values())) == len(texts)


@BY_AGENT
def test_what_the_agent_is_and_where_its_page_stands(agent, main):
    out = succeed(main(AGENTS / f"{agent}.py", "-h"))
    first = ast.get_docstring(ast.parse((AGENTS / f"{agent}.py").read_text())).splitlines()[0]
    assert first in " ".join(out.split())
    (page,) = re.findall(r"^Its page: (\S+)$", out, re.M)
    assert (ROOT / page).stem == agent and (ROOT / page).exists()


def test_flags_of_a_fork(main, tmp_path):
    """However they are written: over two lines, a word or nothing, without a text."""
    source = tmp_path / "my_sac.py"
    mine = """
    word: Literal["one", "two"] | None = None
    \"\"\"a word of two\"\"\"
    bare: int | str = 3
    wrapped: Annotated[
        float,
        "x > 0",
    ] = 0.5
    \"\"\"a number
    of two lines\"\"\"
"""
    text = (AGENTS / "sac_simba_sparse.py").read_text()
    source.write_text(text.replace("    # Checkpoints\n", mine + "\n    # Checkpoints\n"))
    out = succeed(main(source, "--help"))
    assert "  --word one|two\n        a word of two\n" in out
    assert "  --bare INT|TEXT\n        (default: 3)\n" in out
    assert "  --wrapped FLOAT\n        a number of two lines (default: 0.5)\n\nCheckpoints\n" in out


def test_the_end_of_the_pipe_may_be_closed():
    agent = AGENTS / "sac_simba_sparse.py"
    code, _, error = call("bash", "-c", f"set -o pipefail; python {agent} --help | true")
    assert (code, error) == (0, "")


YES = ["--eval-only", "--eval-only=True", "--eval-only=true", "--eval-only true"]
NO = ["--no-eval-only", "--eval-only=False", "--eval-only false", "--eval_only FALSE", ""]


@pytest.mark.parametrize("words", [*YES, *NO])
def test_yes_and_no(words, monkeypatch):
    monkeypatch.setattr("sys.argv", ["agent.py", "--seed=7", *words.split(), "--tau", "0.5"])
    args = sac.parse_flags(sac.Args)
    assert args == sac.Args(seed=7, tau=0.5, eval_only=words in YES)


@pytest.mark.parametrize("words", ["--eval-only=1", "--track=maybe", "--no-resume=maybe"])
def test_neither_yes_nor_no(words, main):
    if words.startswith("--no-"):  # tyro's own line
        code, _, error = main(AGENTS / "sac_simba_sparse.py", words)
        assert code == 2 and "Traceback" not in error
    else:
        flag = words.partition("=")[0]
        answer = f"must be {flag} or --no-{flag[2:]}"
        check_error(main(AGENTS / "sac_simba_sparse.py", words), words.replace("=", " "), answer)


def test_the_end_of_a_run_says_what_to_look_at(main, tmp_path):
    flags = "--env-id Pendulum-v1 --total-timesteps 400 --learning-starts 1000 --eval-episodes 1"
    flags += " --final-eval-episodes 2 --width-scale 0.0625 --threads 1"
    out = succeed(main(AGENTS / "sac_simba_sparse.py", *flags.split()))
    run = only_run(tmp_path / "runs").relative_to(tmp_path)
    end = out[out.index("return -") :]
    assert ", the mean of 2 episodes; " in end and f"{run}/learning_curve.png" in end
    assert "tensorboard --logdir runs\n" in end and f"--eval-only --run-dir {run}\n" in end
    (command,) = re.findall(r"python (.+) --eval-only", end)
    assert command == str(AGENTS / "sac_simba_sparse.py")
    assert "docs/recipes.md" in end and (ROOT / "docs" / "recipes.md").exists()
