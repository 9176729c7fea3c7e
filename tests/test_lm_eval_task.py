"""The tasks in ``examples/lm_eval_task``, and the command that docs/quality.md shows for them, without lm-eval."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.lm_eval_task import hidden_code

ROOT = Path(__file__).parent.parent
FOLDER = Path(hidden_code.__file__).parent


@pytest.fixture(scope="module")
def tasks() -> dict[str, dict[str, Any]]:
    """The YAML files by the names of their tasks, with their functions as lm-eval finds them."""
    yaml = pytest.importorskip("yaml")

    class Loader(yaml.SafeLoader):
        pass

    def function(loader: Any, node: Any) -> Any:
        module, _, name = loader.construct_scalar(node).rpartition(".")
        assert module == "hidden_code"  # the file beside it
        return getattr(hidden_code, name)

    Loader.add_constructor("!function", function)
    found = [yaml.load(file.read_text("utf-8"), Loader) for file in sorted(FOLDER.glob("*.yaml"))]
    return {task["task"]: task for task in found}


def rendered(task: dict[str, Any], rows: Any) -> Iterator[tuple[str, str, str]]:
    """Prompt, target and code of each sample."""
    jinja2 = pytest.importorskip("jinja2")
    prompt, target = (
        jinja2.Template(task[name], keep_trailing_newline=True) for name in ("doc_to_text", "doc_to_target")
    )
    for row in rows:
        yield prompt.render(**row), target.render(**row), row["code"]


def test_documents():
    rows = list(hidden_code.documents(8, 3000))
    assert rows == list(hidden_code.documents(8, 3000))
    depths = []
    for row in rows:
        fact = f"The code of the {row['place']} is {row['code']}."
        assert row["document"].count(fact) == 1
        assert len(row["document"]) == 3000 + len(fact) + 1
        depths.append(row["document"].index(fact) / 3000)
    assert depths[0] < 0.2 < 0.8 < depths[-1]
    assert len({row["code"] for row in rows}) == 8
    with pytest.raises(ValueError, match=r"characters: expected at most \d+, got 9000000"):
        next(hidden_code.documents(1, 9_000_000))


def test_tasks(tasks: dict[str, dict[str, Any]]):
    pytest.importorskip("datasets")
    assert {name: task["output_type"] for name, task in tasks.items()} == {
        "hidden_code": "generate_until",
        "hidden_code_likelihood": "loglikelihood",
    }
    for task in tasks.values():
        rows = task["custom_dataset"](**task["metadata"], count=3, characters=2000)[task["test_split"]]
        assert len(rows) == 3
        for prompt, target, code in rendered(task, rows):
            assert re.search(r"\n\nQuestion: .+\?\nAnswer: The code of the \w+ is$", prompt)
            assert prompt.count(code) == 1
            assert target.strip() == code
    generated = tasks["hidden_code"]
    (digits,) = (each for each in generated["filter_list"][0]["filter"] if each["function"] == "regex")
    assert re.findall(digits["regex_pattern"], " 123456.\n")[0] == "123456"
    assert generated["generation_kwargs"]["until"] == ["\n"]  # else it would end at once or never
    assert tasks["hidden_code_likelihood"]["doc_to_target"].startswith(" ")


def test_the_command_of_the_page(tasks: dict[str, dict[str, Any]]):
    text = (ROOT / "docs" / "quality.md").read_text("utf-8")
    (command,) = re.findall(r"^python -c \"(import unique_attn, [^\"]+)\" run ([^`]+)```", text, re.MULTILINE)
    first, *_ = ast.parse(command[0]).body
    assert isinstance(first, ast.Import)
    assert [each.name for each in first.names] == ["unique_attn", "lm_eval.__main__"]  # in this order
    flags = dict(re.findall(r"--(\w+) ([^\s\\]+)", command[1]))
    assert ROOT / flags["include_path"] == FOLDER
    assert flags["tasks"].split(",") == list(tasks)
    assert "attn_implementation=unique" in flags["model_args"].split(",")


def test_the_name_is_known_once_the_package_is_imported():
    """What the command relies on: a model can be loaded by the name, and decodes on pages with saved settings."""
    transformers = pytest.importorskip("transformers")
    import torch
    from hf_helpers import SHAPE

    import unique_attn

    config = transformers.LlamaConfig(**SHAPE, unique_attn={"budget": 32})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="unique").eval()
    ids = torch.randint(2, 97, (1, 200), generator=torch.Generator().manual_seed(0))
    with unique_attn.record_selection(model) as records:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_length=205, use_cache=True, do_sample=False)
    assert {record.pages.shape[-1] for record in records} == {4}
    assert len(records) == 4 * config.num_hidden_layers
    with unique_attn.record_selection(model) as records:
        model(ids)
    assert records == []  # a likelihood is one forward without a cache: dense
