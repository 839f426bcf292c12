"""Conversations: the base's chat template, targets on what the assistant says, and all that is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lora_lab import tasks
from lora_lab.errors import TaskError
from lora_lab.tasks.kinds.language.chat import NO_TARGET, cut
from lora_lab.tasks.tables import text_of

CASES = Path(__file__).parents[2] / "cases"
CASE = CASES / "N14_chat_messages_column"

# w26 opens a turn of the user, w27 one of the assistant, </s> ends it
TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %} w26 {{ m.content }} {% else %} w27 "
    "BEGIN{{ m.content }}{{ eos_token }}END{% endif %}{% endfor %}{% if add_generation_prompt %} w27 {% endif %}"
)
PLAIN = TURNS.replace("BEGIN", "").replace("END", "")
MARKED = TURNS.replace("BEGIN", "{% generation %}").replace("END", "{% endgeneration %}")
# an answer is written otherwise once more is said after it, as templates do that take thoughts out of the past
FORGETFUL = PLAIN.replace("w27 {{ m.content }}", "w27 {% if loop.last %}w25 {% endif %}{{ m.content }}")


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(CASES / "_bases/llama", tmp_path / "base")
    return tmp_path


def build(folder, rows, template, *keys):
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "base")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    lines = ['kind = "causal-lm"', 'base = "base"', *(keys or ['text = "messages"'])]
    lines.append('data = {train = "rows.jsonl", validation = "rows.jsonl", test = "rows.jsonl"}')
    (folder / "chat.toml").write_text("\n".join(lines))
    return tasks.from_name(str(folder / "chat.toml"))


def said(*contents):
    """Messages of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def tokens_of(task, split="train"):
    """[(all tokens, those that are targets)] of a split, in words."""
    inputs, found = task.split(split).inputs, []
    for ids, mask, labels in zip(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True):
        assert torch.equal(labels[labels != NO_TARGET], ids[labels != NO_TARGET])
        words = [
            " ".join(task.tokenizer.convert_ids_to_tokens(chosen)) for chosen in (ids[mask.bool()], ids[labels > 0])
        ]
        found.append(tuple(words))
    return found


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_what_the_assistant_says_is_a_target_in_every_turn(folder, template):
    rows = [{"messages": said("w1 w2", "w3")}, {"messages": said("w4", "w5 w6", "w7 w8", "w9")}]
    assert tokens_of(build(folder, rows, template)) == [
        ("<s> w26 w1 w2 w27 w3 </s>", "w3 </s>"),
        ("<s> w26 w4 w27 w5 w6 </s> w26 w7 w8 w27 w9 </s>", "w5 w6 </s> w9 </s>"),
    ]


def test_n14_a_conversation_of_the_case_trains_on_the_template_not_on_pythons_words(folder):
    rows = [json.loads(line) for line in (CASE / "chat.jsonl").read_text().splitlines()]
    task = build(folder, rows, PLAIN)
    wanted = {f"<s> w26 {row['messages'][0]['content']} w27 {row['messages'][1]['content']} </s>" for row in rows}
    assert {whole for whole, _ in tokens_of(task)} == wanted


def test_n14_without_a_template_the_column_is_refused_by_its_name(lora_lab):
    code, out, err = lora_lab("train", "--task", CASE / "chat.toml", "--steps", 2, "-o", "a.safetensors")
    wanted = json.loads((CASE / "expected.json").read_text())["must_mention"]
    assert (code, out) == (1, "")
    assert all(any(word in err for word in words.split("|")) for words in wanted)
    assert "column 'messages' holds lists of messages" in err
    assert err.strip().count("\n") == 0
    assert not Path("a.safetensors").exists()


def test_of_a_prompt_and_a_completion_that_are_messages_only_the_completion_is_a_target(folder):
    whole = said("w4", "w5 w6", "w7 w8", "w9")
    keys = ('prompt = "given"', 'completion = "answer"')
    for template in (PLAIN, MARKED):
        task = build(folder, [{"given": whole[:3], "answer": whole[3:]}], template, *keys)
        assert tokens_of(task) == [("<s> w26 w4 w27 w5 w6 </s> w26 w7 w8 w27 w9 </s>", "w9 </s>")]


def test_a_template_that_rewrites_the_past_serves_one_answer_and_is_refused_for_more(folder):
    assert tokens_of(build(folder, [{"messages": said("w1", "w2")}], FORGETFUL)) == [
        ("<s> w26 w1 w27 w25 w2 </s>", "w25 w2 </s>")
    ]
    with pytest.raises(TaskError, match=r"column 'messages': the chat template of .*base' writes .* otherwise"):
        build(folder, [{"messages": said("w1", "w2", "w3", "w4")}], FORGETFUL).split("train")


def test_a_long_conversation_keeps_a_target(folder):
    long = " ".join(["w1"] * 30)
    rows = [{"messages": said(long, "w2 w3", "w4", "w5")}, {"messages": said("w4", "w5", long, "w6")}]
    found = tokens_of(build(folder, rows, PLAIN, 'text = "messages"', "max_length = 6"))
    assert sorted(found) == [("<s> w26 w4 w27 w5 </s>", "w5 </s>"), ("w1 w1 w27 w2 w3 </s>", "w2 w3 </s>")]


@pytest.mark.parametrize("most", range(2, 9))
@pytest.mark.parametrize("first", range(1, 12))
def test_cutting_keeps_a_target_wherever_the_first_one_is(most, first):
    ids = list(range(12))
    labels = [NO_TARGET if i < first or i == 10 else i for i in ids]
    kept, targets = cut((ids, labels), most)
    assert len(kept) == most
    assert kept == list(range(kept[0], kept[0] + most))
    assert [label for label in targets[1:] if label != NO_TARGET] or first == 10
    assert all(label in (NO_TARGET, token) for token, label in zip(kept, targets, strict=True))


WRONG = [
    ([{"from": "human", "value": "w1"}], "a message whose role is missing .it has from, value."),
    ([{"role": "user", "content": ["w1"]}], "a message whose content is of the type list"),
    ([{"role": "assistant", "content": "w1"}], "a conversation begins with the assistant"),
    (["w1", "w2"], "column 'messages' holds lists of str; a text, or messages, are needed"),
    ([], "holds an empty conversation"),
    ({"role": "user", "content": "w1"}, "column 'messages' holds values of the type dict; a text is needed"),
]


@pytest.mark.parametrize(("cell", "text"), WRONG)
def test_cells_that_are_no_conversation_are_refused_by_the_column(folder, cell, text):
    with pytest.raises(TaskError, match=text) as caught:
        build(folder, [{"messages": cell}] * 2, PLAIN).split("train")
    assert "messages" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_that_raises_is_one_line(folder):
    template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(TaskError, match=r"the chat template of .* refuses it \(roles must\)"):
        build(folder, [{"messages": said("w1", "w2")}], template).split("train")


KINDS = [
    ("text-classification", ['text = "cell"', 'label = "label"'], {"label": 1}),
    ("causal-lm", ['prompt = "words"', 'completion = "cell"'], {"words": "w1"}),
    ("multiple-choice", ['prompt = "{cell}"', 'options = "two"', 'label = "label"'], {"two": ["w1", "w2"], "label": 1}),
    ("multiple-choice", ['prompt = "{words}"', 'options = "cell"', 'label = "label"'], {"words": "w1", "label": 0}),
]


@pytest.mark.parametrize(("kind", "keys", "row"), KINDS)
@pytest.mark.parametrize("cell", [{"a": "w1"}, [{"role": "user", "content": "w1"}, {"role": "user", "content": "w2"}]])
def test_what_is_no_text_is_refused_in_every_kind_of_task(folder, kind, keys, row, cell):
    (folder / "rows.jsonl").write_text("\n".join([json.dumps({**row, "cell": cell})] * 4))
    files = 'data = {train = "rows.jsonl", validation = "rows.jsonl", test = "rows.jsonl"}'
    (folder / "my.toml").write_text("\n".join([f'kind = "{kind}"', 'base = "base"', files, *keys]))
    with pytest.raises(TaskError, match="cell"):
        tasks.from_name(str(folder / "my.toml")).split("train")


def test_numbers_are_texts_and_missing_ones_are_none(folder):
    task = build(folder, [], None)
    assert [text_of(task, value, "x") for value in ("a", 3, 2.5)] == ["a", "3", "2.5"]
    for value in (None, float("nan")):
        with pytest.raises(TaskError, match="an example without a text in 'x'"):
            text_of(task, value, "x")
    for value in (b"a", {"a": 1}, ["a"], ("a",)):
        with pytest.raises(TaskError, match=f"column 'x' holds values of the type {type(value).__name__}; a text"):
            text_of(task, value, "x")
