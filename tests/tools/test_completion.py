"""Scripts that complete a command line: asked in the shells themselves."""

import dataclasses
import resource
import shutil
import subprocess

import pytest

from minirlhf.cli import VERBS, main

SHELLS = {
    "bash": ["bash", "--norc", "-c"], "zsh": ["zsh", "-f", "-c"], "fish": ["fish", "-N", "-c"],
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Shell -> the file of its script."""
    folder, made = tmp_path_factory.mktemp("completion"), {}
    for shell in SHELLS:
        with pytest.MonkeyPatch.context() as patch, (folder / shell).open("w+") as file:
            patch.setattr("sys.stdout", file)
            assert main(["completion", shell]) == 0
        made[shell] = folder / shell
    return made


@pytest.fixture
def asked(scripts, tmp_path):
    """asked(shell, code) -> the lines of its stdout, in a folder with a file and a folder."""
    (tmp_path / "data.jsonl").touch()
    (tmp_path / "runs").mkdir()

    def ask(shell: str, code: str) -> list[str]:
        if shutil.which(shell) is None:
            pytest.skip(f"no {shell} here")
        words = [*SHELLS[shell], code.replace("SCRIPT", str(scripts[shell]))]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout.split("\n")[:-1]

    return ask


ASKED = [  # a command line up to the cursor, what must be offered, what must not
    ("", {"ppo", "best-of", "--version"}, {"--steps"}),
    ("p", {"ppo"}, {"sft"}),
    ("ppo ", {"--model", "--kl-coef", "--no-train-critic"}, {"--init-config", "data.jsonl"}),
    ("ppo --kl", {"--kl-coef", "--kl-in", "--kl-estimator"}, {"--model"}),
    ("ppo --kl-in ", {"reward", "loss"}, {"--model", "data.jsonl"}),
    ("ppo --kl-in reward --kl-estimator f", {"full"}, {"k1"}),
    ("sft --data ", {"data.jsonl", "runs"}, {"--model"}),
    ("sft --model ", {"runs"}, {"data.jsonl"}),
    ("sft --eval-data data.jsonl ", {"data.jsonl"}, set()),  # several values
    ("ppo --preset ", {"instructgpt"}, {"--model"}),
    ("ppo --steps ", set(), {"data.jsonl", "--model"}),
    ("tasks ", {"arithmetic", "words"}, {"data.jsonl"}),
    ("rerun ", {"runs"}, {"data.jsonl"}),
    ("completion ", {"bash", "zsh", "fish"}, set()),
    ("nonsense --", set(), {"--model"}),
]


@pytest.mark.parametrize(("line", "offered", "others"), ASKED, ids=[line for line, _, _ in ASKED])
def test_bash_completes(line, offered, others, asked):
    words = ["minirlhf", *line.split(" ")]
    array = " ".join(f"'{word}'" for word in words)
    code = f"source SCRIPT; COMP_WORDS=({array}); COMP_CWORD={len(words) - 1}; _minirlhf; "
    code += 'printf "%s\\n" "${COMPREPLY[@]}"; complete -p minirlhf > /dev/null'
    found = asked("bash", code)
    assert offered <= set(found) and not others & set(found)


@pytest.mark.parametrize(("line", "offered", "others"), ASKED, ids=[line for line, _, _ in ASKED])
def test_fish_completes(line, offered, others, asked):
    if line == "sft --eval-data data.jsonl " or not line:
        pytest.skip("fish offers the flags, and files by their names")
    found = asked("fish", f"source SCRIPT; complete -C 'minirlhf {line}'")
    found = {text.split("\t")[0].rstrip("/") for text in found}
    if not line.split(" ")[-1].startswith("-"):  # fish shows flags once a dash is typed
        offered = {word for word in offered if not word.startswith("-")}
    assert offered <= found and not others & found


ZSH = """
autoload -Uz compinit; compinit -u -D; source SCRIPT
_arguments() { print -rl -- "$@" }; _describe() { print -rl -- $verbs }
words=(minirlhf LINE); CURRENT=$#words; _minirlhf
"""


def test_zsh_knows_the_function_and_asks_for_what_the_flags_take(asked):
    assert asked("zsh", "autoload -Uz compinit; compinit -u -D; source SCRIPT; "
                        "print -r -- $_comps[minirlhf]") == ["_minirlhf"]
    assert "ppo:align a policy with a reward by PPO" in asked("zsh", ZSH.replace("LINE", "p"))
    specs = asked("zsh", ZSH.replace("LINE", "ppo --k"))
    assert any(s.startswith("*--kl-in[") and s.endswith(":value:(reward loss)") for s in specs)
    assert any(s.startswith("*--data[") and s.endswith("]:file:_files") for s in specs)
    assert "1:folder:_files -/" in asked("zsh", ZSH.replace("LINE", "rerun x"))


def test_the_scripts_know_every_verb_and_flag_and_start_no_python(scripts):
    for shell, path in scripts.items():
        text = path.read_text()
        for name, verb in VERBS.items():
            assert name in text
            for field in dataclasses.fields(verb.config()) if verb.settings else ():
                flag = field.name.replace("_", "-")
                assert (f"-l {flag}" if shell == "fish" else f"--{flag}") in text
        assert "python" not in text


def test_a_word_is_completed_at_once(asked):
    code = ("source SCRIPT; COMP_WORDS=(minirlhf ppo --k); COMP_CWORD=2; "
            "for i in 1 2 3 4 5 6 7 8 9 10; do _minirlhf; done; echo ${#COMPREPLY[@]}")
    started = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert int(asked("bash", code)[0]) >= 4
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - started.ru_utime - started.ru_stime
    assert spent < 3, "seconds of the processor, for ten words"


@pytest.mark.parametrize(
    ("words", "told"),
    [([], "--shell: required, but not given: minirlhf completion bash|zsh|fish"),
     (["tcsh"], "--shell: got 'tcsh', must be one of bash, zsh, fish")],
)
def test_completion_refuses_another_shell(words, told, capsys):
    assert main(["completion", *words]) == 2
    assert capsys.readouterr().err == f"error: {told}\n"
