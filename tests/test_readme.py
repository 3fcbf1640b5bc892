"""Each page's examples run or parse as they stand, and what it says of files and names is true."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

import minirlhf
from minirlhf.cli import VERBS
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.setup.ppo_settings import PPOConfig
from tests import pages
from tests.pages import MODEL, PAGES, ROOT, run_code

FRONT, OWN = "README.md", "minirlhf/recipes/README.md"
OF_TORCHRUN = {"--nproc-per-node", "--nnodes", "--rdzv-id", "--rdzv-backend", "--rdzv-endpoint",
               "--master-port", "--log-dir", "--tee", "--standalone", "--local-addr",
               "--signals-to-handle"}
every_page = pytest.mark.parametrize("page", PAGES, ids=str)


# ------------------------------------------------------------------------------------- every page


@every_page
def test_links_lead_to_files_and_headings(page):
    for target in pages.links(page):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in pages.anchors(file), target


@every_page
def test_data_blocks_are_valid(page):
    for block in pages.blocks(page, "json"):
        for line in [block] if block.lstrip().startswith("{\n") else block.splitlines():
            assert json.loads(line), "an example is never empty"


@every_page
def test_code_is_in_a_language_that_is_checked(page):
    fences = re.findall(r"^```(.*)$", pages.read(page), re.MULTILINE)
    assert len(fences) % 2 == 0
    languages = {fence.partition(" ")[0] for fence in fences[::2]}
    assert languages <= {"bash", "python", "json", "toml", "text"}
    assert set(fences[1::2]) <= {""}


@every_page
def test_shell_commands_exist_and_accept_their_settings(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in pages.blocks(page, "toml"):
        Path("run.toml").write_text(block, encoding="utf-8")
    for words in pages.commands(page):
        program, *rest = words
        if program == "torchrun":  # … -m minirlhf VERB …
            program, *rest = rest[rest.index("-m") + 1 :]
        if program == "minirlhf":
            pages.parse(rest[0], rest[1:])
        elif program == "python" and rest[0].endswith(".py"):
            source = pages.script_source(rest[0])
            for flag in (word for word in rest if word.startswith("--")):
                assert re.search(rf'"(--)?{flag[2:]}"', source), f"{rest[0]} {flag}"
        else:
            assert program in ("python", "pip", "pytest", "git", "curl", "kill", "cd"), words


@every_page
def test_flags_in_a_sentence_are_of_a_verb_or_a_script(page):
    known = pages.all_flags() | OF_TORCHRUN
    scripts = (ROOT / "benchmarks").glob("*.py")
    known |= set(re.findall(r"--[a-z0-9-]+", "".join(map(pages.read, scripts))))
    for code in pages.inline(page):
        if code.startswith("minirlhf "):
            assert code.split()[1] in {*VERBS, "VERB", "--help", "--version"}, code
        if not code.startswith(("pip ", "pytest")):
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", code)) <= known, code


@every_page
def test_shell_commands_can_be_pasted_into_zsh(page):
    """There a # begins no comment, and a * that is not quoted must match a file."""
    for block in pages.blocks(page, "bash"):
        bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", block)
        assert "#" not in bare and "*" not in bare and "[" not in bare
    assert not re.search(r"`[^`\n]* [0-9.]+\*[^`\n]*`", pages.read(page))  # within a line


@every_page
def test_paths_in_backticks_exist(page):
    """`equations/kl.py` is a file of the package, or of the repository."""
    for code in pages.inline(page):
        if re.fullmatch(r"[\w/]+/\w+\.py", code):
            places = ROOT, ROOT / "minirlhf", (ROOT / page).parent
            assert any((place / code).is_file() for place in places), code


@every_page
def test_lengths_of_files_are_true_to_a_tenth(page):
    for name, target, lines in re.findall(r"^\| \[`(.+?)`\]\((.+?)\) \| (\d+) \|",
                                          pages.read(page), re.MULTILINE):
        file = (ROOT / page).parent / target
        assert file.as_posix().endswith(name)
        real = len(file.read_text(encoding="utf-8").splitlines())
        assert abs(real - int(lines)) <= 0.1 * real, f"{name} has {real} lines"


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").rglob("*.py")), ids=str)
def test_benchmarks_import_what_is_there(script):
    """Within functions and texts too."""
    found = re.findall(r"from (minirlhf[\w.]*) import (\([^)]*\)|[^\n]+)", pages.read(script))
    for module, names in found:
        for name in re.findall(r"\w+", re.sub(r" as \w+", "", names)):
            home = importlib.import_module(module)
            assert hasattr(home, name) or importlib.import_module(f"{module}.{name}")


# -------------------------------------------------------------------------------- the front door


def test_readme_is_short():
    assert len(pages.read(FRONT).splitlines()) <= 220


def test_readme_leads_to_each_page_and_wing():
    wings = [path.parent.name for path in (ROOT / "minirlhf").glob("*/__init__.py")]
    text, targets = pages.read(FRONT), pages.links(FRONT)
    assert not [wing for wing in wings if f"`{wing}/`" not in text]
    assert not [page for page in PAGES if str(page) not in (*targets, FRONT)
                and page.parts[0] == "minirlhf"]


def test_readme_tells_of_each_verb():
    words = " ".join([*pages.inline(FRONT), *pages.blocks(FRONT, "bash")])
    assert not [verb for verb in VERBS if f"minirlhf {verb}" not in words]


def test_equations_name_public_functions_and_their_tests():
    both = pages.read(FRONT) + pages.read("minirlhf/equations/README.md")
    rows = re.findall(r"^\| .+ \| .+ \| (`.+`) \| `(tests/\S+\.py)` \|$", both, re.MULTILINE)
    assert len(rows) >= 12
    for names, test in rows:
        source = pages.read(test)
        for name in re.findall(r"`([\w.]+)`", names):
            module, _, function = name.rpartition(".")
            home = importlib.import_module(f"minirlhf.{module}") if module else minirlhf
            assert callable(getattr(home, function)), name
            assert function in source, f"{test} does not test {function}"


def test_the_chinese_page_says_what_the_front_page_says():
    """The same headings, code, links, names and numbers, in the same order."""
    def facts(page):
        text = pages.read(page)
        rows = re.findall(r"^\| .*", text, re.MULTILINE)
        names = [sorted(re.findall(r"`[^`]+`|[\d.,]*\d%?", row)) for row in rows]
        shape = re.findall("^#+ ", text, re.MULTILINE)
        return re.findall(r"```.*?```", text, re.DOTALL), shape, names

    assert facts("README.zh.md") == facts(FRONT)
    links = [set(re.findall(r"\]\(([^)]+)\)", pages.read(p))) for p in ("README.zh.md", FRONT)]
    assert links[0] - {"README.md"} == links[1] - {"README.zh.md"}


# ------------------------------------------------------------------------------- Python, as it is


@pytest.fixture
def in_a_small_world(tmp_path, monkeypatch):
    """Where the pages' paths lead to a tiny model, three prompts and three pairs."""
    pages.make_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    yield tmp_path
    torch.use_deterministic_algorithms(before)


def shorter(code: str, steps: int) -> str:
    """The loop, which would take a minute, with fewer steps and a checkpoint each second one."""
    return code.replace("steps=50", f"steps={steps}").replace("number % 20", "number % 2")


@every_page
def test_python_runs_as_it_stands(page, in_a_small_world):
    names: dict = {"__name__": "readme"}
    for code in pages.blocks(page, "python"):
        run_code(shorter(code, 2), names)


def test_own_loop_goes_on_from_its_checkpoint(in_a_small_world, capsys):
    code = shorter(pages.blocks(OWN, "python")[0], 3)
    assert "steps=3" in code and "step.number % 2" in code
    run_code(code, {})
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("1 ") and first.endswith(" 0.0")  # KL at step 0 is exactly 0
    assert second.startswith("2 ") and third.startswith("3 ")
    aligned = in_a_small_world / "aligned"
    before = (aligned / "model.safetensors").read_bytes()
    run_code(code, {})
    assert capsys.readouterr().out.splitlines() == [third]
    assert (aligned / "model.safetensors").read_bytes() == before
    assert load_tokenizer(aligned).fingerprint == load_tokenizer(MODEL).fingerprint


def own_names(count: int) -> dict:
    """What the first blocks of the page on own loops define."""
    names: dict = {}
    for code in pages.blocks(OWN, "python")[:count]:
        run_code(shorter(code, 1), names)
    return names


def test_own_update_moves_the_policy_and_starts_at_ratio_one(in_a_small_world):
    names = own_names(2)
    before = names["policy"].lm.model.embed_tokens.weight.clone()
    stats = names["update"]([[5, 6], [7]], [[8, 9, 10], [11]], [1.0, -1.0], iteration=0)
    assert stats.first_ratio_gap == 0 and stats.grad_norm > 0
    assert not torch.equal(names["policy"].lm.model.embed_tokens.weight, before)


def test_own_loss_is_the_one_that_is_learned_from(in_a_small_world):
    names = own_names(3)
    rollout = [[5, 6], [7]], [[8, 9, 10], [11]], [1.0, -1.0]
    settings = {"clip_low": 0.0, "clip_high": 0.0, "learning_rate": 1e-2}
    names["config"] = PPOConfig(**settings)
    for group in names["optimizer"].param_groups:
        group["lr"] = 1e-2
    clipped = names["update"](*rollout, iteration=0)
    free = names["update"](*rollout, iteration=1, policy_loss=names["reinforce"])
    assert clipped.clipfrac > 0 and free.clipfrac == 0
    # At ratio 1 both losses have one gradient, that of -A log pi: one step from the same weights
    policy, ends = names["policy"], []
    start = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    names["config"] = PPOConfig(epochs=1)
    for policy_loss in (None, names["reinforce"]):
        policy.load_state_dict(start)
        names["optimizer"] = torch.optim.SGD(policy.parameters(), lr=0.1)
        names["update"](*rollout, iteration=0, policy_loss=policy_loss)
        ends.append(policy.lm.model.embed_tokens.weight.clone())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-6)
    assert not torch.equal(ends[0], start["lm.model.embed_tokens.weight"])
