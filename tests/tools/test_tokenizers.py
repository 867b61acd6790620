"""From files to files on the command line; a mistake ends with a message, exit code 2 and nothing made."""

import json
import random
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import tokenizer

from ds_pretrain.data import extend
from ds_pretrain.data.tokenizer import TextTokenizer

TOOL = tokenizer.__file__
RNG = random.Random(0)
WORDS = ["系统", "管理", "管理员", "软件包", "安装", "网络", "的", "和", "配置文件"]


@pytest.fixture
def run(folder, monkeypatch, capsys):
    def command(*words):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [TOOL, *words])
        with pytest.raises(SystemExit) as ended:
            tokenizer.main()
        shown = capsys.readouterr()
        return ended.value.code, shown.out, shown.err

    return command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "en.txt").write_text((Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text("utf-8")[:50_000], "utf-8")
    lines = ("".join(RNG.choices(WORDS, k=12)) + "。" for _ in range(100))
    (folder / "zh.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in lines), "utf-8")
    (folder / "zh.txt").write_text("\n".join("".join(RNG.choices(WORDS, k=12)) for _ in range(200)), "utf-8")
    return folder


def test_train_compare_extend(folder, run):
    words = [sys.executable, TOOL, "train", "en.txt", "-o", "english", "--vocab-size", "900"]
    said = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert "900 ids" in said and len(TextTokenizer.load(folder / "english")) == 900
    code, said, _ = run("train", "en.txt", "中文=zh.txt", "-o", "both", "--vocab-size", "1000", "--temperature", "1e9")
    assert code == 0 and said.count("50.0%") == 2 and "中文" in said
    code, said, _ = run("extend", "english", "zh.txt", "-o", "wider", "--pieces", "60")
    made = extend.load(folder / "wider")
    assert code == 0 and "960 ids, 60 of them new" in said and made.first == 900 and len(made.tokenizer) == 960
    words = ["compare", "en.txt", "zh.txt", "-t", "english", "-t", "two=both", "-t", "wider/tokenizer.json"]
    code, said, errors = run(*words, "--reference", "en", "--json", "out.json", "--png", "out.png")
    assert code == 0, errors
    assert all(word in said for word in ("english", "two", "parity against en", "3.00", "picture: out.png"))
    rows = {(row["tokenizer"], row["text"]): row for row in json.loads((folder / "out.json").read_text())["rows"]}
    assert set(rows) == {(name, text) for name in ("english", "two", "tokenizer") for text in ("en", "zh")}
    assert rows["english", "zh"]["per_han"] == 3 > 2 * rows["tokenizer", "zh"]["per_han"] > 0
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG") and not list(folder.glob(".*"))


@pytest.mark.parametrize(
    "words, said",
    [
        (["train", "en.txt", "-o", "en.txt"], "en.txt exists: choose another output"),
        (["train", "en.txt", "en=zh.txt", "-o", "x"], "en.txt and zh.txt are both named en"),
        (["train", "en.txt", "-o", "x", "--kind", "bep"], "did you mean 'bpe'?"),
        (["train", "nowhere.txt", "-o", "x"], "no corpus at nowhere.txt"),
        (["train", "zh.jsonl", "-o", "x"], "is the text field really 'text'"),
        (["compare", "en.txt", "-t", "nowhere"], "no tokenizer at nowhere"),
        (["compare", "en.txt", "-t", "nowhere", "--png", "no/a.png"], "no is no folder to write a.png in"),
        (["resize", "nowhere", "nowhere", "-o", "x", "--rows", "some"], "choose pieces or all"),
    ],
)
def test_mistakes_are_told_and_nothing_is_made(folder, run, words, said):
    before = sorted(folder.iterdir())
    code, _, errors = run(*words)
    assert code == 2 and said in errors and "Traceback" not in errors and sorted(folder.iterdir()) == before
