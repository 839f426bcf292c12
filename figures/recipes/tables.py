"""Tables of questions for the recipes in commonsense/ and math/, with the same columns: `python tables.py [FOLDER]`.

Datasets come from the Hugging Face hub. The task files expect the tables in data/ beside this script.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import load_dataset

Row = Mapping[str, Any]
PARQUET = "refs/convert/parquet"  # of datasets that are scripts, which no recent version of `datasets` runs
LONGEST = 1300  # characters of a question and its answer, as PEFT's method comparison has it


def chosen(question: str, choices: list[str], answer: int) -> Row:
    """A question of multiple choice."""
    return {"question": question, "choices": choices, "answer": answer}


def lettered(question: str, row: Row) -> Row:
    """One whose choices have names, as ARC and OpenBookQA have them."""
    return chosen(question, row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]))


COMMONSENSE = {
    # name: (repository, configuration, revision, its labelled split, what is made of a row)
    "boolq": (
        ("google/boolq", None, None, "validation"),
        lambda r: chosen(f"{r['passage']}\n{r['question']}?", ["no", "yes"], int(r["answer"])),
    ),
    "piqa": (
        ("ybisk/piqa", None, PARQUET, "validation"),
        lambda r: chosen(r["goal"], [r["sol1"], r["sol2"]], r["label"]),
    ),
    "siqa": (
        ("allenai/social_i_qa", None, PARQUET, "validation"),
        lambda r: chosen(
            f"{r['context']} {r['question']}", [r["answerA"], r["answerB"], r["answerC"]], int(r["label"]) - 1
        ),
    ),
    "hellaswag": (
        ("Rowan/hellaswag", None, None, "validation"),
        lambda r: chosen(r["ctx"], r["endings"], int(r["label"])),
    ),
    "winogrande": (
        ("allenai/winogrande", "winogrande_xl", None, "validation"),
        lambda r: chosen(r["sentence"], [r["option1"], r["option2"]], int(r["answer"]) - 1),
    ),
    "arc-easy": (("allenai/ai2_arc", "ARC-Easy", None, "test"), lambda r: lettered(r["question"], r)),
    "arc-challenge": (("allenai/ai2_arc", "ARC-Challenge", None, "test"), lambda r: lettered(r["question"], r)),
    "openbookqa": (("allenai/openbookqa", "main", None, "test"), lambda r: lettered(r["question_stem"], r)),
}


def write(path: Path, rows: Iterable[Row]) -> list[Row]:
    """Write a table, one row a line; the rows."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows)} questions")
    return rows


def main(folder: Path) -> None:
    """Write all tables into the folder."""
    train, test = [], []
    for name, ((repository, configuration, revision, split), made) in COMMONSENSE.items():
        data = load_dataset(repository, configuration, revision=revision)
        train += map(made, data["train"])
        test += write(folder / "commonsense" / f"{name}.jsonl", map(made, data[split]))
    write(folder / "commonsense" / "train.jsonl", train)
    write(folder / "commonsense" / "all.jsonl", test)

    asked = load_dataset("meta-math/MetaMathQA")["train"]
    short = (row for row in asked if len(f"{row['query']} {row['response']}") <= LONGEST)
    made = ({"question": row["query"], "answer": row["response"]} for row in short)
    write(folder / "math" / "metamath.jsonl", made)
    gsm8k = load_dataset("openai/gsm8k", "main")["test"]
    write(folder / "math" / "gsm8k.jsonl", ({"question": row["question"], "answer": row["answer"]} for row in gsm8k))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
