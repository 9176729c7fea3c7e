"""What the documentation lists is what there is."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

import unique_attn
from unique_attn import UniqueConfig, ops, report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
DECODE = {"append_kv", "page_index", "page_scores", "topk_pages", "sparse_decode", "unique_decode"}


def test_config_table():
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", README, re.MULTILINE)
    fields = {field.name: field.default for field in dataclasses.fields(UniqueConfig)}
    assert {name: ast.literal_eval(default) for name, default in rows} == fields


def test_ops_table():
    listed = set(re.findall(r"^\| `(\w+)\(", README, re.MULTILINE))
    assert DECODE <= listed <= set(ops.__all__)


def test_rules_table():
    listed = set(re.findall(r"^\| `(\w+)` \| \$", README, re.MULTILINE))
    assert listed == set(ops.RULES)


def test_numbers_come_from_committed_results():
    results = report.load(ROOT / "benchmarks" / "results")
    assert {result["bench"] for result in results} >= {"demo", "decode"}
    assert report.replace_block(README, report.render(results)) == README, "run `python -m unique_attn report`"


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}old\n{report.END}after\n")
    assert report.main(["--readme", str(readme)]) == 0
    assert report.main(["--print"]) == 0
    assert readme.read_text() == f"before\n{report.BEGIN}{capsys.readouterr().out}{report.END}after\n"
    readme.write_text("no markers")
    assert report.main(["--readme", str(readme)]) == 1
    assert "expected the lines" in capsys.readouterr().err


def test_public_names_are_there():
    for name in set(re.findall(r"unique_attn\.(\w+)", README)) - {"git"}:
        assert hasattr(unique_attn, name) or (ROOT / "unique_attn" / f"{name}.py").exists(), name


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"])
def test_links_lead_somewhere(page: str):
    text = (ROOT / page).read_text("utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target
    for path in re.findall(r"`((?:csrc|unique_attn|tests|examples|build_tools)/[\w/.]+)`", text):
        if not re.search(r"\b(test_)?X\b", path):  # X stands for any op
            assert (ROOT / path).exists(), path
