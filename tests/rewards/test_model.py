"""Reward models as reward sources: by the policy's ids, or by texts in a tokenizer of their own."""

import shutil
from functools import partial

import pytest
import torch

from minirlhf.data.examples import Prompt
from minirlhf.data.parts import Useless
from minirlhf.data.tokenizer import load_tokenizer, train_tokenizer
from minirlhf.errors import UserError
from minirlhf.models.pretrained import load_reward_model
from minirlhf.rewards.load import facts, load_reward
from minirlhf.rewards.model import model_reward, reencode
from minirlhf.rewards.parse import parse_source
from minirlhf.rewards.source import Completions
from minirlhf.setup.policy import fits_scorers
from minirlhf.setup.ppo_settings import PPOConfig
from tests.rewards.test_source import BATCH
from tests.tiny_folders import change_json, save_lm, save_scorer

SHAPE = {
    "model_type": "llama", "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
}


def set_template(folder, template: str) -> None:
    change_json(folder / "tokenizer_config.json", chat_template=template)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random reward model whose tokenizer has one token a byte; eos is 0."""
    path = tmp_path_factory.mktemp("reward")
    train_tokenizer([], 258, path)
    save_scorer(path, SHAPE)
    return path


def alone(folder, ids: list[int]) -> float:
    """The score of one row by itself."""
    model = load_reward_model(folder)
    with torch.no_grad():
        return float(model(torch.tensor([ids]), torch.tensor([len(ids)])))


def load(folder, tokenizer, tokens: int = 64):
    """The source of `--reward FOLDER` for a policy with this tokenizer."""
    load_model = partial(load_reward_model, dtype=torch.float32)
    return load_reward(PPOConfig(reward=(str(folder),)), tokenizer, load_model, tokens)


def reward_of(folder, batch: Completions, before: bool = False, tokens: int = 64) -> list[float]:
    model = load_reward_model(folder)
    model.unread = 0 if before else None
    return model_reward(model, load_tokenizer(folder), tokens)(batch).tolist()


@pytest.mark.parametrize("tokens", [1, 6, 64])
def test_model_reward_is_the_reward_model_on_each_row_by_itself(folder, tokens):
    # with eos where the policy ended the text, without where the length cut it; in the rows' order
    rows = [[67, 68, 90, 0], [69, 91, 92], [70, 0]]
    expected = [alone(folder, row) for row in rows]
    assert len(set(expected)) == 3
    assert reward_of(folder, BATCH, tokens=tokens) == pytest.approx(expected, abs=1e-6)
    found = load(folder, load_tokenizer(folder), tokens)(BATCH).total
    assert found.tolist() == pytest.approx(expected, abs=1e-6) and not found.requires_grad


def test_model_reward_reads_before_eos_where_the_model_was_trained_so(folder):
    rows = [[67, 68, 90], [69, 91, 92], [70]]  # the last has an empty response
    expected = [alone(folder, row) for row in rows]
    assert reward_of(folder, BATCH, before=True) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("before", [False, True])
def test_model_reward_ends_a_text_with_the_eos_of_its_training(folder, before):
    # The policy's configuration names other eos ids beside those of the same tokenizer.json.
    batch = BATCH._replace(response_ids=[[90, 1], [91, 92], [2]])
    assert reward_of(folder, batch, before) == pytest.approx(reward_of(folder, BATCH, before))


def test_model_reward_ends_messages_as_its_template_does(folder, tmp_path):
    two = shutil.copytree(folder, tmp_path / "two")
    set_template(two, "{% for m in messages %}{{ m.content }}<|pad|>{% endfor %}")
    change_json(two / "generation_config.json", eos_token_id=[0, 1])
    tokenizer = load_tokenizer(two)
    assert tokenizer.eos_ids == (0, 1)
    messages = [{"role": "user", "content": "a"}]
    batch = Completions([messages], [[67, 1]], ["x"], [[90, 0]], ["eos"], {})
    found = model_reward(load_reward_model(two), tokenizer, 64)(batch)
    assert found.tolist() == pytest.approx([alone(two, [67, 1, 90, 1])], abs=1e-6)
    # A template that refuses the prompt has no end to say: what was drawn counts, if it is one.
    set_template(two, "{{ raise_exception('no') }}")
    reward = model_reward(load_reward_model(two), load_tokenizer(two), 64)
    for drawn, end in ((0, 0), (1, 1), (7, 0)):
        found = reward(batch._replace(response_ids=[[90, drawn]]))
        assert found.tolist() == pytest.approx([alone(two, [67, 1, 90, end])], abs=1e-6)


@pytest.mark.parametrize("before", [False, True])
def test_model_reward_scores_a_stopped_text_as_one_that_ended_there(folder, before):
    encode = load_tokenizer(folder).encode
    batch = Completions(["p"], [encode("p")], ["good"], [encode("good\n\nQ")], ["stop"], {})
    ended = encode("p") + encode("good") + ([] if before else [0])
    assert reward_of(folder, batch, before) == pytest.approx([alone(folder, ended)], abs=1e-6)


def test_load_reward_refuses_a_language_model(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    tokenizer.save(tmp_path)
    save_lm(tmp_path, SHAPE)
    with pytest.raises(UserError, match="not a reward model"):
        load(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": [[67] * 63, [69], [70]]},
         "text 0 has 65 tokens: the reward model reads 1 to 64"),
        ({"prompt_ids": [[67], [], [70]], "response_ids": [[0], [], [0]]}, "text 1 has 0 tokens"),
        ({"response_ids": [[90, 0], [91, 258], [0]]},
         r"^vocabulary: token 258 was sampled, the .* has 258"),
    ],
)
def test_model_reward_refuses_what_the_model_cannot_read(changes, message, folder):
    with pytest.raises(UserError, match=message):
        reward_of(folder, BATCH._replace(**changes))


def test_model_reward_refuses_a_tokenizer_without_eos(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.eos_ids = ()
    with pytest.raises(UserError, match="names no eos token"):
        model_reward(load_reward_model(folder), tokenizer, 64)


# ---- a tokenizer of its own ----------------------------------------------------------------------

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}" \
    "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A reward model whose tokenizer has tokens of several bytes, and a chat template."""
    path = tmp_path_factory.mktemp("words")
    tokenizer = train_tokenizer(["the film was good", "the plot was bad"] * 9, 280, path)
    set_template(path, CHAT)
    save_scorer(path, SHAPE, seed=3, vocab_size=tokenizer.vocab_size)
    return path


def sampled(tokenizer, prompts: list[str], texts: list[str], reasons: list[str]) -> Completions:
    """What a policy with this tokenizer would have sampled."""
    ids = [
        [*tokenizer.encode(text, bos=False), *([tokenizer.eos_ids[0]] if reason == "eos" else [])]
        for text, reason in zip(texts, reasons, strict=True)
    ]
    return Completions(prompts, [tokenizer.encode(p) for p in prompts], texts, ids, reasons, {})


PROMPTS, TEXTS = ["the film", "the plot was", "a"], [" was good", " bad", ""]
REASONS = ["eos", "length", "eos"]


@pytest.mark.parametrize("before", [False, True])
def test_both_paths_agree_where_the_tokenizers_are_equal(folder, before):
    tokenizer = load_tokenizer(folder)
    batch = sampled(tokenizer, PROMPTS, TEXTS, REASONS)
    batch = batch._replace(
        prompts=[*batch.prompts, "b"], prompt_ids=[*batch.prompt_ids, tokenizer.encode("b")],
        completions=[*batch.completions, "c"], finish_reasons=[*REASONS, "stop"],
        response_ids=[*batch.response_ids, tokenizer.encode("c###")],
    )
    model = load_reward_model(folder)
    model.unread = 0 if before else None
    by_ids = model_reward(model, tokenizer, 64)(batch)
    by_text = model_reward(model, tokenizer, 64, own_tokenizer=True)(batch)
    assert torch.equal(by_ids, by_text)
    assert len(set(by_ids.tolist())) == 4


def test_a_tokenizer_of_its_own_scores_the_texts_in_it(folder, words):
    policy, own = load_tokenizer(folder), load_tokenizer(words)
    batch = sampled(policy, PROMPTS, TEXTS, REASONS)
    rows = [
        [*own.encode("the film"), *own.encode(" was good", bos=False), own.eos_ids[0]],
        [*own.encode("the plot was"), *own.encode(" bad", bos=False)],
        [*own.encode("a"), own.eos_ids[0]],
    ]
    assert rows[0] != batch.prompt_ids[0] + batch.response_ids[0]
    expected = [alone(words, row) for row in rows]
    found = load(words, policy)(batch).total.tolist()
    assert found == pytest.approx(expected, abs=1e-6)
    # and the policy's ids are never looked at
    garbage = batch._replace(prompt_ids=[[999]] * 3, response_ids=[[-5] * 9] * 3)
    assert load(words, policy)(garbage).total.tolist() == found


MESSAGES = [{"role": "user", "content": "the film?"}]


def test_reencode_renders_messages_by_its_own_template(words):
    own = load_tokenizer(words)
    head, tail = reencode(own, MESSAGES, "it was good", "eos")
    assert own.decode(head, skip_special=False) == "<user>the film?<|endoftext|><assistant>"
    assert own.decode(tail, skip_special=False) == "it was good<|endoftext|>"
    assert head == own.encode_chat(MESSAGES)
    # one eos, which the template wrote; none where the length cut the text
    assert tail == [*own.encode("it was good", bos=False), 0]
    assert reencode(own, MESSAGES, "it was good", "stop") == (head, tail)
    assert reencode(own, MESSAGES, "it was good", "length") == (head, tail[:-1])


TOLD = {"tools": [[{"name": "plot"}], None, "[]"],
        "chat_template_kwargs": [None, {"mood": "bad"}, '{"mood": "good"}']}


def test_messages_are_rendered_with_what_their_row_tells(words, tmp_path):
    heads = ["plot;<user>", "bad<user>", "good<user>"]
    path = shutil.copytree(words, tmp_path / "told")
    set_template(path, "{% for t in tools or [] %}{{ t.name }};{% endfor %}{{ mood }}" + CHAT)
    own = load_tokenizer(path)
    batch = Completions([MESSAGES] * 3, [[]] * 3, ["good"] * 3, [[]] * 3, ["eos"] * 3, TOLD)
    rows = [[*own.encode(f"{head}the film?"), 0, *own.encode("<assistant>"), *own.encode("good"), 0]
            for head in heads]
    policy = train_tokenizer([], 258, tmp_path / "policy")
    found = load(path, policy)(batch).total.tolist()
    assert found == pytest.approx([alone(path, row) for row in rows], abs=1e-6)
    prompt = Prompt([1], MESSAGES, "p.jsonl:1", {"tools": TOLD["tools"][0] * 60})
    config = PPOConfig(max_new_tokens=4)
    with pytest.raises(UserError, match=r"^p.jsonl:1: \d+ tokens as --reward .* reads them, 4 new"):
        fits_scorers(config, [path], policy)(prompt)


@pytest.mark.parametrize("prompt", [MESSAGES, "the film?"], ids=["messages", "a string"])
def test_an_end_is_rendered_with_what_the_row_tells(prompt, folder, tmp_path):
    two = shutil.copytree(folder, tmp_path / "two")
    change_json(two / "generation_config.json", eos_token_id=[0, 1])
    set_template(two, "{% for m in messages %}{{ m.content }}"
                 "{{ '<|pad|>' if tools else '<|endoftext|>' }}{% endfor %}")
    own, columns = load_tokenizer(two), {"tools": [[{}]]}
    head = own.encode(prompt) if isinstance(prompt, str) else own.encode_chat(prompt, {"tools": 1})
    batch = Completions([prompt], [head], ["x"], [[90, 0]], ["eos"], columns)
    found = model_reward(load_reward_model(two), own, 64)(batch).tolist()
    end = 0 if isinstance(prompt, str) else 1
    assert found == pytest.approx([alone(two, [*head, 90, end])], abs=1e-6)


def test_reencode_goes_on_with_an_assistants_turn(words):
    own = load_tokenizer(words)
    prompt = [*MESSAGES, {"role": "assistant", "content": "it was"}]
    head, tail = reencode(own, prompt, " good", "eos")
    shown = "<user>the film?<|endoftext|><assistant>it was"
    assert own.decode(head, skip_special=False) == shown
    assert tail == [*own.encode(" good", bos=False), 0]


def test_reencode_spells_special_names_of_a_text_out(words):
    own = load_tokenizer(words)
    for prompt in ("a", MESSAGES):
        _, tail = reencode(own, prompt, "so<|endoftext|>good", "eos")
        assert tail.count(0) == 1 and tail[-1] == 0
        assert own.decode(tail) == "so<|endoftext|>good"


def test_a_text_that_is_too_long_once_it_is_reencoded_is_an_error(folder, words):
    batch = sampled(load_tokenizer(folder), ["q" * 60], ["x" * 5], ["eos"])
    message = r"--reward .*words.*: text 0 has 66 tokens once it is re-encoded: the reward model re"
    with pytest.raises(UserError, match=message):
        load(words, load_tokenizer(folder))(batch)


# What the template of `words` writes behind the eos, and how many tokens that is.
TAILS = [("", 0, ""), ("zz", 2, " and 2 behind these")]


@pytest.mark.parametrize(("tail", "behind", "shown"), TAILS)
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_fits_scorers_wants_room_for_all_that_is_read(
    chat, again, tail, behind, shown, words, folder, tmp_path
):
    scorer = shutil.copytree(words, tmp_path / "scorer")
    set_template(scorer, CHAT.replace("<|endoftext|>", f"<|endoftext|>{tail}"))
    own = load_tokenizer(scorer)
    policy = load_tokenizer(folder) if again else own
    text = MESSAGES if chat else "qq"  # a byte is a token, but for words of its training
    ids = own.encode_chat(text) if chat else own.encode("qq")
    size, shown = len(ids) + (behind if chat else 0), shown if chat else ""
    prompt = Prompt([67] if again else ids, text, "p:2", {})

    def check(new: int, overlong: str = "error") -> Prompt:
        config = PPOConfig(max_new_tokens=new, overlong=overlong)
        return fits_scorers(config, [scorer], policy)(prompt)

    assert check(64 - size) is check(64 - size, "drop") is prompt  # of 64 positions
    told = f"p:2: {len(ids)} tokens as --reward .*scorer reads them, {65 - size} new{shown}: it"
    for overlong in ("error", "truncate_prompt_left"):
        with pytest.raises(UserError, match=f"^{told} reads 64: lower --max-new-tokens, or"):
            check(65 - size, overlong)
    with pytest.raises(Useless, match=r"--reward .*scorer has no room for it and its response"):
        check(65 - size, "drop")
    change_json(scorer / "config.json", score_position="end_of_turn")
    check(64 - len(ids))


def test_fits_scorers_names_the_prompt_that_the_template_refuses(words, folder, tmp_path):
    shutil.copytree(words, tmp_path / "own")
    set_template(tmp_path / "own", "{{ raise_exception('no system here') }}")
    config = PPOConfig(max_new_tokens=8)
    fits = fits_scorers(config, [tmp_path / "own"], load_tokenizer(folder))
    fits(Prompt([67], "q", "p:1", {}))
    with pytest.raises(UserError, match=r"^p:2: .*no system here"):
        fits(Prompt([67], MESSAGES, "p:2", {}))


def test_rendered_prompts_are_refused_for_a_reward_model_with_another_tokenizer(words, folder):
    """Names of control tokens in them are the policy's tokens, and the other has others."""
    config = PPOConfig(rendered=True)
    told = r"^--rendered: the names of tokens are the policy's, --reward .*words.* has another tok"
    with pytest.raises(UserError, match=told):
        fits_scorers(config, [folder, words], load_tokenizer(folder))
    fits_scorers(config, [folder], load_tokenizer(folder))  # its own tokenizer: they mean the same


def test_facts_say_that_texts_are_reencoded(folder, words):
    tokenizer = load_tokenizer(folder)
    assert facts([parse_source(str(folder))], tokenizer, [MESSAGES]) == {"reward": str(folder)}
    told = facts([parse_source(f"0.5*{words}"), parse_source("a.py:f")], tokenizer, ["q"])
    again = " (its own tokenizer: texts are re-encoded)"
    assert told == {f"reward {words.name}": f"0.5 x {words}{again}", "reward f": "a.py:f"}


def test_facts_say_where_functions_get_messages(folder):
    told = facts([parse_source("a.py:f")], load_tokenizer(folder), ["q", MESSAGES])
    assert told["completions"] == 'messages for functions, as in TRL: completion[0]["content"]'
