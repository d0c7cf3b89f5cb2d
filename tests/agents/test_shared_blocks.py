"""Agents are single files: what they share is one text, which must not drift; flags are real."""

import ast
import io
import re
import tokenize

import pytest
from conftest import AGENTS

SOURCES = {path.stem: path.read_text() for path in sorted(AGENTS.glob("*.py"))}
BY_AGENT = pytest.mark.parametrize("agent", SOURCES)
START = re.compile(r"^# === ([A-Z ]+) \(identical in every file(?: that has it)?\) ===$", re.M)
END = re.compile(r"^# === END (.+) ===$", re.M)
APPENDIX = "# Appendix: .*the same in every file that has it"
LAST = 'if __name__ == "__main__":\n    train(parse_flags(Args))\n'
CODE = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)

# Tables 2 and 3 of the paper, as flags. A discount of None is the heuristic, updates_per_step the
# replay ratio; the scales are 1 at critic blocks 2 and width 512, actor blocks 1 and width 128.
SIMBA_DEFAULTS = {
    "width_scale": 1.0,
    "depth_scale": 1,
    "learning_rate": 1e-4,
    "tau": 5e-3,
    "batch_size": 256,
    "weight_decay": 1e-2,
    "gamma": None,
    "updates_per_step": 2,
    "clipped_double_q": False,
    # Appendix B and the code of SimBa
    "action_repeat": 2,
    "total_timesteps": 1_000_000,
    "learning_starts": 10_000,
    "buffer_size": 1_000_000,
    "eval_interval": 10_000,
    "eval_episodes": 10,
    "final_eval_episodes": 100,
    "diagnostics_interval": 10_000,
    "sparsity": 0.0,
    "sparsity_distribution": "erdos_renyi",
    "reset_interval": None,
}
PAPER_DEFAULTS = {
    "sac_simba_sparse": {**SIMBA_DEFAULTS, "initial_temperature": 1e-2},
    # The same; topologies as with SAC in Graesser et al. (2022)
    "sac_simba_dynamic": {
        **SIMBA_DEFAULTS,
        "initial_temperature": 1e-2,
        "topology_interval": 1000,
        "drop_fraction": 0.5,
        "topology_end": 0.75,
        "grow_init": "zero",
        "prune_start": 0.2,
        "prune_end": 0.8,
    },
    "ddpg_simba_sparse": {**SIMBA_DEFAULTS, "exploration_noise": 0.1},
    # Table 5; 1,600 transitions and 100,000 training steps in env steps
    "der_impala_sparse": {
        "action_repeat": 4,
        "total_timesteps": 400_000,
        "learning_starts": 6_400,
        "updates_per_step": 1,
        "batch_size": 32,
        "n_step": 10,
        "gamma": 0.99,
        "target_interval": 2_000,
        "learning_rate": 1e-4,
        "adam_eps": 1.5e-4,
        "atoms": 51,
        "v_max": 10.0,
        "noisy_sigma": 0.5,
        "terminal_on_life_loss": True,
        "sticky_actions": 0.0,
        "priority_exponent": 0.5,
        "importance_exponent": 0.5,
        "eval_epsilon": 0.001,
        "eval_episodes": 10,
        "final_eval_episodes": 100,
        "width_scale": 1.0,
        "depth_scale": 1,
        "sparsity": 0.0,
    },
    # Table 4; std_decay is linear(1.0, 0.1, 500000) in env steps
    "drqv2_sparse": {
        "action_repeat": 2,
        "learning_starts": 4_000,
        "decisions_per_update": 2,
        "batch_size": 256,
        "buffer_size": 1_000_000,
        "n_step": 3,
        "gamma": 0.99,
        "tau": 0.01,
        "learning_rate": 1e-4,
        "feature_dim": 50,
        "std_start": 1.0,
        "std_end": 0.1,
        "std_decay": 1_000_000,
        "noise_clip": 0.3,
        "total_timesteps": 2_000_000,
        "eval_interval": 10_000,
        "eval_episodes": 10,
        "final_eval_episodes": 10,
        "width_scale": 1.0,
        "depth_scale": 1,
        "sparsity": 0.0,
        "sparsify_encoder": False,
        "sparsity_distribution": "erdos_renyi",
    },
    # Appendix C.2, and the code of Elsayed et al.
    "stream_ac_sparse": {
        "gamma": 0.99,
        "trace_lambda": 0.8,
        "learning_rate": 1.0,
        "actor_kappa": 3.0,
        "critic_kappa": 2.0,
        "entropy_coefficient": 0.01,
        "init": "sparse_init",
        "bootstrap_on_truncation": False,
        "learning_starts": 0,
        "total_timesteps": 2_000_000,
        "width_scale": 1.0,
        "depth_scale": 1,
        "sparsity": 0.0,
        "sparsity_distribution": "erdos_renyi",
    },
}

# Flags that are not in the name of a run's folder
EVERYWHERE_LEFT_OUT = {
    "device",
    "threads",
    "runs_dir",
    "resume",
    "eval_only",
    "run_dir",
    "capture_video",
    "sparse_kernel",
    "track",
    "wandb_project",
    "wandb_entity",
}
PIXELS_LEFT_OUT = EVERYWHERE_LEFT_OUT | {"matmul_precision"}
SIMBA_LEFT_OUT = PIXELS_LEFT_OUT | {"cuda_graph", "checkpoint_interval"}
LEFT_OUT = {
    "sac_simba_sparse": SIMBA_LEFT_OUT,
    "sac_simba_dynamic": SIMBA_LEFT_OUT,
    "ddpg_simba_sparse": SIMBA_LEFT_OUT,
    "drqv2_sparse": PIXELS_LEFT_OUT,
    "der_impala_sparse": PIXELS_LEFT_OUT,
    "stream_ac_sparse": EVERYWHERE_LEFT_OUT | {"checkpoint_interval"},
}

# What SAC with a changing topology has in another form than SAC
CHANGED = {"Args", "Agent", "diagnose", "load_policy", "train"}

# What SAC and DDPG do not have in common; everything else of one name is one text.
ALGORITHM = {
    "choose_action",
    "Args",
    "Actor",
    "Agent",
    "actor_loss",
    "td_target",
    "update",
    "diagnose",
    "act",
    "train",
}


def blocks(source: str) -> dict[str, str]:
    """Name of each shared block and its text, markers included."""
    found = {}
    for start in START.finditer(source):
        end = source.find(f"\n# === END {start[1]} ===\n", start.end())
        assert end > 0, f"{start[1]} has no end"
        assert start[1] not in found, f"{start[1]} comes twice"
        found[start[1]] = source[start.start() : end + len(f"\n# === END {start[1]} ===\n")]
    return found


def uses(node: ast.AST) -> set[str]:
    names = (part for part in ast.walk(node) if isinstance(part, ast.Name))
    return {part.id for part in names if isinstance(part.ctx, ast.Load)}


def defines(statement: ast.stmt) -> set[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    stored = (part for part in ast.walk(statement) if isinstance(part, ast.Name))
    return {part.id for part in stored if isinstance(part.ctx, ast.Store)}


def unused_blocks(source: str) -> set[str]:
    """The blocks of which nothing is used by what is in no block, nor by a block that is used."""
    found = blocks(source)
    rest = source
    for text in found.values():
        rest = rest.replace(text, "")
    own = ast.parse(rest)
    read = uses(own) - set().union(*map(defines, own.body))
    unused = {name: ast.parse(text) for name, text in found.items()}
    while used := [
        name for name, tree in unused.items() if read & set().union(*map(defines, tree.body))
    ]:
        for name in used:
            read |= uses(unused.pop(name))
    return set(unused)


def measure(source: str) -> str:
    """What says how a file reads: to notice, and no limit to write against."""
    tree = ast.parse(source)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    network = next(node for node in classes if "nn.Module" in map(ast.unparse, node.bases))
    (train,) = (node for node in tree.body if getattr(node, "name", "") == "train")
    texts = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )
    prose = {line for text in texts for line in range(text.lineno, text.end_lineno + 1)}
    tokens = [
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type in CODE and token.start[0] not in prose
    ]
    lines = source.splitlines()
    long = sum(len(line) > 100 for line in lines) / len(lines)
    return (
        f"first network at line {network.lineno} of {len(lines)}, train at {train.lineno}, "
        f"{len(tokens) / len(set(tokens)):.1f} tokens a code line, "
        f"{long:.1%} of lines over 100 characters"
    )


def flags(source: str) -> ast.ClassDef:
    (found,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "Args"
    )
    return found


def assigns_execution_flags(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "EXECUTION_FLAGS"
    )


@BY_AGENT
def test_the_story_comes_first_and_the_appendix_last(agent):
    """Flags, networks, training, what all files share. Run with -s to see how a file reads."""
    source = SOURCES[agent]
    reads = f"{agent}: {measure(source)}"
    print(f"\n{reads}")
    marks = [r"^class Args:", r"^class \w+\(nn\.Module\):", r"^def train\(", f"^{APPENDIX}$"]
    places = [re.search(mark, source, re.M) for mark in marks]
    assert all(places), reads
    starts = [place.start() for place in places]
    assert starts == sorted(starts), reads
    assert all(starts[-1] < block.start() for block in START.finditer(source)), reads
    assert source.endswith(LAST), reads


@BY_AGENT
def test_blocks_are_well_formed(agent):
    source = SOURCES[agent]
    found = blocks(source)
    assert "RUNS" in found
    assert [mark[1] for mark in START.finditer(source)] == END.findall(source) == list(found)
    # A marker that is misspelt would leave its block out of the comparison.
    assert len(re.findall(r"^#\s*={2,}", source, re.M)) == 2 * len(found)
    for name, text in found.items():
        assert text.count("# === ") == 2, f"{name} holds another block"
        ast.parse(text)


@BY_AGENT
def test_every_block_is_used(agent):
    assert unused_blocks(SOURCES[agent]) == set()


def test_a_block_that_nothing_uses_is_found():
    """Directly, or only by another block that nothing uses; not one that a used block needs."""
    bodies = {
        "KERNELS": "def multiply(x):\n    return x",
        "LAYERS": "def layer(x):\n    return multiply(x)",
        "CONVOLUTIONS": "LIMIT = 3\n\n\ndef convolve(x):\n    return crop(x, LIMIT)",
        "CROPS": "def crop(x, size):\n    return layer(x)[:size]",
    }
    source = "print(layer(1))\n" + "".join(
        f"# === {name} (identical in every file) ===\n{body}\n# === END {name} ===\n"
        for name, body in bodies.items()
    )
    assert unused_blocks(source) == {"CONVOLUTIONS", "CROPS"}
    assert unused_blocks(f"LIMIT\n{source}") == set()
    assert unused_blocks(f"LIMIT = 4\nprint(LIMIT)\n{source}") == {"CONVOLUTIONS", "CROPS"}
    assert unused_blocks(source.replace("print(layer(1))", "")) == set(bodies)


def test_blocks_are_identical_in_every_file():
    copies = {}
    for agent, source in SOURCES.items():
        for name, text in blocks(source).items():
            copies.setdefault(name, {}).setdefault(text.encode(), []).append(agent)
    assert len(copies) >= 2
    drifted = {
        name: sorted(map(tuple, texts.values())) for name, texts in copies.items() if len(texts) > 1
    }
    assert drifted == {}


def read_definitions(agent: str) -> dict[str, str]:
    """The functions and classes of a file, by name."""
    source = SOURCES[agent]
    return {
        node.name: ast.get_source_segment(source, node)
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def test_sac_and_ddpg_share_all_that_is_not_their_algorithm():
    sac = read_definitions("sac_simba_sparse")
    ddpg = read_definitions("ddpg_simba_sparse")
    assert list(sac) == list(ddpg) and len(sac) > 35
    assert {name for name in sac if sac[name] != ddpg[name]} == ALGORITHM


def test_a_changing_topology_is_all_that_is_not_sac():
    dynamic = read_definitions("sac_simba_dynamic")
    sac = read_definitions("sac_simba_sparse")
    assert {name for name in sac if sac[name] != dynamic.get(name)} == CHANGED


@BY_AGENT
def test_an_agent_imports_nothing_from_the_repository(agent):
    own = {"sparse_zoo", "analysis", "tests", *SOURCES} | {
        path.stem for path in AGENTS.rglob("*.py")
    }
    imported = set()
    for node in ast.walk(ast.parse(SOURCES[agent])):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert "torch" in imported and not imported & own


@BY_AGENT
def test_every_flag_is_typed_and_described(agent):
    body = flags(SOURCES[agent]).body
    fields = [node for node in body if isinstance(node, ast.AnnAssign)]
    assert len(fields) > 20 and len(body) == 2 * len(fields)
    for field, text in zip(body[::2], body[1::2]):
        assert isinstance(field, ast.AnnAssign) and field.value is not None
        assert (
            isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and len(text.value.value) > 5
        ), f"{field.target.id} has no docstring"
        default = ast.literal_eval(field.value)
        kind = field.annotation
        if ast.unparse(kind).startswith("Annotated"):
            kind, *rules = kind.slice.elts
            for rule in rules:
                assert "x" in uses(ast.parse(rule.value, mode="eval")), field.target.id
        if ast.unparse(kind).startswith("Literal"):
            assert default in ast.literal_eval(kind.slice)
        else:
            names = ast.unparse(kind).split(" | ")
            assert type(default).__name__.replace("NoneType", "None") in names, (
                f"{field.target.id}: {ast.unparse(kind)} = {default!r}"
            )


@BY_AGENT
def test_every_flag_is_read(agent):
    names = {
        node.target.id for node in flags(SOURCES[agent]).body if isinstance(node, ast.AnnAssign)
    }
    tree, read, named = ast.parse(SOURCES[agent]), set(), set()
    for statement in tree.body:
        # Neither the list of flags left out of the hash nor the check of ranges makes use of one.
        if getattr(statement, "name", "") in ("Args", "check_flags") or assigns_execution_flags(
            statement
        ):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args"):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                named.add(node.value)
    assert names - read - named == set()
    assert read <= names | {"given"}, "a flag that does not exist"  # given: of parse_flags


@BY_AGENT
def test_flags_left_out_of_the_hash_exist(agent):
    namespace = {}
    for node in ast.parse(SOURCES[agent]).body:
        if assigns_execution_flags(node):
            exec(compile(ast.Module([node], []), agent, "exec"), namespace)
    names = {
        node.target.id for node in flags(SOURCES[agent]).body if isinstance(node, ast.AnnAssign)
    }
    left_out = namespace["EXECUTION_FLAGS"]
    assert left_out < names
    assert left_out == LEFT_OUT[agent], "folders have other names: older runs are not found"


@pytest.mark.parametrize("agent", PAPER_DEFAULTS)
def test_defaults_are_the_papers(agent):
    body = flags(SOURCES[agent]).body
    defaults = {
        node.target.id: ast.literal_eval(node.value)
        for node in body
        if isinstance(node, ast.AnnAssign)
    }
    assert {name: defaults[name] for name in PAPER_DEFAULTS[agent]} == PAPER_DEFAULTS[agent]
