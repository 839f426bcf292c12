"""Language models as tasks, on tiny random models: losses by hand, what counts as a target, choices, error texts."""

import json

import numpy as np
import pytest
import torch
from tiny_language import build, tokenizer, write_causal
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast

from lora_lab import tasks
from lora_lab.adapters.models.attached import attach
from lora_lab.analysis.lines import connectivity
from lora_lab.analysis.merge_tables import table
from lora_lab.analysis.questions import Evaluate, Shapley, Stability
from lora_lab.errors import LoraLabWarning, OptionError, TaskError
from lora_lab.merging.merged import merge
from lora_lab.merging.sources import Sources
from lora_lab.merging.validation.task_models import MergeModels
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.examples import Examples
from lora_lab.tasks.choosing import task_of, tasks_of
from lora_lab.tasks.task import Scores
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

BASES = ("llama", "gpt2")


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama whose tokenizer puts <s> before a text, and a tiny GPT-2 whose tokenizer cannot even pad."""
    write_causal(tmp_path)
    return tmp_path


TEXTS = [
    {"text": text}
    for text in (
        "one plus one equals two",
        "the colour of grass is green",
        "red and blue",
        "what is the colour of the sky ? blue",
        "two plus two equals four and one plus three equals four",
        "blood is red",
    )
]
TEXT = {"kind": "causal-lm", "text": "text"}
ANSWERS = [
    {"question": "what is one plus one ?", "answer": "two"},
    {"question": "one plus two ?", "answer": "three and a red sky"},
    {"question": "the colour of blood is", "answer": "red"},
]
COMPLETION = {"kind": "causal-lm", "prompt": "question", "completion": "answer"}
CHOICES = [
    {"question": "the colour of grass", "choices": ["red and blue", "green"], "answer": 1},
    {"question": "one plus two", "choices": ["one", "two and a red sky", "three", "four four"], "answer": 2},
    {"question": "what is the colour of the sky and of blood", "choices": ["blue", "green", "a red"], "answer": 0},
]
CHOICE = {"kind": "multiple-choice", "prompt": "{question} ?", "options": "choices", "label": "answer"}


def example(split, i, *names):
    """The tensors of one example without its padding."""
    length = int(split.inputs["attention_mask"][i].sum())
    return [split.inputs[name][i : i + 1, :length] for name in ("input_ids", *names)]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("rows", "keys"), [(TEXTS, TEXT), (ANSWERS, COMPLETION)])
def test_the_loss_of_an_example_is_the_models_own_and_padding_changes_nothing(folder, base, rows, keys):
    task = build(folder, rows, keys, base)
    model, split = task.build_model(), task.split("test")
    scores = task.score(model)
    assert len(scores) == len(rows)
    assert not task.classifies
    for i in range(len(split)):
        ids, labels = example(split, i, "labels")
        with torch.no_grad():
            found = model(input_ids=ids, labels=labels)
        assert scores.loss[i] == pytest.approx(found.loss.item(), abs=1e-5)
        counted = labels[0, 1:] != -100
        logits, targets = found.logits[0, :-1][counted], labels[0, 1:][counted]
        assert scores.correct[i] == pytest.approx((logits.argmax(-1) == targets).double().mean().item())
        others = logits.scatter(1, targets[:, None], -torch.inf).amax(1)
        margin = (logits.gather(1, targets[:, None])[:, 0] - others).mean().item()
        assert scores.margin[i] == pytest.approx(margin, abs=1e-5)
    counts = [int((example(split, i, "labels")[1][0, 1:] != -100).sum()) for i in range(len(split))]
    assert task.columns(Scores({}), task.split("test"))["tokens"].tolist() == counts


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("rows", "keys"), [(TEXTS, TEXT), (ANSWERS, COMPLETION), (CHOICES, CHOICE)])
def test_scores_do_not_hang_on_the_batches(folder, base, rows, keys):
    task = build(folder, rows, keys, base)
    whole = task.score(task.build_model())
    for size in (1, 2):
        again = build(folder, rows, keys, base)
        again.batch_size = size
        parts = again.score(again.build_model())
        assert parts.loss == pytest.approx(whole.loss, abs=1e-5)
        assert parts.margin == pytest.approx(whole.margin, abs=1e-5)
        assert (parts.correct == whole.correct).all()


def test_every_token_but_the_first_of_a_text_is_a_target(folder):
    for base, first in (("llama", [1]), ("gpt2", [])):
        split = build(folder, TEXTS, TEXT, base).split("test")
        ids, labels = example(split, 0, "labels")  # the shortest
        words = tokenizer(bos=False)("red and blue")["input_ids"]
        assert ids[0].tolist() == [*first, *words]
        assert labels[0].tolist() == [-100, *[*first, *words][1:]]
        masked = split.inputs["attention_mask"] == 0
        assert (split.inputs["labels"][masked] == -100).all()
        assert masked.any()


def test_only_completions_and_their_end_are_targets(folder):
    split = build(folder, ANSWERS, COMPLETION).split("test")
    plain = tokenizer(bos=False)
    found = {}
    for i in range(len(split)):
        ids, labels = example(split, i, "labels")
        found[plain.decode(ids[0])] = plain.decode(labels[labels != -100])
        assert ids[0, 0] == 1
    assert found == {
        "<s> what is one plus one ? two </s>": "two </s>",
        "<s> one plus two ? three and a red sky </s>": "three and a red sky </s>",
        "<s> the colour of blood is red </s>": "red </s>",
    }


def test_long_prompts_lose_their_beginning_and_long_texts_their_end(folder):
    split = build(folder, ANSWERS, {**COMPLETION, "max_length": 4}).split("test")
    plain = tokenizer(bos=False)
    found = {
        plain.decode(row): plain.decode(labels[labels != -100])
        for row, labels in zip(split.inputs["input_ids"], split.inputs["labels"], strict=True)
    }
    expected = {"<s> ? two </s>": "two </s>", "<s> three and a": "three and a", "<s> is red </s>": "red </s>"}
    assert found == expected
    split = build(folder, TEXTS, {**TEXT, "max_length": 3}).split("test")
    assert split.inputs["input_ids"].shape == (6, 3)
    split = build(folder, CHOICES, {**CHOICE, "max_length": 3}).split("test")
    assert split.inputs["input_ids"].shape[2] == 3
    assert "of blood ? blue" not in plain.decode(split.inputs["input_ids"].flatten())
    assert ((split.inputs["targets"] != -100).sum(-1) <= 2).all()


def test_prompt_and_answer_are_split_into_tokens_together(folder):
    pieces = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        "▁",
        "▁the",
        "▁film",
        "▁is",
        "▁good",
        "▁bad",
        "good",
        "bad",
        "▁i",
        "s",
        "▁isgood",
    ]
    words = Tokenizer(WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    words.pre_tokenizer = (
        Metaspace()
    )  # as Llama 2 has it: a text that begins with a space has a token of its own for it
    joint = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    joint.save_pretrained(folder / "llama")
    row = {"question": "the film is", "choices": ["good", "bad"], "answer": 0}
    split = build(folder, [row], {**CHOICE, "prompt": "{question}"}).split("test")
    found = [joint.convert_ids_to_tokens(ids[ids != 0]) for ids in split.inputs["input_ids"][0]]
    assert found == [["▁the", "▁film", "▁is", "▁good"], ["▁the", "▁film", "▁is", "▁bad"]]
    targets = [joint.convert_ids_to_tokens(ids[ids >= 0]) for ids in split.inputs["targets"][0]]
    assert targets == [["▁good"], ["▁bad"]]
    row = {"question": "the film is ", "answer": "good"}  # with a space of its own
    split = build(folder, [row], COMPLETION).split("test")
    labels = split.inputs["labels"][0]
    assert joint.convert_ids_to_tokens(labels[labels >= 0]) == ["▁good", "</s>"]


def test_numbers_may_count_from_1_and_must_say_so(folder):
    rows = [{**row, "answer": str(row["answer"] + 1)} for row in CHOICES]
    expected = build(folder, CHOICES, CHOICE).split("test").inputs["labels"]
    with pytest.raises(TaskError, match=r"answer '?2'? of 2 options; they count from 0, or from 1 with label_from = 1"):
        build(folder, rows, CHOICE).split("test")
    with pytest.raises(TaskError, match="no answer of its test split is 0; say label_from = 1 if they count from 1"):
        build(folder, rows[2:], CHOICE).split("test")
    found = build(folder, rows, {**CHOICE, "label_from": 1}).split("test").inputs["labels"]
    assert torch.equal(found, expected)
    rows = [row for row in CHOICES if row["answer"]]
    assert 0 not in build(folder, rows, {**CHOICE, "label_from": 0}).split("test").inputs["labels"]


def test_texts_that_are_too_short_are_left_out_with_a_word(folder):
    with pytest.warns(LoraLabWarning, match="1 of 7 texts of its test split have no token to predict and are left out"):
        split = build(folder, [*TEXTS, {"text": ""}], TEXT).split("test")
    assert len(split) == len(TEXTS)
    with pytest.raises(TaskError, match="an example without a text in 'text'"):
        build(folder, [*TEXTS, {"text": None}], TEXT).split("test")


def by_hand(model, prompt, option, *, bos):
    """Mean log-likelihood of an option's tokens after the prompt."""
    plain = tokenizer(bos=False)
    given = [*([1] if bos else []), *plain(prompt)["input_ids"]]
    answer = plain(option)["input_ids"]
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([[*given, *answer]])).logits[0].log_softmax(-1)
    return float(np.mean([logs[len(given) + i - 1, token].item() for i, token in enumerate(answer)]))


@pytest.mark.parametrize("base", BASES)
def test_a_choice_is_the_option_of_the_highest_mean_likelihood(folder, base):
    task = build(folder, CHOICES, CHOICE, base)
    model = task.build_model()
    (batch,) = task.split("test").batches(8)
    scores = task.judge(model, batch, keep_logits=True)
    assert scores.logits.shape == (3, task.labels) == (3, 4)
    options = [int(np.isfinite(row).sum()) for row in scores.logits]
    for row in CHOICES:
        expected = np.array([by_hand(model, row["question"] + " ?", o, bos=base == "llama") for o in row["choices"]])
        n, right = len(expected), row["answer"]
        i = options.index(n)  # each of the three has another number of options
        assert scores.logits[i, :n] == pytest.approx(expected, abs=1e-5)
        assert (scores.logits[i, n:] == -np.inf).all()
        assert scores.loss[i] == pytest.approx(np.log(np.exp(expected).sum()) - expected[right], abs=1e-5)
        assert scores.correct[i] == (expected.argmax() == right)
        assert scores.margin[i] == pytest.approx(expected[right] - np.delete(expected, right).max(), abs=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_acc_and_acc_norm_are_by_sums_and_by_sums_per_character_and_byte(folder, base):
    """By hand, on options of very different lengths, one of which has more bytes than characters."""
    rows = [
        {"question": "one plus", "choices": [first, second, third], "answer": answer}
        for first in ("red", "blue and a sky of grass", *(f"{'ä' * n} {'ö' * n}" for n in (1, 2, 3)))
        for second, third in (("two", "two and a red sky"), ("four four four", "sky"))
        for answer in range(3)
    ]
    rows.append({"question": "the colour", "choices": ["red and blue and green", "sky"], "answer": 1})
    task = build(folder, rows, CHOICE, base)
    model = task.build_model()
    scores = task.score(model, "test", keep_logits=True)
    found = task.columns(scores, task.split("test"))
    wanted = {name: [] for name in ("acc", "acc_norm", "acc_bytes")}
    for row in rows:
        tokens = [len(task._tokens(f" {option}")) for option in row["choices"]]
        means = [by_hand(model, row["question"] + " ?", option, bos=base == "llama") for option in row["choices"]]
        sums = np.array(means) * tokens
        sizes = (1, [len(o) for o in row["choices"]], [len(o.encode()) for o in row["choices"]])
        for name, size in zip(wanted, sizes, strict=True):
            wanted[name].append(bool(np.argmax(sums / np.array(size)) == row["answer"]))
    for name, right in wanted.items():  # a split is sorted by length, the shares are of all
        assert found[name].dtype == bool
        assert found[name].mean() == np.mean(right)
        assert len(found[name]) == len(rows)
    assert wanted["acc"] != wanted["acc_norm"]
    assert base == "gpt2" or wanted["acc_bytes"] not in (wanted["acc"], wanted["acc_norm"])
    adapter, _ = train(task, Recipe(method="lora", steps=1, batch_size=2, learning_rate=1e-9))
    table = Evaluate(split="test").run([adapter]).columns
    for name, right in wanted.items():
        assert table[name] == pytest.approx([np.mean(right)] * 2)
        assert table[f"{name}_low"][0] < np.mean(right) < table[f"{name}_high"][0]


@pytest.mark.parametrize(
    "answers",
    [
        [1, 2, 0],
        ["1", "2", "0"],
        ["B", "C", "A"],
        ["b", "c", "a"],
        ["green", "three", "blue"],
    ],
)
def test_answers_are_numbers_letters_or_the_options_themselves(folder, answers):
    rows = [{**row, "answer": answer} for row, answer in zip(CHOICES, answers, strict=True)]
    expected = build(folder, CHOICES, CHOICE).split("test").inputs["labels"]
    assert build(folder, rows, CHOICE).split("test").inputs["labels"].tolist() == expected.tolist()


def test_options_may_be_columns_and_some_of_them_empty(folder):
    listed = build(folder, CHOICES, CHOICE).split("test").inputs
    columns = ("first", "second", "third", "fourth")
    rows = [{**row, **dict(zip(columns, [*row["choices"], None, None], strict=False))} for row in CHOICES]
    found = build(folder, rows, {**CHOICE, "options": list(columns)}).split("test").inputs
    for name, tensor in listed.items():
        assert torch.equal(found[name], tensor), name
    for row in rows:  # the same options with a hole before the last of them; the answer counts columns
        row |= {"fifth": row["fourth"], "fourth": None}
        if row["third"] is None:
            row |= {"third": row["second"], "second": None, "answer": row["answer"] + (row["answer"] > 0)}
    found = build(folder, rows, {**CHOICE, "options": [*columns, "fifth"]}).split("test").inputs
    for name, tensor in listed.items():
        assert torch.equal(found[name], tensor), name


def test_a_prompt_is_filled_in_once(folder):
    rows = [{"a": "one {b}", "b": "two", "choices": ["red", "blue"], "answer": 0}]
    ((prompt, *_),) = build(folder, rows, {**CHOICE, "prompt": "{a} plus {b} is"})._examples("test")
    assert prompt == "one {b} plus two is"


def test_a_choice_is_trained_on_its_right_option_alone(folder):
    split = build(folder, CHOICES, CHOICE).training_split()
    plain = tokenizer(bos=False)
    found = [plain.decode(example(split, i)[0][0]) for i in range(3)]
    targets = [plain.decode(row[row != -100]) for row in split.inputs["labels"]]
    assert sorted(targets) == ["blue", "green", "three"]
    assert all(text.endswith(f" ? {target}") for text, target in zip(found, targets, strict=True))


WRONG_KEYS = [
    ({"kind": "causal-lm"}, "either text, or prompt and completion, must name columns"),
    ({**COMPLETION, **TEXT}, "either text, or prompt and completion, must name columns"),
    ({**TEXT, "prompt": "question"}, "either text, or prompt and completion, must name columns"),
    ({"kind": "causal-lm", "prompt": "question"}, "either text, or prompt and completion, must name columns"),
    ({**CHOICE, "options": ["first"]}, r"options is \['first'\]; two columns or more, or one that holds lists"),
    ({**TEXT, "max_length": 1}, "max_length is 1; a whole number of at least 2 is needed"),
    ({"kind": "multiple-choice", "prompt": "{question}", "label": "answer"}, "no options, which a multiple-choice"),
    ({**TEXT, "txet": "text"}, "unknown key in .*'txet' .did you mean 'text'"),
]


@pytest.mark.parametrize(("keys", "text"), WRONG_KEYS)
def test_keys_that_do_not_fit_are_refused_before_anything_is_read(folder, keys, text):
    with pytest.raises(OptionError, match=text) as found:
        build(folder, [], keys)
    assert "my.toml" in str(found.value)


ROW = {"question": "the colour of grass", "choices": ["red", "green"], "answer": 1, "x": "red", "y": None}
WRONG_ROWS = [
    (TEXT, {"text": "red"}, "gpt2", "no text of its test split has a token to predict"),
    ({**TEXT, "text": "txet"}, {"text": "red blue"}, "llama", "no column 'txet'; there are: text"),
    ({**CHOICE, "prompt": "{question text} ?"}, ROW, "llama", "no column 'question text'"),
    (
        CHOICE,
        {**ROW, "choices": "red, green"},
        "llama",
        "options 'red, green' in 'choices'; a list of two or more is needed",
    ),
    (
        CHOICE,
        {**ROW, "choices": ["green"]},
        "llama",
        r"options \['green'\] in 'choices'; a list of two or more is needed",
    ),
    (CHOICE, {**ROW, "answer": 0.5}, "llama", "answer 0.5 is a float; a number from 0, a letter or the option itself"),
    (CHOICE, {**ROW, "answer": None}, "llama", "answer None is a NoneType; a number from 0"),
    (CHOICE, {**ROW, "answer": "blue"}, "llama", "answer 'blue' is a str; a number from 0"),
    (CHOICE, {**ROW, "answer": True}, "llama", "answer True is a bool; a number from 0"),
    (CHOICE, {**ROW, "answer": -1}, "llama", r"a split without answers \(-1\); name another one in splits"),
    (CHOICE, {**ROW, "answer": 2}, "llama", "of 2 options; they count from 0"),
    (CHOICE, {**ROW, "answer": "C"}, "llama", "of 2 options; they count from 0"),
    ({**CHOICE, "options": ["x", "y"]}, {**ROW, "answer": 0}, "llama", r"options \['red'\]; two or more are needed"),
    ({**CHOICE, "options": ["x", "y"]}, {**ROW, "answer": 1}, "llama", "its right answer 1 is an empty option"),
]


@pytest.mark.parametrize(("keys", "row", "base", "text"), WRONG_ROWS)
def test_rows_that_do_not_fit_are_named(folder, keys, row, base, text):
    with pytest.raises(TaskError, match=text):
        build(folder, [row, row], keys, base).split("test")


def test_a_tokenizer_that_cannot_pad_is_refused(folder):
    plain = tokenizer(bos=False)
    plain.eos_token = None
    plain.save_pretrained(folder / "gpt2")
    with pytest.raises(TaskError, match=r"the tokenizer of '.*gpt2' has no padding token"):
        build(folder, TEXTS, TEXT, "gpt2").split("test")


def test_a_tokenizer_of_another_model_is_refused(folder):
    config = json.loads((folder / "llama" / "config.json").read_text())
    (folder / "llama" / "config.json").write_text(json.dumps({**config, "vocab_size": 7}))
    with pytest.raises(TaskError, match=r"has 25 tokens, the model 7: they do not belong together"):
        build(folder, TEXTS, TEXT).split("test")


RECIPE = {"method": "lora", "steps": 25, "learning_rate": 2e-2, "rank": 2, "batch_size": 4}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("rows", "keys"), [(TEXTS, TEXT), (ANSWERS, COMPLETION), (CHOICES, CHOICE)])
def test_every_analysis_runs_on_language_models(folder, base, rows, keys):
    task = build(folder, rows, keys, base)
    adapters = [train(task, Recipe(seed=seed, **RECIPE))[0] for seed in (0, 1)]
    before, after = score(task, None), score(task, adapters[0])
    assert after.mean_loss < before.mean_loss - 0.3
    again = task_of(adapters[0])
    assert (score(again, adapters[0]).loss == after.loss).all()

    found = connectivity.Interpolate(points=3).run(adapters, task)
    first, middle, last = (row["loss"] for row in found.rows(space="delta"))
    ends = [first, last]
    assert ends == pytest.approx([after.mean_loss, score(task, adapters[1]).mean_loss], abs=1e-6)

    found = Shapley(worth="loss").run(adapters[:1], task)
    assert Shapley().run(adapters[:1], task).parameters["worth"] == task.metrics[0]
    summary = found.summary["adapters"][0]
    assert sum(row["value"] for row in found.rows()) == pytest.approx(summary["full"] - summary["empty"])
    assert summary["full"] == pytest.approx(-after.mean_loss, abs=1e-6)
    assert summary["engine"]["why_not_shared"] is None

    assert Stability().run(adapters[:1], task).rows(family="k-of-G", label="2", rescaled=False)

    merged = merge(Sources(adapters), "average").adapter
    assert score(task, merged).mean_loss == pytest.approx(middle, abs=1e-5)

    table = Evaluate().run(adapters)
    losses = np.array(table.columns["loss"])
    assert losses == pytest.approx([before.mean_loss, *ends], abs=1e-6)
    assert ("perplexity" in table.columns) == (not task.classifies)
    if not task.classifies:
        counts = task.columns(Scores({}), task.split("test"))["tokens"]
        assert len(set(counts)) > 1  # or every text would count alike
        texts = [score(task, adapter).loss for adapter in (None, *adapters)]
        expected = [np.exp((loss * counts).sum() / counts.sum()) for loss in texts]
        assert table.columns["perplexity"] == pytest.approx(expected)
        assert all(row["perplexity_low"] < row["perplexity"] < row["perplexity_high"] for row in table.rows())


def entropy(task, adapter):
    """Mean entropy of the chances of an example's options."""
    (batch,) = task.split("validation").batches(8)
    with attach(task.build_model(), adapter) as attached, torch.no_grad():
        return float(torch.special.entr(task.logits(attached.model, batch).softmax(-1)).sum(-1).mean())


def test_merges_that_look_at_the_chances_of_options_work_on_choices(folder):
    task = build(folder, CHOICES, CHOICE)  # of two, three and four options
    adapters = [train(task, Recipe(seed=seed, **RECIPE))[0] for seed in (0, 1)]
    sources = Sources(adapters, tasks=[task, task])
    start = merge(sources, "task-arithmetic", options={"scale": 0.3}).adapter
    merged = merge(sources, "adamerging", options={"steps": 30, "learning_rate": 0.03}).adapter
    before, after = (entropy(task, adapter) for adapter in (start, merged))
    assert after < before - 0.01  # not to be had with a gradient that is no number
    texts = build(folder, TEXTS, TEXT)
    for method, options in (("adamerging", {"steps": 3}), ("fisher", {"examples": 4})):
        merged = merge(Sources(adapters, tasks=[texts, texts]), method, options=options).adapter
        assert np.isfinite(score(texts, merged).loss).all()


def test_an_ensemble_of_language_models_averages_the_logits_of_every_token(folder):
    texts = build(folder, TEXTS, TEXT)
    adapters = [train(texts, Recipe(seed=seed, **RECIPE))[0] for seed in (0, 1)]
    found = MergeModels(Sources(adapters, tasks=[texts, texts])).ensemble(
        0, [a.updates for a in adapters], [0.25, 0.75], Examples("test")
    )
    logits = []
    (batch,) = texts.batches("test", torch.device("cpu"))
    for adapter in adapters:
        with attach(texts.build_model(), adapter) as attached, torch.no_grad():
            logits.append(texts.logits(attached.model, batch))
    mean = (0.25 * logits[0] + 0.75 * logits[1])[:, :-1]
    targets = batch["labels"][:, 1:]
    each = torch.nn.functional.cross_entropy(mean.transpose(1, 2), targets, reduction="none")
    expected = each.sum(1) / (targets != -100).sum(1)
    assert found.loss == pytest.approx(expected.numpy(), abs=1e-5)


def test_merges_of_language_models_are_compared_beside_their_ensemble(folder):
    rows = [[*TEXTS[:4]], [*TEXTS[2:]]]
    adapters = []
    for i, mine in enumerate(rows):
        build(folder, mine, TEXT)
        (folder / "rows.jsonl").rename(folder / f"rows{i}.jsonl")
        toml = (folder / "my.toml").read_text().replace("rows.jsonl", f"rows{i}.jsonl")
        (folder / f"t{i}.toml").write_text(toml)
        adapters.append(train(tasks.from_name(str(folder / f"t{i}.toml")), Recipe(seed=0, **RECIPE))[0])
    found = table.CompareMerges(methods=("average",), coefficients=(0.5, 1.0)).run(adapters, tasks_of(adapters))
    assert {row["merge"] for row in found.rows()} == {table.BASE, table.ALONE, table.ENSEMBLE, "average"}
    alone = [row["loss"] for row in found.rows(merge=table.ALONE)]
    assert [row["loss"] for row in found.rows(merge=table.ENSEMBLE)] != alone
