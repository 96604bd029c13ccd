"""The documentation runs: its Python, its configurations, its commands, its links."""

import re
import shlex
from pathlib import Path

import pytest

from attacks.suite import SuiteConfig
from privlm import cli
from privlm.config import TrainConfig, decode_config

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SCHEMAS = {"TrainConfig": TrainConfig, "SuiteConfig": SuiteConfig}


def blocks(language: str) -> list:
    return [
        pytest.param(block, id=f"{page.name}-{number}")
        for page in PAGES
        for number, block in enumerate(
            re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        )
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_runs(page, capsys):
    """The blocks of one page run one after the other, as its reader would run them."""
    namespace = {"__name__": page.stem}
    for source in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(source, page.name, "exec"), namespace)
        promised = re.findall(r"print\(.*\)  # (.+)$", source, re.MULTILINE)
        printed = capsys.readouterr().out.splitlines()
        assert all(line in printed for line in promised)


@pytest.mark.parametrize("source", blocks("yaml"))
def test_configurations_decode(source):
    schema = re.match(r"# config: (\w+)\n", source)
    assert schema, "say which schema the block shows"
    decode_config(source, SCHEMAS[schema[1]], where="documentation")


@pytest.mark.parametrize("source", blocks("console"))
def test_account_commands_run(source, monkeypatch, capsys):
    for line in re.findall(r"^\$ (privlm account .*)$", source, re.MULTILINE):
        monkeypatch.setattr("sys.argv", shlex.split(line))
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0
        assert "epsilon" in (out := capsys.readouterr().out) or "ε" in out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target
