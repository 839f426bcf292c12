"""How large the code is, and where it is larger than the house wants it: `make check` prints it, and nothing fails."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE, FUNCTION, PARAMETERS, ROOM = 400, 60, 8, 2000


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def room(path: Path) -> str:
    """The folder that a file lies in: a room, or a room within a room."""
    return str(path.parent.relative_to(ROOT))


def functions(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name and line, lines and parameters (but for self and cls) of every function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            of = node.args
            names = [a.arg for a in (*of.posonlyargs, *of.args, *of.kwonlyargs, of.vararg, of.kwarg) if a]
            wanted = len([name for name in names if name not in ("self", "cls")])
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", (node.end_lineno or first) - first + 1, wanted


def show(title: str, sizes: dict[str, int], limit: int) -> None:
    over = sorted(((size, name) for name, size in sizes.items() if size > limit), reverse=True)
    print(f"{title} {limit:,}: {len(over) or 'none'}")
    for size, name in over:
        print(f"  {size:6,}  {name}")


def main() -> None:
    trees = {tree: sorted((ROOT / tree).rglob("*.py")) for tree in ("lora_lab", "cli", "tests")}
    code = trees["lora_lab"] + trees["cli"]
    rooms: Counter[str] = Counter()
    for path in code:
        rooms[room(path)] += lines(path)
    every = [each for path in code for each in functions(path)]
    show("files longer than", {str(path.relative_to(ROOT)): lines(path) for path in code}, FILE)
    show("functions longer than", {name: length for name, length, _ in every}, FUNCTION)
    show("functions of more parameters than", {name: count for name, _, count in every}, PARAMETERS)
    show("rooms larger than", rooms, ROOM)
    print("lines:", ", ".join(f"{tree} {sum(map(lines, paths)):,}" for tree, paths in trees.items()))


if __name__ == "__main__":
    main()
