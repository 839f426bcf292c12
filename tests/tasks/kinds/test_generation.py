"""Generated answers on tiny random models: transformers' own one by one, draws by seed, what is right, and training."""

import json

import numpy as np
import pytest
import torch
from making_adapters import random_adapter
from peft import LoraConfig
from scipy.stats import chisquare
from tiny_language import build, tokenizer, write_causal, write_t5
from tiny_models import write_bert
from transformers import AutoModelForCausalLM, GenerationConfig

from lora_lab import tasks
from lora_lab.analysis.questions import Evaluate, Shapley
from lora_lab.errors import LoraLabWarning, OptionError, TaskError
from lora_lab.files.trust import Reach
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.examples import TaskSpec
from lora_lab.scoring.execution import Execution
from lora_lab.tasks.scores.metrics import METRICS
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

BASES = ("llama", "gpt2")
ROWS = [
    {"question": "what is one plus one", "answer": "two"},
    {"question": "what", "answer": "three and a red sky"},
    {"question": "the colour of blood and of grass and of the sky is", "answer": "red"},
    {"question": "one plus two plus three equals four", "answer": "the"},
    {"question": "a red and blue sky", "answer": "green"},
]
KEYS = {"kind": "generation", "prompt": "{question} ?", "answer": "answer", "max_new_tokens": 6}


@pytest.fixture
def folder(tmp_path):
    write_causal(tmp_path)
    return tmp_path


def answers(task):
    """Question → the answer in words, whatever the order of the examples."""
    model, found = task.build_model(), {}
    for batch in task.batches("test", torch.device("cpu")):
        told = task._generated(model, batch)
        found |= {int(place): task._text(tokens) for place, (tokens, _) in zip(batch["index"], told, strict=True)}
    return [found[place] for place in sorted(found)]


def alone(folder, base, prompts, **options):
    """What transformers generates greedily to each prompt by itself."""
    model, plain = AutoModelForCausalLM.from_pretrained(folder / base).eval(), tokenizer(bos=base == "llama")
    found = []
    for prompt in prompts:
        ids = torch.tensor([plain(prompt)["input_ids"]])
        config = GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=2, pad_token_id=0, **options)
        row = model.generate(ids, generation_config=config)[0, ids.shape[1] :]
        found.append(plain.decode(row, skip_special_tokens=True))
    return found


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("size", [1, 2, 16])
def test_answers_are_transformers_own_one_by_one_whatever_the_batch(folder, base, size):
    task = build(folder, ROWS, KEYS, base)
    task.batch_size = size
    wanted = alone(folder, base, [f"{row['question']} ?" for row in ROWS])
    assert len(set(wanted)) > 2
    assert answers(task) == wanted


def test_a_base_s_own_penalties_and_beams_do_not_count(folder):
    plain = answers(build(folder, ROWS, KEYS))
    own = {"repetition_penalty": 5.0, "num_beams": 3, "no_repeat_ngram_size": 1, "min_new_tokens": 5, "do_sample": True}
    GenerationConfig(bos_token_id=1, eos_token_id=2, **own).save_pretrained(folder / "llama")
    assert AutoModelForCausalLM.from_pretrained(folder / "llama").generation_config.num_beams == 3
    assert answers(build(folder, ROWS, KEYS)) == plain


def test_every_end_that_the_base_names_ends_an_answer(folder):
    task = build(folder, ROWS, KEYS)
    model = task.build_model()
    (batch,) = task.batches("test", torch.device("cpu"))
    told = task._generated(model, batch)
    long = next(tokens for tokens, ended in told if not ended)
    model.generation_config.eos_token_id = [2, long[1]]
    again = task._generated(model, batch)
    assert (long[:1], True) in again
    assert all(long[1] not in tokens for tokens, _ in again)


DRAWN = {**KEYS, "temperature": 1.3, "top_p": 0.95}


def test_draws_hang_on_seed_and_place_alone_and_leave_the_global_state(folder):
    state = torch.random.get_rng_state()
    drawn = answers(build(folder, ROWS, DRAWN))
    assert torch.equal(torch.random.get_rng_state(), state)
    task = build(folder, ROWS, DRAWN)
    task.batch_size = 2
    assert answers(task) == drawn
    assert answers(build(folder, ROWS, {**DRAWN, "sample_seed": 1})) != drawn
    assert drawn != answers(build(folder, ROWS, KEYS))


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_draws_have_the_models_distribution(folder, top_p):
    rows = [{"question": "what is", "answer": "one"}] * 600
    keys = {**KEYS, "max_new_tokens": 1, "temperature": 2.0, "top_p": top_p}
    task = build(folder, rows, keys)
    task.batch_size = 200
    model = task.build_model()
    first = [
        int(row[-1])
        for batch in task.batches("test", torch.device("cpu"))
        for row in model.generate(
            **task._asked(batch),
            generation_config=task._config(model),
            logits_processor=[_draws(task, batch)],
        )
    ]
    ids = torch.tensor([tokenizer(bos=True)("what is ?")["input_ids"]])
    chances = (model(ids).logits[0, -1].double() / 2).softmax(-1)
    order = chances.argsort(descending=True)
    kept = order[: int((chances[order].cumsum(0) < top_p).sum()) + 1]  # the least that have top_p together
    assert set(first) <= set(kept.tolist())
    expected = chances[kept] / chances[kept].sum() * 600
    counts = np.array([first.count(int(token)) for token in kept])
    often = (expected >= 5).numpy()
    grouped = [np.append(each[often], each[~often].sum()) for each in (counts, expected.numpy())]
    if not (~often).any():
        grouped = [each[:-1] for each in grouped]
    assert chisquare(*grouped).pvalue > 0.01


def _draws(task, batch):
    from lora_lab.tasks.kinds.language.answering import _Draws

    return _Draws(task.settings, batch["index"].tolist())


def test_what_is_right_could_be_extracted_and_ended(folder):
    said = alone(folder, "llama", [f"{row['question']} ?" for row in ROWS])
    rows = [{**row, "answer": answer or "red"} for row, answer in zip(ROWS, said, strict=True)]
    rows[0]["answer"] += " blue"
    task = build(folder, rows, KEYS)
    scores = task.score(task.build_model())
    place = task.split("test").inputs["index"].tolist()
    right = [bool(said[i]) and i != 0 for i in place]
    assert scores["exact_match"].tolist() == right
    assert scores["unextracted"].tolist() == [not said[i] for i in place]
    assert 0 < scores["unextracted"].mean() < 1
    ended = [len(answer.split()) < 6 for answer in said]
    assert scores["unfinished"].tolist() == [not ended[i] for i in place]
    assert METRICS["unextracted"].value(task.columns(scores, task.split("test"))) == scores["unextracted"].mean()
    assert task.metrics[0] == "exact_match"


def test_answers_and_references_go_through_one_extractor_and_stop(folder):
    task = build(folder, ROWS, {**KEYS, "extract": "regex", "pattern": "is (\\w+)", "stop": ["four", "sky"]})
    assert task.extracted("the colour is red and is blue") == "red"
    assert task._text(tokenizer()("one red sky two")["input_ids"]) == "one red "
    scores = replace_answers(task, ["is two", "two", "of", "is red is blue", "is"])
    assert scores["exact_match"].tolist() == [True, False, False, False, False]
    assert scores["unextracted"].tolist() == [False, True, True, False, True]


def replace_answers(task, words):
    """The scores of a model that answers these words, by the examples' places."""
    plain = tokenizer()

    def generated(model, batch):
        return [(plain(words[int(place)])["input_ids"], True) for place in batch["index"]]

    task._generated = generated
    scores = task.score(task.build_model())
    order = task.split("test").inputs["index"].argsort().numpy()
    return {name: values[order] for name, values in scores.columns.items()}


def test_the_loss_is_that_of_the_answer_as_of_completions(folder):
    task = build(folder, ROWS, KEYS)
    model = task.build_model()
    scores = task.score(model)
    plain = tokenizer(bos=True)
    for i, place in enumerate(task.split("test").inputs["index"].tolist()):
        prompt = plain(f"{ROWS[place]['question']} ?")["input_ids"]
        answer = [*tokenizer()(ROWS[place]["answer"])["input_ids"], 2]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        assert scores.loss[i] == pytest.approx(
            model(torch.tensor([prompt + answer]), labels=labels).loss.item(), abs=1e-5
        )


def test_long_prompts_lose_their_beginning_and_long_answers_their_end(folder):
    task = build(folder, ROWS, {**KEYS, "max_length": 4, "max_new_tokens": 3})
    with pytest.warns(LoraLabWarning, match="1 of the answers of its test split are longer than max_new_tokens: cut"):
        split = task.split("test")
    place = split.inputs["index"].tolist().index(2)
    length = int(split.inputs["prompt_length"][place])
    assert tokenizer().decode(split.inputs["prompt"][place, -length:, 0]) == "<s> sky is ?"
    place = split.inputs["index"].tolist().index(1)
    assert int((split.inputs["labels"][place] != -100).sum()) == 3


def test_a_reference_counts_in_what_scores_are_kept_under(folder):
    def run(rows, **keys):
        task = build(folder, rows, {**KEYS, **keys})
        adapter = random_adapter(task, folder / "a", LoraConfig(r=2, target_modules=["q_proj"]), seed=0, scale=1.0)
        return Evaluator([adapter], task).run_of("test")

    unknown = [[{**row, "answer": word} for row in ROWS] for word in ("zebra", "horse")]  # one token, <unk>
    runs = [run(unknown[0]), run(unknown[1]), run(unknown[0], extract="number"), run(unknown[0], stop=["x"])]
    runs += [run(unknown[0], temperature=1.0), run(unknown[0], temperature=1.0, sample_seed=1)]
    assert len(set(runs)) == len(runs)


def test_it_is_learnt_scored_and_played(folder):
    task = build(folder, ROWS, {**KEYS, "prompt": "question"})
    recipe = Recipe(
        steps=60, learning_rate=3e-2, rank=4, batch_size=5, target_modules=["q_proj", "v_proj", "down_proj"]
    )
    adapter, result = train(task, recipe)
    assert result.summary["validation"]["exact_match"] == 1
    assert list(result.summary["validation"])[:2] == ["exact_match", "unextracted"]
    assert score(task, None).columns["exact_match"].mean() == 0
    told = Evaluate().run([adapter], task)
    assert told.rows(adapter=adapter.label)[0]["exact_match"] == 1
    found = Shapley(players="layer", worth="loss", samples=8).run([adapter], task)
    worths = {value["player"]: value for value in found.rows()}
    assert len(worths) == 2
    base, full = score(task, None).loss.mean(), score(task, adapter).loss.mean()
    assert sum(row["value"] for row in worths.values()) == pytest.approx(base - full, abs=1e-4)


def test_why_no_prefix_is_shared_is_told(folder):
    task = build(folder, ROWS, KEYS)
    adapter = random_adapter(task, folder / "a", LoraConfig(r=2, target_modules=["q_proj"]), seed=0, scale=1.0)
    evaluator = Evaluator([adapter], task)
    masks = [evaluator.keeping(names) for names in ([], evaluator.names[:1], evaluator.names[1:], evaluator.names)]
    found = evaluator.scores(masks)
    assert evaluator.effort.why_not == "answers are generated token by token, whose passes share no block"
    whole = score(task, adapter)
    for name, values in found[-1].columns.items():
        assert np.allclose(values, whole[name], atol=1e-6), name
    assert not np.allclose(found[0].loss, found[-1].loss)


def test_workers_build_it_again(folder):
    task = build(folder, ROWS, {**DRAWN, "stop": ["sky"], "extract": "last-line"})
    again = TaskSpec.of(task).task()
    assert answers(again) == answers(task)
    assert all(torch.equal(again.split("test").inputs[n], t) for n, t in task.split("test").inputs.items())


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %} what {{ m.content }} {% else %} is "
    "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %} is {% endif %}"
)


@pytest.mark.parametrize("answer", ["one two", [{"role": "assistant", "content": "one two"}]])
def test_conversations_are_prompts_by_the_bases_template(folder, answer):
    plain = tokenizer(bos=True)
    plain.chat_template = TEMPLATE
    plain.save_pretrained(folder / "llama")
    asked = [
        {"role": "user", "content": "red"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "green"},
    ]
    task = build(folder, [{"asked": asked, "answer": answer}] * 2, {**KEYS, "prompt": "asked"})
    inputs = task.split("test").inputs
    assert plain.decode(inputs["prompt"][0, :, 0]) == "<s> what red is blue </s> what green is"
    labels = inputs["labels"][0]
    assert plain.decode(labels[labels >= 0]) == "one two </s>"
    assert torch.equal(inputs["input_ids"][0, : len(inputs["prompt"][0])], inputs["prompt"][0, :, 0])
    assert task.score(task.build_model()).columns["exact_match"].shape == (2,)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"top_p": 0.5}, "top_p is of answers that are drawn; a temperature above 0 is needed"),
        ({"temperature": -1.0}, "temperature is -1.0; a number of at least 0 is needed"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p is 0.0; a number above 0, up to 1 is needed"),
        ({"stop": [""]}, "stop is ['']; texts that are not empty are needed"),
        ({"extract": "nmber"}, "'nmber' (did you mean 'number'?)"),
        ({"extract": "regex"}, 'extract = "regex" needs it'),
        ({"prompt": "{qestion}"}, "no column 'qestion'; there are: question, answer"),
    ],
)
def test_keys_that_are_refused(folder, keys, told):
    with pytest.raises((OptionError, TaskError)) as found:
        build(folder, ROWS, {**KEYS, **keys}).split("test")
    assert told in str(found.value)
    assert "\n" not in str(found.value)


def test_bases_that_generate_nothing_are_refused_in_a_line(folder):
    write_bert(folder / "bert", folder / "vocab.txt", ["one"])
    write_t5(folder)
    for base, told in (("bert", "is a BertForSequenceClassification, which answers no prompt"), ("t5", '"seq2seq"')):
        with pytest.raises(TaskError) as found:
            build(folder, ROWS, KEYS, base).build_model()
        assert told in str(found.value)
        assert "\n" not in str(found.value)


def test_empty_answers_are_refused_and_foreign_data_is_not_shown(folder):
    rows = [{"question": "one", "answer": " "}]
    with pytest.raises(TaskError, match="an example with an empty answer in 'answer'"):
        build(folder, rows, KEYS).split("test")
    (folder / "rows.jsonl").write_text(json.dumps({"question": [{"role": "user"}], "answer": "secret"}))
    record = {**KEYS, "prompt": "question", "base": "llama", "data": "rows.jsonl"}
    task = tasks.from_record(record, base=folder, reach=Reach(folder=str(folder), quotes=False))
    with pytest.raises(TaskError) as found:
        task.split("train")
    assert "secret" not in str(found.value)


def test_several_at_once_give_what_single_ones_do(folder):
    task = build(folder, ROWS, DRAWN)
    adapter = random_adapter(
        task, folder / "a", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), seed=0, scale=1.0
    )
    alone, together = (Evaluator([adapter], task, Execution(coalitions_at_once=k)) for k in (0, 4))
    names = alone.names
    masks = [alone.keeping(names[i:]) for i in range(len(names) + 1)]
    found = [evaluator.scores(masks) for evaluator in (alone, together)]
    for one, other in zip(*found, strict=True):
        for name, values in one.columns.items():
            assert np.allclose(values, other[name], atol=1e-4), name
    assert any(not np.array_equal(found[0][0]["loss"], one["loss"]) for one in found[0])
